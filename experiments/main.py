"""One experiment: trains what a config file says, resumes an interrupted run, or says it is done.

    python -m experiments.main --config=configs/digits/tgeo.py --workdir=runs/tgeo \\
        --config.train.epochs=20 --config.ratio.tgeo.relations=intra
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from absl import app, flags
from ml_collections import config_flags

from experiments import commandline
from tgeo_jax import generations, report
from tgeo_jax.workdir import Workdir

_CONFIG = config_flags.DEFINE_config_file("config", None, "Python file with get_config().")
_WORKDIR = flags.DEFINE_string("workdir", "", "Folder of the run; made, resumed, or done.")
flags.mark_flag_as_required("config")
flags.register_validator("workdir", bool, "needed: where the run's files go")


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; fields are set by --config.x=value")
    path = config_flags.get_config_filename(flags.FLAGS["config"])
    config = commandline.checked(_CONFIG.value, path)
    folder = Workdir(pathlib.Path(_WORKDIR.value))
    finished_before = folder.result() is not None
    result = generations.run(config, folder.path)
    if finished_before:
        print(f"{folder.path} is finished; nothing to do.")
    print(report.text_table({folder.path.name: result}))
    corrupt = result.get("dataset", {}).get("corrupt", [])
    if corrupt:
        print(f"{len(corrupt)} corrupt images skipped: {', '.join(corrupt)}")
    runs = {run.path.name: run for run in folder.generations()} or {folder.path.name: folder}
    print(f"Report: {report.write(runs, folder.report)}")


if __name__ == "__main__":
    commandline.run(main)
