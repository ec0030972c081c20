"""Starts the processes of one run on this machine, as a launcher would start them on many."""

from __future__ import annotations

import json
import pathlib
import socket
import subprocess
import sys
import time
from typing import Any

from tests.conftest import ROOT, command_environment

SMALL = (
    "-m", "experiments.main", "--config=configs/digits/plain.py", "--config.student.name=mlp",
    "--config.train.epochs=3", "--config.train.steps_per_dispatch=5",
)  # fmt: skip


def on_eight_devices(script: str, path: pathlib.Path) -> Any:
    """What `tests.<module>.<function>(path)` wrote, run where JAX starts with eight devices."""
    module, _, function = script.partition(".")
    code = (
        f"import pathlib, sys; from tests import {module}; "
        f"{module}.{function}(pathlib.Path(sys.argv[1]))"
    )
    environment = {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0",
        # jax 0.10 sizes the pool that collectives wait in by this; too few threads deadlock.
        "NPROC": "32",
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "PATH": "",
    }
    subprocess.run(
        [sys.executable, "-c", code, str(path)], cwd=ROOT, env=environment, check=True, timeout=300
    )
    return json.loads(path.read_text())


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(
    count: int,
    digits_dir: str,
    *arguments: str,
    devices: int = 1,
    only: range | None = None,
    **variables: str,
) -> list[subprocess.Popen]:
    """`count` processes of `devices` simulated devices each; `only` leaves some of them out."""
    environment = command_environment(
        digits_dir,
        XLA_FLAGS=f"--xla_force_host_platform_device_count={devices} "
        "--xla_backend_optimization_level=0",
        NPROC="32",  # see on_eight_devices
        **variables,
    )
    address = f"127.0.0.1:{free_port()}"
    return [
        subprocess.Popen(
            [
                sys.executable, *arguments, f"--coordinator={address}",
                f"--num_processes={count}", f"--process_id={index}", "--peer_timeout=8",
            ],
            cwd=ROOT, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for index in only or range(count)
    ]  # fmt: skip


def finish(processes: list[subprocess.Popen], timeout: float = 240) -> list[tuple[int, str]]:
    """Exit code and everything printed, of each."""
    deadline, found = time.monotonic() + timeout, []
    try:
        for process in processes:
            out, error = process.communicate(timeout=max(1.0, deadline - time.monotonic()))
            found.append((process.returncode, out + error))
    finally:
        for process in processes:
            process.kill()
    return found


def wait_for(
    path: pathlib.Path, text: str, running: list[subprocess.Popen], timeout: float = 120
) -> None:
    """Until a file holds some text."""
    deadline = time.monotonic() + timeout
    while not (path.exists() and text in path.read_text()):
        assert all(process.poll() is None for process in running), finish(running)
        assert time.monotonic() < deadline, f"{path} never held {text!r}"
        time.sleep(0.05)
