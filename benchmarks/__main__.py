"""The whole table of benchmarks on this machine, in one command.

python -m benchmarks --output=results/benchmarks/speed.jsonl
python -m benchmarks --only=step,peers
"""

from __future__ import annotations

import datetime
import json
import os
import pathlib
import platform
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from absl import flags

from benchmarks import dispatches, feeding, growth, measure, peers, startup, steps, table
from experiments import commandline
from tgeo_jax import outcome
from tgeo_jax.errors import ConfigError, nearest

_ONLY = flags.DEFINE_list("only", [], "Parts to run; all of them if empty.")
_QUICK = flags.DEFINE_bool("quick", False, "Each part once, on the smallest networks: a trial.")
_ROUNDS = flags.DEFINE_integer("rounds", 9, "How often each is timed.", lower_bound=1)
_OUTPUT = flags.DEFINE_string("output", "", "JSON lines that the rows are added to.")

_SHOW = flags.DEFINE_string("show", "", "Prints the rows of such a file; nothing is measured.")

# In the order of what a reader asks first. (quick, rounds, peak) -> rows
_Part = Callable[[bool, int, measure.Peak], Iterator[table.Row]]


def _on_accelerator() -> bool:
    return jax.default_backend() != "cpu"


def _names(quick: bool, *cpu: str) -> tuple[str, ...]:
    if quick:
        return ("mlp",)
    return (*cpu, "resnet8x4") if _on_accelerator() and "resnet8x4" not in cpu else cpu


def _few(rounds: int) -> int:
    """For what takes seconds: a third of the rounds."""
    return max(1, rounds // 3)


def _steps(quick: bool, rounds: int, peak: measure.Peak) -> Iterator[table.Row]:
    yield from steps.rows(_names(quick, "mlp_256", "cnn"), 64, rounds, peak)
    if not quick:
        yield from steps.rows(("resnet20",), 64, _few(rounds), peak)


def _peers(quick: bool, rounds: int, peak: measure.Peak) -> Iterator[table.Row]:
    small = ("mlp",) if quick else ("mlp", "mlp_256", "tabular", "cnn")
    yield from peers.rows(small, 64, rounds, peak)
    if not quick:
        yield from peers.rows(("resnet20", "resnet8x4"), 64, _few(rounds), peak)


def _dispatches(quick: bool, rounds: int, peak: measure.Peak) -> Iterator[table.Row]:
    batches = (64,) if quick else (64, 256, 1024)
    names = _names(quick, "mlp_256", "cnn")
    yield from dispatches.dispatch_rows(names, batches, rounds, peak)


def _seeds(quick: bool, rounds: int, peak: measure.Peak) -> Iterator[table.Row]:
    del peak
    counts = (1, 2) if quick else (1, 2, 5, 10)
    yield from dispatches.seed_rows(_names(quick, "mlp", "cnn"), counts, 64, rounds)
    if not quick:
        yield from dispatches.seed_rows(("resnet20",), (1, 5), 64, _few(rounds))


def _inputs(quick: bool, rounds: int, peak: measure.Peak) -> Iterator[table.Row]:
    del peak
    yield from feeding.rows(_names(quick, "cnn", "resnet20"), 64, rounds)


def _startup(quick: bool, rounds: int, peak: measure.Peak) -> Iterator[table.Row]:
    del peak
    yield from startup.rows(("mlp",) if quick else ("cnn", "resnet20"), _few(rounds))


def _classes(quick: bool, rounds: int, peak: measure.Peak) -> Iterator[table.Row]:
    counts = (10, 100) if quick else (10, 100, 1_000, 21_000)
    more = () if quick else (100_000,)
    yield from growth.class_rows(counts, (*counts, *more), _few(rounds), peak)


def _devices(quick: bool, rounds: int, peak: measure.Peak) -> Iterator[table.Row]:
    del rounds, peak
    yield from growth.device_rows(2 if quick else 8)


_PARTS: dict[str, _Part] = {
    steps.PART: _steps,
    peers.PART: _peers,
    dispatches.DISPATCH: _dispatches,
    dispatches.SEEDS: _seeds,
    feeding.PART: _inputs,
    startup.PART: _startup,
    growth.CLASSES: _classes,
    growth.DEVICES: _devices,
}


def main(argv: Sequence[str]) -> None:
    """Prints each part as soon as it is measured."""
    del argv
    for name in _ONLY.value:
        if name not in _PARTS:
            raise ConfigError(f"--only={name}: no such part{nearest(name, _PARTS)}")
    if _SHOW.value:
        _show(pathlib.Path(_SHOW.value))
        return
    peak = measure.peak(256 if _QUICK.value else 2048)
    about = _about(peak)
    print(_told(about), flush=True)
    rounds = 1 if _QUICK.value else _ROUNDS.value
    for name in _ONLY.value or _PARTS:
        rows: list[table.Row] = []
        for row in _PARTS[name](_QUICK.value, rounds, peak):
            rows.append(row)
            if _OUTPUT.value:  # at once: what was measured is not lost with what follows
                table.write(pathlib.Path(_OUTPUT.value), [row], about)
        print("\n" + table.markdown(rows), flush=True)


def _show(path: pathlib.Path) -> None:
    """Prints the rows of each run in a file, newest last."""
    if not path.is_file():
        raise ConfigError(f"--show={path}: no such file; --output={path} makes it")
    found = [(row, about) for row, about in table.read(path)]
    for run in dict.fromkeys(json.dumps(about) for _, about in found):
        rows = [row for row, about in found if json.dumps(about) == run]
        chosen = [row for row in rows if not _ONLY.value or row.part in _ONLY.value]
        if chosen:
            print(_told(json.loads(run)) + "\n\n" + table.markdown(chosen) + "\n")


def _told(about: dict[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in about.items())


def _about(peak: measure.Peak) -> dict[str, Any]:
    return {
        "device": jax.devices()[0].device_kind,
        "cores": len(os.sched_getaffinity(0)),
        "peak_gflops": round(peak.flops_per_second / 1e9),
        "peak_bfloat16_gflops": round(peak.bfloat16_flops_per_second / 1e9),
        "copy_gb_per_second": round(peak.bytes_per_second / 1e9, 1),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "commit": outcome.commit(),
        "date": datetime.date.today().isoformat(),
    }


if __name__ == "__main__":
    commandline.run(main)
