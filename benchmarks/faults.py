"""Kills a small training at random moments and compares its end with that of an undisturbed one.

    python -m benchmarks.faults --rounds=50 --output=results/benchmarks/faults.jsonl
    python -m benchmarks.faults --rounds=20 --processes=2 --output=results/benchmarks/faults.jsonl

A round starts the training in a fresh folder and disturbs it: kill -9, SIGTERM, or SIGTERM and
kill -9 soon after, at a moment anywhere in the run, once it trains, or while a checkpoint is being
written. It is started again and perhaps disturbed again, until it finishes. Then every array of its
newest checkpoint (networks, optimisers, fusion network, best ones) and every record of
metrics.jsonl but the times must be those of the undisturbed run, bit for bit. Exit status 1 if
anything differs, if SIGTERM was not answered with status 75, or if a process hung.

A GPU also needs deterministic kernels: XLA_FLAGS=--xla_gpu_deterministic_ops=true.
"""

from __future__ import annotations

import datetime
import json
import os
import pathlib
import platform
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags

from benchmarks.fault_checks import (
    Contents,
    Fault,
    catches,
    contents,
    differences,
    finish,
    plan,
    summary,
    told,
    wrong,
)
from experiments import commandline
from tgeo_jax import outcome
from tgeo_jax.data import sources

_ROUNDS = flags.DEFINE_integer("rounds", 50, "How many trainings are disturbed.", lower_bound=1)
_FAULTS = flags.DEFINE_integer("faults", 3, "Most disturbances of one of them.", lower_bound=1)
_EPOCHS = flags.DEFINE_integer("epochs", 20, "Of the training.", lower_bound=1)
_PROCESSES = flags.DEFINE_integer("processes", 1, "Processes of one training.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Of the moments and signals.")
_OUTPUT = flags.DEFINE_string("output", "", "JSON lines that the rounds are added to.")
_WORKDIR = flags.DEFINE_string("workdir", "", "Folder for the runs; empty: one that is removed.")

ROOT = pathlib.Path(__file__).resolve().parent.parent
_PEER_TIMEOUT = 8  # seconds until a dead process is missed
_START_TIMEOUT = 40  # seconds until one that died while starting is missed
_SAVE_SECONDS = 0.1  # a checkpoint of this size takes about as long


def main(argv: Sequence[str]) -> None:
    """Prints a line for each round, and at the end whether all was well."""
    del argv
    # This process only compares: the device is the trainings'.
    jax.config.update("jax_platforms", "cpu")
    folder = pathlib.Path(_WORKDIR.value or tempfile.mkdtemp(prefix="faults_")).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    sources.prepare("digits")
    training = Training(folder, _PROCESSES.value, _EPOCHS.value)
    expected, _ = training.undisturbed("undisturbed")  # compiles; the next one tells how long
    again, length = training.undisturbed("again")  # it takes when programs are loaded
    changed = differences(again, expected)
    if changed:
        print(f"two undisturbed runs differ, so nothing can be compared: {changed[0]}")
        sys.exit(1)
    print(f"undisturbed: {length:.1f} s, {len(expected.arrays)} arrays; {folder}", flush=True)
    rows = []
    for number in range(_ROUNDS.value):
        # A round is the same whatever came before it.
        faults = plan(random.Random(f"{_SEED.value} {number}"), _FAULTS.value, _PROCESSES.value)
        row = {"round": number, "seed": _SEED.value, "processes": _PROCESSES.value}
        rows.append(row | disturbed(training, f"round_{number}", faults, length, expected))
        print(told(rows[-1]), flush=True)
        if _OUTPUT.value:  # at once: a round is not lost with what follows
            _append(pathlib.Path(_OUTPUT.value), rows[-1])
    text, well = summary(rows)
    print(text)
    if well and not _WORKDIR.value:
        shutil.rmtree(folder)
    if not well:
        print(f"What the runs that went wrong left is in {folder}")
        sys.exit(1)


class Training:
    """Commands of one training, and the folder where its runs lie.

    It is TGeo-KD with two seeds, so that teacher, fusion network and both optimisers are there. A
    step takes some milliseconds, and two make a dispatch: a signal often finds an epoch half done.

    Args:
        folder: for runs and compiled programs.
        processes: of one run; they talk over loopback.
        epochs: how long it trains.
    """

    def __init__(self, folder: pathlib.Path, processes: int, epochs: int):
        self.folder, self.processes = folder, processes
        self._environment = {
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),  # starting again is quick
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            **({"JAX_PLATFORMS": "cpu"} if processes > 1 else {}),
            **os.environ,
        }
        teacher = folder / "teacher"
        self._run("digits/teacher", "teacher", "--config.train.epochs=2")
        self._options = (
            "--config=configs/digits/tgeo.py", f"--config.teacher.workdir={teacher}",
            "--config.student.name=mlp", "--config.student.mlp.hidden=(256,256)",
            "--config.seeds=2", f"--config.train.epochs={epochs}",
            "--config.train.steps_per_dispatch=2", "--config.train.checkpoint_every=1",
        )  # fmt: skip

    def start(self, name: str) -> list[subprocess.Popen]:
        """The processes of a run; what they print goes to files beside its folder."""
        several: list[list[str]] = [[]]
        if self.processes > 1:
            shared = [
                f"--coordinator=127.0.0.1:{_free_port()}",
                f"--num_processes={self.processes}",
                f"--peer_timeout={_PEER_TIMEOUT}",
                f"--start_timeout={_START_TIMEOUT}",
            ]
            several = [[*shared, f"--process_id={index}"] for index in range(self.processes)]
        workdir = f"--workdir={self.folder / name}"
        return [
            self._popen(f"{name}.{index}.log", *self._options, workdir, *own)
            for index, own in enumerate(several)
        ]

    def undisturbed(self, name: str) -> tuple[Contents, float]:
        """What a run leaves that nothing happens to, and how many seconds it took."""
        shutil.rmtree(self.folder / name, ignore_errors=True)  # of this command before
        started = time.monotonic()
        statuses = finish(self.start(name))
        seconds = time.monotonic() - started
        self._check(statuses, name)
        return contents(self.folder / name), seconds

    def _run(self, config: str, name: str, *options: str) -> None:
        arguments = (f"--config=configs/{config}.py", f"--workdir={self.folder / name}", *options)
        self._check(finish([self._popen(f"{name}.0.log", *arguments)]), name)

    def _check(self, statuses: list[int | None], name: str) -> None:
        if any(status != 0 for status in statuses):
            print((self.folder / f"{name}.0.log").read_text()[-2000:])
            raise RuntimeError(f"{self.folder / name}: undisturbed, it ended with {statuses}")

    def _popen(self, log: str, *arguments: str) -> subprocess.Popen:
        with (self.folder / log).open("ab") as file:
            return subprocess.Popen(
                [sys.executable, "-m", "experiments.main", *arguments],
                cwd=ROOT, env=self._environment, stdout=file, stderr=subprocess.STDOUT,
            )  # fmt: skip


def disturbed(
    training: Training, name: str, faults: list[Fault], length: float, expected: Contents
) -> dict[str, Any]:
    """One round, as a row; its folder stays only if something went wrong."""
    folder, problems, rows, finished = training.folder / name, list[str](), list[dict](), False
    attempts = 0
    shutil.rmtree(folder, ignore_errors=True)
    for fault in [*faults, None]:
        attempts += 1
        running = training.start(name)
        sent = None if fault is None else disturb(fault, running, folder, length)
        statuses = finish(running)
        if fault is not None and sent is not None:
            problems += wrong(fault, sent["caught"], statuses)
            about = {"signal": fault.signal, "at": fault.at, "victim": fault.victim, **sent}
            rows.append({**about, "statuses": statuses, "resumes_at": _newest(folder)})
        elif any(status != 0 for status in statuses):
            problems.append(f"left alone, attempt {attempts} ended with {statuses}")
        if all(status == 0 for status in statuses):
            finished = True
            break
    changed = differences(contents(folder), expected) if finished else ["it did not finish"]
    if not changed and not problems:
        shutil.rmtree(folder)
        for log in training.folder.glob(f"{name}.*.log"):
            log.unlink()
    return {
        "faults": rows,
        "attempts": attempts,
        "identical": not changed,
        "differences": changed[:5],
        "problems": problems,
    }


def disturb(
    fault: Fault, running: list[subprocess.Popen], folder: pathlib.Path, length: float
) -> dict[str, Any] | None:
    """Sends a fault's signals when its moment has come; None if the run ended before.

    Returns:
        When that was, in seconds, and whether the process had begun to catch SIGTERM: before, it
        has trained nothing that it could save.
    """
    started, victim = time.monotonic(), running[fault.victim]
    before, saves = _half_written(folder), 0
    begun = 0.0 if fault.at == "moment" else None
    while True:
        if any(process.poll() is not None for process in running):
            return None
        seconds = time.monotonic() - started
        if fault.at == "training" and begun is None and catches(victim.pid, signal.SIGTERM):
            begun = seconds
        if begun is not None and seconds >= begun + fault.share * (length - begun):
            break
        now = _half_written(folder)
        saves, before = saves + len(now - before), now
        if fault.at == "save" and saves > int(3 * fault.share):
            time.sleep(3 * fault.share % 1 * _SAVE_SECONDS)
            break
        time.sleep(0.002)
    seconds, caught = time.monotonic() - started, catches(victim.pid, signal.SIGTERM)
    names = fault.signal.split(", ")
    victim.send_signal(getattr(signal, f"SIG{names[0]}"))
    if len(names) > 1:
        time.sleep(fault.grace)
        victim.kill()
    return {"seconds": round(seconds, 3), "caught": caught}


def _half_written(folder: pathlib.Path) -> set[str]:
    try:
        return {name for name in os.listdir(folder / "checkpoints") if not name.isdigit()}
    except FileNotFoundError:
        return set()


def _newest(folder: pathlib.Path) -> int | None:
    steps = [int(path.name) for path in folder.glob("checkpoints/*") if path.name.isdigit()]
    return max(steps, default=None)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _append(path: pathlib.Path, row: dict[str, Any]) -> None:
    about = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "commit": outcome.commit(),
        "date": datetime.date.today().isoformat(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(row | about) + "\n")


if __name__ == "__main__":
    commandline.run(main)
