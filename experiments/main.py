"""One experiment: trains what a config file says, resumes an interrupted run, or says it is done.

    python -m experiments.main --config=configs/digits/tgeo.py --workdir=runs/tgeo \\
        --config.train.epochs=20 --config.ratio.tgeo.relations=intra
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
from absl import app, flags
from ml_collections import ConfigDict, config_flags

from experiments import commandline
from tgeo_jax import (
    cluster,
    device_kinds,
    dry_run,
    generations,
    parallel,
    peers,
    storage,
)
from tgeo_jax import config as configs
from tgeo_jax.errors import ConfigError
from tgeo_jax.workdir import Workdir

_CONFIG = config_flags.DEFINE_config_file("config", None, "Python file with get_config().")
_WORKDIR = flags.DEFINE_string("workdir", "", "Folder of the run; made, resumed, or done.")
_COORDINATOR = flags.DEFINE_string(
    "coordinator", "", "HOST:PORT of process 0, where no launcher says it; see docs/pods.md."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Of this run, likewise.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Of this process, likewise.")
_START_TIMEOUT = flags.DEFINE_integer(
    "start_timeout", 300, "Seconds to wait for the other processes.", lower_bound=1
)
_PEER_TIMEOUT = flags.DEFINE_integer(
    "peer_timeout", 60, "Seconds after which a silent process counts as dead.", lower_bound=2
)
_ACCEPT_CHANGES = flags.DEFINE_bool(
    "accept_changes", False, "Go on with a run whose configuration was another one."
)
_DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "Only say what a step needs of --devices that need not be here."
)
_DEVICES = flags.DEFINE_integer("devices", None, "Of a dry run; 1 if not given.", lower_bound=1)
_DEVICE_KIND = flags.DEFINE_string(
    "device_kind", "", f"Of a dry run: one of {', '.join(device_kinds.KINDS)}; empty: all."
)
flags.mark_flag_as_required("config")
flags.register_validator("workdir", bool, "needed: where the run's files go")


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; fields are set by --config.x=value")
    path = config_flags.get_config_filename(flags.FLAGS["config"])
    config = commandline.checked(_CONFIG.value, path)
    if _DRY_RUN.value or _DEVICES.value is not None or _DEVICE_KIND.value:
        _plan(config)
        return
    folder = Workdir(storage.path(_WORKDIR.value))
    given = {
        "coordinator": _COORDINATOR.value,
        "num_processes": _NUM_PROCESSES.value,
        "process_id": _PROCESS_ID.value,
    }
    cluster.start(given, start_timeout=_START_TIMEOUT.value, peer_timeout=_PEER_TIMEOUT.value)
    with peers.watched(_PEER_TIMEOUT.value):
        if _ACCEPT_CHANGES.value:
            _accept(folder, config)
        finished_before = folder.result() is not None
        result = generations.run(config, folder.path)
    is_first = jax.process_index() == 0
    if jax.process_count() > 1:
        jax.distributed.shutdown()  # the others need not wait for the report
    if is_first:
        _tell(folder, result, finished_before)


def _plan(config: ConfigDict) -> None:
    if not _DRY_RUN.value:
        raise ConfigError("--devices, --device_kind: only say something together with --dry_run")
    kinds = device_kinds.named(_DEVICE_KIND.value)
    dry_run.simulate(_DEVICES.value or 1)
    plan = dry_run.plan(config)
    print(f"{dry_run.told(plan, kinds)}\n", flush=True)
    print(dry_run.verdict(plan, kinds))


def _accept(folder: Workdir, config: ConfigDict) -> None:
    configs.check(config)
    if generations.is_chain(config):
        raise ConfigError(
            "--accept_changes: not for a chain of generations, the earlier of which are finished; "
            "use another --workdir"
        )
    for change in folder.changes(config):
        if change.startswith("train.select_by:"):
            raise ConfigError(
                f"--accept_changes: {change}: the best epoch so far was chosen by the other "
                "figure; use another --workdir"
            )
    folder.accept(config)
    parallel.together("accepted")


def _tell(folder: Workdir, result: dict, finished_before: bool) -> None:
    from tgeo_jax import report  # draws; the first step need not wait for that

    if finished_before:
        print(f"{folder.path} is finished; nothing to do.")
    results = {folder.path.name: result}
    print(report.text_table(results))
    if measured := report.figures_table(results):
        print(f"\n{measured}")
    if result.get("stopped_early"):
        print(
            f"Stopped after epoch {result['epochs']}: no better one in train.patience evaluations"
        )
    corrupt = result.get("dataset", {}).get("corrupt", [])
    if corrupt:
        print(f"{len(corrupt)} corrupt images skipped: {', '.join(corrupt)}")
    runs = {run.path.name: run for run in folder.generations()} or {folder.path.name: folder}
    print(f"Report: {report.write(runs, folder.report)}")


if __name__ == "__main__":
    commandline.run(main)
