"""A paper's table by one command: plans its runs, trains what is missing, prints it.

    python -m experiments.reproduce --table=digits --plan
    python -m experiments.reproduce --table=digits --methods=plain,kd,tgeo --seeds=3

Tables are the files of configs/tables/; without --table they are listed. The same command again
goes on, or prints what is there. The table is written as Markdown, CSV and LaTeX beside its runs,
with their report.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import subprocess
from collections.abc import Mapping, Sequence

import jax
import tensorflow_datasets as tfds
from absl import flags

from experiments import commandline
from experiments.reproduction import (
    declared,
    figures,
    kubernetes,
    local,
    outcomes,
    output,
    plan,
    slurm,
)
from experiments.reproduction import runs as all_runs
from tgeo_jax import device_kinds, ledger, report, storage
from tgeo_jax.data import sources
from tgeo_jax.errors import ConfigError, DataError

_TABLE = flags.DEFINE_string("table", "", "Of configs/tables/, or a file; empty: lists them.")
_PAIRS = flags.DEFINE_list("pairs", [], "Only these columns.")
_METHODS = flags.DEFINE_list("methods", [], "Only these rows.")
_SEEDS = flags.DEFINE_integer("seeds", None, "Of every cell; as declared if empty.", lower_bound=1)
_WORKDIR = flags.DEFINE_string("workdir", "", "Of all runs; runs/tables/NAME if empty.")
_SET = flags.DEFINE_multi_string(
    "set", [], "FIELD=VALUE of every run, teachers too, such as train.epochs=2 (repeat the flag)."
)
_PLAN = flags.DEFINE_bool("plan", False, "Only says what would be trained, and its cost.")
_DEVICE_KIND = flags.DEFINE_string(
    "device_kind", "", f"Of --plan: one of {', '.join(device_kinds.KINDS)}, to estimate for."
)
_PRICE = flags.DEFINE_float("price", 0.0, "Of --plan: of a device hour.", lower_bound=0.0)
_WORKERS = flags.DEFINE_integer("workers", 0, "Runs at a time; 0: as many as devices.")
_RETRIES = flags.DEFINE_integer("retries", 1, "Of a run that failed.", lower_bound=0)
_PACKED = flags.DEFINE_bool(
    "packed", None, "Whether the seeds of a cell are one program; as the table says if not given."
)
_BACKEND = flags.DEFINE_enum(
    "backend", "local", ["local", "slurm", "kubernetes"], "Who trains; see docs/reproduction.md."
)
_SUBMIT = flags.DEFINE_bool("submit", False, "Also submit what was written for the backend.")
_SBATCH = flags.DEFINE_multi_string("sbatch", [], "Slurm: an option of sbatch (repeat the flag).")
_IMAGE = flags.DEFINE_string("image", "", "Kubernetes: of the container.")
_QUEUE = flags.DEFINE_string("queue", "", "Kubernetes: Kueue's LocalQueue.")
_NAMESPACE = flags.DEFINE_string("namespace", "default", "Kubernetes.")
_ACCELERATOR = flags.DEFINE_string(
    "accelerator", "", "Kubernetes: GKE's name, nvidia-h100-80gb or tpu-v5-lite-podslice."
)
_TOPOLOGY = flags.DEFINE_string("topology", "", "Kubernetes: of a TPU slice, such as 4x4.")
_CHIPS = flags.DEFINE_integer("chips", 1, "Kubernetes: GPUs or TPU chips of a host.", lower_bound=1)
_HOSTS = flags.DEFINE_integer("hosts", 1, "Kubernetes: GPU hosts of a run.", lower_bound=1)
_CLAIM = flags.DEFINE_string("claim", "", "Kubernetes: a shared volume, CLAIM:/mount.")
_RECORD = flags.DEFINE_string(
    "record", "", "A ledger to add the finished runs to, results/X.jsonl."
)


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise ConfigError(f"unexpected argument {argv[1]!r}; name a table by --table=")
    if not _TABLE.value:
        _list()
        return
    # The runs are processes of their own: this one leaves the devices alone.
    jax.config.update("jax_platforms", "cpu")
    table = declared.load(_TABLE.value).restricted(_METHODS.value, _PAIRS.value, _SEEDS.value)
    if _PACKED.value is not None:
        table = dataclasses.replace(table, packed=_PACKED.value)
    workdir = storage.path(_WORKDIR.value or f"runs/tables/{table.folder}")
    tfds.disable_progress_bar()
    sources.prepare("digits")  # comes with scikit-learn: a moment, and nothing to download
    found, cells = all_runs.of_table(table, workdir, all_runs.settings(_SET.value))
    if _PLAN.value:
        kind = device_kinds.named(_DEVICE_KIND.value)[0] if _DEVICE_KIND.value else None
        print(plan.told(plan.of_runs(found, kind), price=_PRICE.value))
        return
    if _BACKEND.value != "local":
        script = _rendered(found, table.name, workdir)
        print(f"bash {script}")
        if _SUBMIT.value:
            subprocess.run(["bash", str(script)], check=True)
        return
    failures = _train(found, workdir)
    finished = _finished(table, found, cells, {f.run: f.why for f in failures})
    _write(finished, workdir, found, cells)
    if _RECORD.value:
        _record(found, pathlib.Path(_RECORD.value))
    if failures:
        told = "\n".join(f"  {each.run}: {each.why}" for each in failures)
        raise DataError(f"{len(failures)} runs are missing in the table:\n{told}")


def _list() -> None:
    for name in declared.names():
        print(f"{name:<20}  {declared.load(name).title}")


def _rendered(found: Mapping[str, all_runs.Run], table: str, workdir: storage.Path) -> pathlib.Path:
    """The script that gives what is left to a scheduler."""
    where = pathlib.Path("runs/jobs" if storage.is_bucket(workdir) else workdir)
    if _BACKEND.value == "slurm":
        return slurm.write(
            list(found.values()),
            where / "slurm",
            table,
            root=pathlib.Path(),
            options=_SBATCH.value,
            at_a_time=_WORKERS.value,
            retries=_RETRIES.value,
        )
    place = kubernetes.Place(
        image=_IMAGE.value,
        queue=_QUEUE.value,
        namespace=_NAMESPACE.value,
        accelerator=_ACCELERATOR.value,
        topology=_TOPOLOGY.value,
        chips=_CHIPS.value,
        hosts=_HOSTS.value,
        claim=_CLAIM.value,
        retries=_RETRIES.value,
    )
    return kubernetes.write(list(found.values()), where / "kubernetes", table, place)


def _train(found: Mapping[str, all_runs.Run], workdir: storage.Path) -> list[local.Failure]:
    devices = local.devices(os.environ)
    workers = devices
    if _WORKERS.value:
        workers = [devices[index % len(devices)] for index in range(_WORKERS.value)]
    logs = pathlib.Path("runs/logs") if storage.is_bucket(workdir) else pathlib.Path(workdir)
    return local.train(found, logs / "logs", workers=workers, retries=_RETRIES.value)


def _finished(
    table: declared.Table,
    found: Mapping[str, all_runs.Run],
    cells: Sequence[all_runs.Cell],
    failed: Mapping[str, str],
) -> output.Finished:
    teachers = {}
    for cell in cells:
        needs = found[cell.runs[0]].needs
        result = found[needs].folder.result() if needs else None
        if result is not None:
            teachers[cell.column.name] = result
    results = [run.folder.result() for run in found.values() if run.source]
    done = [result for result in results if result is not None]
    return output.Finished(
        table,
        {(c.row.name, c.column.name): outcomes.of_cell(table, c, found, failed) for c in cells},
        teachers,
        output.provenance(done),
    )


def _write(
    finished: output.Finished,
    workdir: storage.Path,
    found: Mapping[str, all_runs.Run],
    cells: Sequence[all_runs.Cell],
) -> None:
    page = output.markdown(finished)
    print(f"\n{page}")
    name = finished.table.name
    for suffix, text in (
        ("md", page),
        ("csv", output.comma_separated(finished)),
        ("tex", output.latex(finished)),
    ):
        storage.write_atomically(workdir / f"{name}.{suffix}", text)
    for shows, picture in figures.drawn(finished, cells, found):
        storage.write_atomically(workdir / f"{name}-{shows}.png", picture)
    print(f"Written: {workdir / name}.md, .csv, .tex, -*.png")
    chosen = {
        f"{cell.column.name} {cell.row.name}": found[cell.runs[0]].folder
        for cell in cells
        if len(cell.runs) == 1 and cell.row.generation is None
    }
    done = {key: folder for key, folder in chosen.items() if folder.result() is not None}
    runs = {key: [folder, *folder.generations()][-1] for key, folder in done.items()}
    if runs:
        print(f"Report: {report.write(runs, workdir / 'report', finished.table.title)}")


def _record(found: Mapping[str, all_runs.Run], path: pathlib.Path) -> None:
    """Adds what has finished, teachers too, and is not there yet."""
    for run in found.values():
        if not run.source or run.folder.result() is None:
            continue
        try:
            ledger.add(path, ledger.entry(run.folder))
        except DataError as error:
            if "is there already" not in str(error):
                raise
            continue
        print(f"{run.name}: added to {path}")


if __name__ == "__main__":
    commandline.run(main)
