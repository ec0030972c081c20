"""Many methods over the same seeds: trains what is missing, prints one table.

    python -m experiments.compare --workdir=runs/comparison --teacher=noisy
    python -m experiments.compare --workdir=runs/comparison --on=frappe

On the digits `--teacher=noisy` distils from the teacher of configs/digits/teacher.py, which is
wrong on 40 % of the training samples; `--teacher=good` from that of configs/digits/good_teacher.py.
Tables of attacks and clicks (`--on`) must be prepared before; their teacher learns from their
labels. Run again, it resumes, or prints the table of what is there.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence

import tensorflow_datasets as tfds
from absl import flags
from ml_collections import ConfigDict

from configs import recipes
from configs.digits import good_teacher, teacher
from experiments import commandline
from tgeo_jax import comparison, generations, storage, train
from tgeo_jax.data import sources
from tgeo_jax.errors import ConfigError, nearest

METHODS = (
    "plain", "kd", "annealed", "ada", "wls", "rw", "bikd", "tgeo",
    "dkd", "dist", "logit_std", "cmkd", "dml", "trikd",
)  # fmt: skip
OF_TABLES = ("plain", "kd", "annealed", "ada", "wls", "rw", "tgeo")
NOTHING_ELSE: tuple[str, ...] = ()
# By dataset: the recipe (dataset, method, folder) and what else to show of the test splits.
TABLES: dict[str, tuple[Callable[[str, str, str], ConfigDict], tuple[str, ...]]] = {
    "nsl_kdd": (recipes.attack, ("test/macro_f1", "test_hard/accuracy", "test_hard/macro_f1")),
    **dict.fromkeys(
        ("frappe", "movielens", "criteo", "avazu"),
        (recipes.clicks, ("test/auc", "test/cross_entropy")),
    ),
}
_WORKDIR = flags.DEFINE_string("workdir", "runs/comparison", "Folder of all the runs.")
_ON = flags.DEFINE_enum("on", "digits", ["digits", *TABLES], "Which dataset.")
_TEACHER = flags.DEFINE_enum(
    "teacher", "noisy", ["noisy", "good"], "Of the digits: which teacher to distil from."
)
_METHODS = flags.DEFINE_list(
    "methods", [], "Which methods; kd is needed to compare with. Empty: all that are usual there."
)
_SEEDS = flags.DEFINE_integer("seeds", 5, "Seeds 0, 1, ... of every method.", lower_bound=1)
_EPOCHS = flags.DEFINE_integer("epochs", 0, "Shortens every run to this many epochs; 0: as is.")


def main(argv: Sequence[str]) -> None:
    del argv
    chosen = _METHODS.value or (METHODS if _ON.value == "digits" else OF_TABLES)
    for name in chosen:
        if name not in METHODS:
            raise ConfigError(f"--methods={name}: no such method{nearest(name, METHODS)}")
    if "kd" not in chosen:
        raise ConfigError(f"--methods={','.join(chosen)}: add kd, to compare with")
    if _ON.value == "digits":
        workdir = storage.path(_WORKDIR.value) / _TEACHER.value
        tfds.disable_progress_bar()  # the digits are prepared in a moment
        sources.prepare("digits")
        config_of, figures = functools.partial(_of_digits, workdir), NOTHING_ELSE
    else:
        workdir = storage.path(_WORKDIR.value) / _ON.value
        recipe, figures = TABLES[_ON.value]
        config_of = functools.partial(_of_table, recipe, workdir)
    taught = train.run(_set(config_of("teacher"), seeds=1), workdir / "teacher")

    results, axes = {}, {}
    for name in chosen:
        config = _set(config_of(name), seeds=_SEEDS.value)
        results[name] = generations.run(config, workdir / name)
        axes[name] = tuple(config[axis].name for axis in ("loss", "ratio", "role"))
        if config.role.name == "alone":
            axes[name] = ("", "", "alone")
    found = comparison.table(results, axes, "kd", figures)
    print(f"\n{_about(taught, results, figures)}\n\n{found}")
    storage.write_atomically(workdir / "table.md", found)


def _about(taught: dict, results: dict[str, dict], figures: Sequence[str]) -> str:
    accuracy = comparison.percent(taught["test_accuracy"]["last"])
    further = "".join(
        f", {comparison.named(name)} "
        f"{comparison.decimal(taught['figures']['best_by_validation'][name])}"
        for name in figures
    )
    first, epochs = results["kd"], [result["epochs"] for result in results.values()]
    told = " to ".join(map(str, sorted({min(epochs), max(epochs)})))
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    return (
        f"The teacher: test accuracy {accuracy} %{further}.\n"
        f"{len(first['per_seed'])} seeds, {told} epochs, {first['device']}, {versions}."
    )


def _of_digits(workdir: storage.Path, method: str) -> ConfigDict:
    of_teacher = (good_teacher if _TEACHER.value == "good" else teacher).get_config()
    if method == "teacher":
        return of_teacher
    config = importlib.import_module(f"configs.digits.{method}").get_config()
    config.teacher.update(of_teacher.student.to_dict())
    if config.teacher.workdir:
        config.teacher.workdir = str(workdir / "teacher")
    return config


def _of_table(
    recipe: Callable[[str, str, str], ConfigDict], workdir: storage.Path, method: str
) -> ConfigDict:
    return recipe(_ON.value, method, str(workdir))


def _set(config: ConfigDict, *, seeds: int) -> ConfigDict:
    config.seeds = seeds
    if _EPOCHS.value:
        config.train.epochs = _EPOCHS.value
    return config


if __name__ == "__main__":
    commandline.run(main)
