"""Every method on the digits over the same seeds: trains what is missing, prints one table.

    python -m experiments.compare --workdir=runs/comparison --teacher=noisy

`--teacher=noisy` distils from the teacher of configs/digits/teacher.py, which is wrong on 40 % of
the training samples; `--teacher=good` from that of configs/digits/good_teacher.py. Run again, it
resumes, or prints the table of what is there.
"""

from __future__ import annotations

import importlib
import pathlib
from collections.abc import Sequence

import tensorflow_datasets as tfds
from absl import flags
from ml_collections import ConfigDict

from configs.digits import good_teacher, teacher
from experiments import commandline
from tgeo_jax import comparison, generations, storage, train
from tgeo_jax.data import sources
from tgeo_jax.errors import ConfigError, nearest

METHODS = (
    "plain", "kd", "annealed", "ada", "wls", "rw", "bikd", "tgeo",
    "dkd", "dist", "logit_std", "cmkd", "dml", "trikd",
)  # fmt: skip
_WORKDIR = flags.DEFINE_string("workdir", "runs/comparison", "Folder of all the runs.")
_TEACHER = flags.DEFINE_enum("teacher", "noisy", ["noisy", "good"], "Which teacher to distil from.")
_METHODS = flags.DEFINE_list(
    "methods", list(METHODS), "Which methods; kd is needed to compare with."
)
_SEEDS = flags.DEFINE_integer("seeds", 5, "Seeds 0, 1, ... of every method.", lower_bound=1)
_EPOCHS = flags.DEFINE_integer("epochs", 0, "Shortens every run to this many epochs; 0: as is.")


def main(argv: Sequence[str]) -> None:
    del argv
    for name in _METHODS.value:
        if name not in METHODS:
            raise ConfigError(f"--methods={name}: no such method{nearest(name, METHODS)}")
    if "kd" not in _METHODS.value:
        raise ConfigError(f"--methods={','.join(_METHODS.value)}: add kd, to compare with")
    workdir = pathlib.Path(_WORKDIR.value) / _TEACHER.value
    tfds.disable_progress_bar()  # the digits are prepared in a moment
    sources.prepare("digits")
    of_teacher = (good_teacher if _TEACHER.value == "good" else teacher).get_config()
    taught = train.run(_shortened(of_teacher), workdir / "teacher")

    results, axes = {}, {}
    for name in _METHODS.value:
        config = _config(name, of_teacher, workdir)
        results[name] = generations.run(config, workdir / name)
        axes[name] = tuple(config[axis].name for axis in ("loss", "ratio", "role"))
        if config.role.name == "alone":
            axes[name] = ("", "", "alone")

    print(f"\nThe teacher: test accuracy {comparison.percent(taught['test_accuracy']['last'])} %.")
    first = results["kd"]
    about = f"{len(first['per_seed'])} seeds, {first['epochs']} epochs, {first['device']}, " + (
        ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    )
    found = comparison.table(results, axes, "kd")
    print(f"{about}.\n\n{found}")
    storage.write_atomically(workdir / "table.md", found)


def _config(name: str, of_teacher: ConfigDict, workdir: pathlib.Path) -> ConfigDict:
    config = importlib.import_module(f"configs.digits.{name}").get_config()
    config.seeds = _SEEDS.value
    config.teacher.update(of_teacher.student.to_dict())
    if config.teacher.workdir:
        config.teacher.workdir = str(workdir / "teacher")
    return _shortened(config)


def _shortened(config: ConfigDict) -> ConfigDict:
    if _EPOCHS.value:
        config.train.epochs = _EPOCHS.value
    return config


if __name__ == "__main__":
    commandline.run(main)
