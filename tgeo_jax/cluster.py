"""How the processes of a run find each other; a single host needs nothing of this.

Every process of a run calls `start` before JAX touches a device:
  explicit      --coordinator, --num_processes, --process_id, or the variables of `_VARIABLES`
                (Kubernetes: JobSet and indexed jobs set JOB_COMPLETION_INDEX themselves)
  Slurm         inside `srun` with more than one task
  Open MPI      inside `mpirun` with more than one process
  Cloud TPU     on a TPU VM; JAX asks the metadata server for the slice
"""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from tgeo_jax import roll_call
from tgeo_jax.errors import ConfigError

_VARIABLES = {
    "coordinator": ("JAX_COORDINATOR_ADDRESS",),
    "num_processes": ("JAX_NUM_PROCESSES",),
    "process_id": ("JAX_PROCESS_ID", "JOB_COMPLETION_INDEX"),
}
# Where --coordinator is given and these are not, the launcher still knows them.
_LAUNCHERS = {
    "num_processes": ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"),
    "process_id": ("SLURM_PROCID", "OMPI_COMM_WORLD_RANK"),
}
_TPU_DEVICES = ("/dev/accel0", "/dev/vfio/0")


class Place(NamedTuple):
    """Where this process stands in a run whose launcher says nothing.

    Attributes:
        coordinator: host:port of process 0, which must be free there.
        num_processes: of the run.
        process_id: of this one, from 0.
    """

    coordinator: str
    num_processes: int
    process_id: int


def start(
    given: Mapping[str, Any],
    *,
    start_timeout: int = 300,
    peer_timeout: int = 60,
    environment: Mapping[str, str] | None = None,
) -> bool:
    """Joins this process to the others of its run.

    Args:
        given: `coordinator`, `num_processes`, `process_id` as a user gave them; None or "" is
            looked for in the environment.
        start_timeout: seconds to wait for the other processes.
        peer_timeout: seconds of silence after which a process counts as dead.
        environment: os.environ by default.

    Returns:
        Whether there are others.

    Raises:
        ConfigError: some of the three are missing or make no sense, or not all processes came.
    """
    environment = os.environ if environment is None else environment
    place = explicit(given, environment)
    if place is None and launcher(environment) is None:
        return False
    arguments: dict[str, Any] = {}
    if place is not None:
        if place.num_processes == 1:
            return False
        roll_call.hold(*place, start_timeout)
        arguments = {**place._asdict(), "cluster_detection_method": "deactivate"}
        arguments["coordinator_address"] = arguments.pop("coordinator")
    try:
        jax.distributed.initialize(
            **arguments,
            initialization_timeout=start_timeout,
            # Later than our own watch, which names who is gone without a stack of C++ frames.
            heartbeat_timeout_seconds=2 * peer_timeout + 30,
            shutdown_timeout_seconds=peer_timeout,
        )
    except Exception as error:  # whatever gRPC, the launcher's variables or JAX say
        if place is None and "should be defined" in str(error):
            return _alone(environment)
        raise ConfigError(
            f"the processes of this run did not find each other ({error}); --start_timeout="
            f"{start_timeout} is how many seconds they wait"
        ) from error
    return jax.process_count() > 1


def explicit(given: Mapping[str, Any], environment: Mapping[str, str]) -> Place | None:
    """What flags and variables say; None if they say nothing.

    Raises:
        ConfigError: they say only a part, or what cannot be.

    Examples:
        >>> explicit({}, {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2",
        ...     "JOB_COMPLETION_INDEX": "1"})
        Place(coordinator='a:1', num_processes=2, process_id=1)
        >>> explicit({}, {"JOB_COMPLETION_INDEX": "0"}) is None  # any indexed job has one
        True
    """
    found = {name: _value(name, given, environment) for name in _VARIABLES}
    unsaid = found["coordinator"] is None and found["num_processes"] is None
    if unsaid and given.get("process_id") is None:
        return None
    for name, variables in _LAUNCHERS.items():
        if found[name] is None:
            found[name] = next((environment[v] for v in variables if environment.get(v)), None)
    for name, value in found.items():
        if value is None:
            raise ConfigError(
                f"--{name}: missing; a run of several processes needs --coordinator=HOST:PORT, "
                f"--num_processes and --process_id, or {', '.join(_VARIABLES[name])} set"
            )
    coordinator = str(found["coordinator"])
    if not re.fullmatch(r".+:\d+", coordinator):
        raise ConfigError(f"--coordinator={coordinator!r}: must be HOST:PORT of process 0")
    count, index = (_whole(name, found[name]) for name in ("num_processes", "process_id"))
    if count < 1:
        raise ConfigError(f"--num_processes={count}: must be at least 1")
    if not 0 <= index < count:
        raise ConfigError(f"--process_id={index}: must be 0 to {count - 1} (--num_processes - 1)")
    return Place(coordinator, count, index)


def launcher(environment: Mapping[str, str]) -> str | None:
    """What started this process with others, as far as JAX can ask it where they are.

    Examples:
        >>> launcher({"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "2"})
        'Slurm'
        >>> launcher({"SLURM_NTASKS": "2"}) is None  # a batch script that did not use srun
        True
    """
    if "SLURM_STEP_NODELIST" in environment and _int(environment, "SLURM_NTASKS") > 1:
        return "Slurm"
    if _int(environment, "OMPI_COMM_WORLD_SIZE") > 1:
        return "Open MPI"
    elsewhere = environment.get("JAX_PLATFORMS", "").split(",")[0] in ("cpu", "cuda", "gpu")
    if not elsewhere and any(pathlib.Path(path).exists() for path in _TPU_DEVICES):
        return "Cloud TPU"
    return None


def _alone(environment: Mapping[str, str]) -> bool:
    """Where a launcher is there, but JAX cannot ask it: alone on a TPU host, lost elsewhere."""
    found = launcher(environment)
    if found == "Cloud TPU":  # without a metadata server: a host by itself
        return False
    raise ConfigError(
        f"--coordinator: missing; JAX cannot ask this {found} where the processes are: give "
        "HOST:PORT of process 0, the rest is known"
    )


def _int(environment: Mapping[str, str], name: str) -> int:
    value = environment.get(name, "")
    return int(value) if value.isdigit() else 0


def _value(name: str, given: Mapping[str, Any], environment: Mapping[str, str]) -> Any:
    if given.get(name) not in (None, ""):
        return given[name]
    return next((environment[v] for v in _VARIABLES[name] if environment.get(v)), None)


def _whole(name: str, value: Any) -> int:
    try:
        return int(value)
    except ValueError as error:
        raise ConfigError(f"--{name}={value!r}: must be a whole number") from error
