"""What a disturbed training left, beside what an undisturbed one leaves; see `faults`."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import random
import re
import signal
import subprocess
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from tgeo_jax import checkpoint, peers
from tgeo_jax.writers import read_records

SIGNALS = ("KILL", "TERM", "TERM, KILL")
MOMENTS = ("moment", "training", "save")
_LIMIT = 180  # seconds after which a process that should have ended counts as hung
_COULD_NOT_START = 2  # a command's status where its user has to do something


@dataclasses.dataclass(frozen=True)
class Fault:
    """One disturbance.

    Attributes:
        signal: of `SIGNALS`.
        at: of `MOMENTS`: anywhere in the run, once it trains, while a checkpoint is being written.
        share: where in that part of the run, or in the first three saves, in [0, 1).
        grace: seconds from SIGTERM to kill -9, where both are sent.
        victim: which process of the training.
    """

    signal: str
    at: str
    share: float
    grace: float
    victim: int


class Contents(NamedTuple):
    """What a finished training left: arrays by name, and records without their times."""

    arrays: dict[str, np.ndarray]
    records: list[dict[str, Any]]


def contents(folder: pathlib.Path) -> Contents:
    """Everything in the newest checkpoint of a run, and its log without the times."""
    found = checkpoint.load_newest(folder / "checkpoints")
    leaves = jax.tree_util.tree_leaves_with_path(found)
    arrays = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
    records = [
        {name: value for name, value in record.items() if not name.startswith("time/")}
        for record in read_records(folder / "metrics.jsonl")
    ]
    return Contents(arrays, records)


def differences(found: Contents, expected: Contents) -> list[str]:
    """In what two trainings differ; bits count, so that -0.0 is not 0.0 and NaN is itself.

    Examples:
        >>> one, other = (Contents({"w": np.float32([v])}, []) for v in (0.0, -0.0))
        >>> differences(one, other)
        ['w: 1 of 1 values differ']
    """
    said = []
    for name in sorted(found.arrays.keys() | expected.arrays.keys()):
        if name not in found.arrays or name not in expected.arrays:
            said.append(f"{name}: only in one of them")
            continue
        one, other = found.arrays[name], expected.arrays[name]
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            said.append(f"{name}: {one.dtype}{one.shape}, expected {other.dtype}{other.shape}")
        elif one.tobytes() != other.tobytes():
            bits = [np.frombuffer(each.tobytes(), np.uint8) for each in (one, other)]
            unlike = (bits[0] != bits[1]).reshape(one.size, -1).any(1).sum()
            said.append(f"{name}: {unlike} of {one.size} values differ")
    if len(found.records) != len(expected.records):
        said.append(f"metrics: {len(found.records)} records, expected {len(expected.records)}")
    for record, wanted in zip(found.records, expected.records, strict=False):
        keys = sorted(record.keys() | wanted.keys())
        unequal = [
            key for key in keys if json.dumps(record.get(key)) != json.dumps(wanted.get(key))
        ]
        if unequal:
            where = f"metrics: step {wanted['step']}, seed {wanted['seed']}"
            said.append(f"{where}: {', '.join(unequal)}")
    return said


def wrong(fault: Fault, caught: bool, statuses: Sequence[int | None]) -> list[str]:
    """What is wrong with the statuses that a disturbed run's processes ended with.

    Args:
        fault: what was sent to one of them.
        caught: whether it caught SIGTERM then.
        statuses: negative for a signal, None for a process that hung.

    Examples:
        >>> term = Fault("TERM", "moment", 0.5, 0.0, 0)
        >>> wrong(term, True, [75])
        []
        >>> wrong(term, True, [-15])
        ['TERM to process 0: status -15, expected one of 0, 75']
    """
    # 0: it had finished. Others of the run notice that one is gone, or never see it come.
    allowed = {0, peers.RESTART} if "TERM" in fault.signal else {0}
    others = {0, peers.RESTART}
    if "KILL" in fault.signal:
        allowed = allowed | {-signal.SIGKILL}
    if not caught:
        others = others | {_COULD_NOT_START}
        if "TERM" in fault.signal:
            allowed = allowed | {-signal.SIGTERM}
    found = []
    for process, status in enumerate(statuses):
        expected = allowed if process == fault.victim else others
        if status not in expected:
            ended = "hung" if status is None else f"status {status}"
            names = ", ".join(map(str, sorted(expected)))
            found.append(
                f"{fault.signal} to process {fault.victim}: "
                f"{f'process {process}: ' if process != fault.victim else ''}{ended}, "
                f"expected one of {names}"
            )
    return found


def told(row: dict[str, Any]) -> str:
    """A round in one line."""
    faults = "; ".join(
        f"{fault['signal']} at {fault['seconds']:.1f} s ({fault['at']}), goes on from "
        f"{fault['resumes_at']}"
        for fault in row["faults"]
    )
    end = "identical" if row["identical"] else f"DIFFERS: {'; '.join(row['differences'])}"
    end += "".join(f"; PROBLEM: {problem}" for problem in row["problems"])
    return f"round {row['round']}: {faults or 'finished first'}; {row['attempts']} attempts: {end}"


def summary(rows: list[dict[str, Any]]) -> tuple[str, bool]:
    """The last line, and whether all was well."""
    faults = [fault for row in rows for fault in row["faults"]]
    counts = [f"{sum(f['signal'] == name for f in faults)} {name}" for name in SIGNALS]
    saving = sum(fault["at"] == "save" for fault in faults)
    trained = sum(fault["caught"] for fault in faults)
    different = sum(not row["identical"] for row in rows)
    problems = sum(len(row["problems"]) for row in rows)
    text = (
        f"{len(rows)} rounds, {len(faults)} faults ({'; '.join(counts)}; {saving} aimed at a save, "
        f"{trained} after training had begun): {len(rows) - different} ended bit for bit as "
        f"undisturbed, {different} did not; {problems} other problems"
    )
    return text, not different and not problems


def plan(chance: random.Random, most: int, processes: int) -> list[Fault]:
    """The disturbances of a round.

    Examples:
        >>> plan(random.Random(0), 3, 1) == plan(random.Random(0), 3, 1)
        True
    """
    return [
        Fault(
            signal=chance.choice(SIGNALS),
            at=chance.choice(MOMENTS),
            share=chance.random(),
            grace=chance.random() / 2,
            victim=chance.randrange(processes),
        )
        for _ in range(chance.randint(1, most))
    ]


def finish(running: list[subprocess.Popen]) -> list[int | None]:
    """Exit statuses; None of a process that hung, and had to be killed."""
    deadline, statuses = time.monotonic() + _LIMIT, list[int | None]()
    for process in running:
        try:
            statuses.append(process.wait(max(0.1, deadline - time.monotonic())))
        except BaseException as error:
            process.kill()
            process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            statuses.append(None)
    return statuses


def catches(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal; False where the system does not say."""
    try:
        status = pathlib.Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    found = re.search(r"^SigCgt:\s*([0-9a-f]+)", status, re.MULTILINE)
    return found is not None and bool(int(found[1], 16) >> (number - 1) & 1)
