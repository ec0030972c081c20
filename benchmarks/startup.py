"""Part 6: compilation with and without the persistent cache; from the command to the first step.

python -m benchmarks.startup resnet20   # seconds to trace and to compile a bilevel step
"""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping

import numpy as np

from benchmarks.measure import median_of
from benchmarks.table import Row

PART = "start-up"
_ROOT = pathlib.Path(__file__).resolve().parent.parent


def rows(names: tuple[str, ...], rounds: int) -> Iterator[Row]:
    """Compile time of a bilevel step, and start-up of the command, cold and warm.

    Args:
        names: of `SUBJECTS`.
        rounds: how often each is started with a warm cache.
    """
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            yield from _compilation(name, f"{folder}/{name}", rounds)
        yield from _command(folder, rounds)


def _compilation(name: str, cache: str, rounds: int) -> Iterator[Row]:
    cold = _child(name, {"JAX_COMPILATION_CACHE_DIR": cache})
    warm = [_child(name, {"JAX_COMPILATION_CACHE_DIR": cache}) for _ in range(rounds)]
    yield _row(f"{name}, bilevel step: trace and compile, warm cache", "cold cache", warm, cold)


def _child(name: str, environment: Mapping[str, str]) -> float:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.startup", name],
        env=_environment(environment),
        cwd=_ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout.splitlines()[-1])


def _environment(extra: Mapping[str, str]) -> dict[str, str]:
    return {**os.environ, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", **extra}


def _command(folder: str, rounds: int) -> Iterator[Row]:
    """`experiments.main` on the digits, until its progress bar shows the first step."""
    data = f"{folder}/data"
    environment = _environment(
        {"TFDS_DATA_DIR": data, "JAX_COMPILATION_CACHE_DIR": f"{folder}/compiled"}
    )
    prepare = [sys.executable, "-m", "experiments.prepare", "--dataset=digits"]
    subprocess.run(prepare, env=environment, cwd=_ROOT, capture_output=True, check=True)
    cold = _first_step(f"{folder}/cold", environment)
    warm = [_first_step(f"{folder}/warm{i}", environment) for i in range(rounds)]
    case = "experiments.main, digits, cnn: to the first step, warm cache"
    yield _row(case, "cold cache", warm, cold, expected="< 10 s")


def _first_step(workdir: str, environment: Mapping[str, str]) -> float:
    started = time.perf_counter()
    running = subprocess.Popen(
        [
            sys.executable, "-m", "experiments.main", "--config=configs/digits/plain.py",
            f"--workdir={workdir}", "--config.train.steps_per_dispatch=1",
        ],
        env=dict(environment), cwd=_ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    assert running.stderr is not None
    seen = b""
    try:
        while chunk := os.read(running.stderr.fileno(), 4096):
            seen += chunk
            # The bar moves from 0/N when the first dispatch is under way.
            shown = [part for part in seen.replace(b"\n", b"\r").split(b"\r") if b"step/s" in part]
            if any(b"| 0/" not in part for part in shown):
                return time.perf_counter() - started
    finally:
        running.kill()
        running.wait()
    raise RuntimeError(f"experiments.main never took a step: {seen.decode()}")


def _row(case: str, against: str, seconds: list[float], cold: float, expected: str = "") -> Row:
    low, median, high = np.percentile(np.asarray(seconds) / cold, (25, 50, 75))
    return Row(
        PART,
        case,
        against,
        ratio=float(median),
        low=float(low),
        high=float(high),
        milliseconds=1e3 * median_of(seconds),
        against_milliseconds=1e3 * cold,
        expected=expected,
        note=f"cold {cold:.2f} s",
    )


def main() -> None:
    """Times one compilation in this process and prints it."""
    from benchmarks.subjects import SUBJECTS, Training, method

    name = sys.argv[1]
    training = Training(name, method(SUBJECTS[name]), 64)
    started = time.perf_counter()
    training.dispatcher.program(training.state, training.teacher, training.data, 1, 0)
    print(time.perf_counter() - started)


if __name__ == "__main__":
    main()
