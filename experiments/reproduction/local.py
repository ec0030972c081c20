"""Trains the runs of a table on this machine, a worker for each of its devices.

Every run is a process of its own, the command that the plan shows. One that fails is started again,
then reported; the others go on. One that stopped with 75 (it saved and wants to be started again)
resumes.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
import pathlib
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping

from experiments.reproduction.runs import DONE, MISSING, Run
from tgeo_jax import interruption, peers
from tgeo_jax.errors import Interrupted

_USER_ERROR = 2  # of the commands: the same command again would say the same
_RESTARTS = 100  # of a run that saved before it stopped
_TAIL = 15  # lines of a failed run's output


@dataclasses.dataclass(frozen=True)
class Failure:
    """A run that could not be trained.

    Attributes:
        run: its name.
        why: for a person, one line.
        log: where its output is; None where it was not started.
    """

    run: str
    why: str
    log: pathlib.Path | None = None


def devices(environment: Mapping[str, str]) -> list[dict[str, str]]:
    """What to add to the environment of each worker, so that it sees one device only.

    Args:
        environment: of this process.

    Returns:
        One mapping for each NVIDIA GPU that this process may use, or TPU chip of this host; a
        single empty one where there are none, or where JAX_PLATFORMS says cpu.
    """
    platform = environment.get("JAX_PLATFORMS", "").split(",")[0]
    if platform == "cpu":
        return [{}]
    seen = environment.get("CUDA_VISIBLE_DEVICES")
    gpus = seen.split(",") if seen else _gpus()
    if gpus:
        return [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus]
    chips = sorted(pathlib.Path("/dev").glob("accel[0-9]*"))
    alone = {"TPU_CHIPS_PER_PROCESS_BOUNDS": "1,1,1", "TPU_PROCESS_BOUNDS": "1,1,1"}
    return [{"TPU_VISIBLE_CHIPS": str(index), **alone} for index in range(len(chips))] or [{}]


def _gpus() -> list[str]:
    try:
        listed = subprocess.run(
            ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return []
    return listed.stdout.split()


def train(
    runs: Mapping[str, Run],
    logs: pathlib.Path,
    *,
    workers: list[dict[str, str]],
    retries: int = 1,
    tell: Callable[[str], None] | None = None,
) -> list[Failure]:
    """Trains all that is not finished, teachers before their students.

    Args:
        runs: by name.
        logs: folder for what the runs print.
        workers: from `devices`; as many runs go on at the same time.
        retries: how often a run that failed is started again.
        tell: is given a line whenever a run begins or ends; None prints it.

    Returns:
        The runs that failed or could not begin.

    Raises:
        Interrupted: this process was told to stop; all runs have saved and stopped.
    """
    tell = tell or _print
    free: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
    for worker in workers:
        free.put(worker)
    left = {name: run for name, run in runs.items() if run.status()[0] != DONE}
    failures = {
        name: Failure(name, run.missing) for name, run in left.items() if run.status()[0] == MISSING
    }
    begun: dict[concurrent.futures.Future[Failure | None], str] = {}
    stopping = interruption.Interruption()
    pool = concurrent.futures.ThreadPoolExecutor(len(workers))
    total = len(runs)
    try:
        while True:
            for name, run in left.items():
                if name in failures or name in begun.values() or stopping.reached():
                    continue
                if run.needs in failures:
                    failures[name] = Failure(name, f"{run.needs} could not be trained")
                elif run.needs not in left:
                    begun[pool.submit(_one, run, logs, free, retries, stopping, tell)] = name
            if not begun:
                break
            ended, _ = concurrent.futures.wait(
                begun, return_when=concurrent.futures.FIRST_COMPLETED
            )
            for future in ended:
                name, failure = begun.pop(future), future.result()
                if failure is None:
                    del left[name]
                    tell(f"{name}: done ({total - len(left)} of {total})")
                elif stopping.reached():
                    failures[name] = failure
                    tell(f"{name}: {failure.why}")
                else:
                    failures[name] = failure
                    tell(f"{name}: FAILED: {failure.why}")
    finally:
        pool.shutdown()
        stopping.close()
    if stopping.reached():
        raise Interrupted(
            "Stopped; every run has saved. The same command goes on.", stopping.signal
        )
    return list(failures.values())


def _print(line: str) -> None:
    print(f"{line}\n", end="", flush=True)  # threads would mix a line and its end


def _one(
    run: Run,
    logs: pathlib.Path,
    free: queue.SimpleQueue[dict[str, str]],
    retries: int,
    stopping: interruption.Interruption,
    tell: Callable[[str], None],
) -> Failure | None:
    """Trains one run to its end on the next free device."""
    worker = free.get()
    log = logs / f"{run.name.replace('/', '-')}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    failed = restarted = 0
    try:
        while not stopping.reached():
            tell(f"{run.name}: begins")
            status = _call(run, log, worker, stopping)
            if status == 0:
                return None
            if stopping.reached():
                break
            if status == peers.RESTART and restarted < _RESTARTS:
                restarted += 1
                continue
            failed += 1
            if status == _USER_ERROR or failed > retries:
                return Failure(run.name, _told(log, status), log)
            tell(f"{run.name}: ended with status {status}; again ({failed} of {retries})")
        return Failure(run.name, "stopped before its end", log)
    finally:
        free.put(worker)


def _call(
    run: Run, log: pathlib.Path, worker: dict[str, str], stopping: interruption.Interruption
) -> int:
    """The exit status of the run's command, whose output goes to the log."""
    with log.open("ab") as output:
        output.write(f"$ {' '.join(run.command)}\n".encode())
        output.flush()
        # In a group of its own: Ctrl-C in a terminal reaches it once, from here.
        process = subprocess.Popen(
            [sys.executable, *run.command[1:]],
            env={**os.environ, **worker},
            stdout=output,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
        told = False
        while (status := process.poll()) is None:
            if stopping.reached() and not told:
                process.send_signal(signal.SIGTERM)
                told = True
            time.sleep(0.05)
        return status


def _told(log: pathlib.Path, status: int) -> str:
    """The last thing that a failed run said, and where to read the rest."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()[-_TAIL:]]
    said = next((line for line in reversed(lines) if line.startswith("error: ")), "")
    said = said or next((line for line in reversed(lines) if line), "it said nothing")
    signalled = f"signal {-status}" if status < 0 else f"status {status}"
    return f"{said} ({signalled}; all of it is in {log})"
