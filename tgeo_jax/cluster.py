"""How the processes of a run find each other; a single host needs nothing of this.

Every process of a run calls `start` before JAX touches a device:
  explicit      --coordinator, --num_processes, --process_id, or the variables of `_VARIABLES`
                (Kubernetes: JobSet and indexed jobs set JOB_COMPLETION_INDEX themselves)
  Open MPI      inside `mpirun` with more than one process, also where Slurm gave the hosts
  Slurm         inside `srun` with more than one task
  Cloud TPU     on a TPU VM; JAX asks the metadata server for the slice
"""

from __future__ import annotations

import os
import pathlib
import re
import zlib
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
# Where --coordinator is given and these are not, the launcher still knows them. A job of Slurm
# that calls mpirun has Slurm's variables too, and they speak of the job.
_LAUNCHERS = {
    "num_processes": ("OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"),
    "process_id": ("OMPI_COMM_WORLD_RANK", "SLURM_PROCID"),
}
# Above those that Linux gives to clients; JAX takes the ports of launchers from here too.
_FIRST_PORT, _PORTS = 61440, 4096
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
    place = explicit(given, environment) or launched(environment)
    if place is None and launcher(environment) is None:
        return False
    arguments: dict[str, Any] = {"local_device_ids": local_devices(environment)}
    if place is not None:
        if place.num_processes == 1:
            return False
        roll_call.hold(*place, start_timeout)
        arguments |= {**place._asdict(), "cluster_detection_method": "deactivate"}
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


def launched(environment: Mapping[str, str]) -> Place | None:
    """The place of a process that Slurm started, or Open MPI with all others on its host.

    The coordinator is on the first host, or on the only one. Its port follows from the job and its
    step, so that steps that train side by side do not meet; JAX_COORDINATOR_PORT chooses another.
    None where JAX has to ask: Open MPI over several hosts, Cloud TPU.

    Examples:
        >>> launched({"SLURM_JOB_ID": "8", "SLURM_STEP_ID": "1", "SLURM_STEP_NUM_TASKS": "2",
        ...     "SLURM_PROCID": "1", "SLURM_STEP_NODELIST": "rack[2,4]n[07-10],login"})
        Place(coordinator='rack2n07:61957', num_processes=2, process_id=1)
        >>> launched({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
        ...     "OMPI_COMM_WORLD_RANK": "1", "PMIX_NAMESPACE": "prterun-n1-9946@1"})
        Place(coordinator='127.0.0.1:63930', num_processes=2, process_id=1)
    """
    found = launcher(environment)
    if found == "Slurm":
        # 509 jobs later, a first step has the port of this one's second.
        key = _int(environment, "SLURM_JOB_ID") + 509 * _int(environment, "SLURM_STEP_ID")
        host = re.sub(r"\[(\w+)[^]]*]", r"\1", environment["SLURM_STEP_NODELIST"]).split(",")[0]
        count, index = (_int(environment, f"SLURM_{name}") for name in ("STEP_NUM_TASKS", "PROCID"))
    elif found == "Open MPI" and "PMIX_NAMESPACE" in environment:
        count, local, index = (
            _int(environment, f"OMPI_COMM_WORLD_{name}") for name in ("SIZE", "LOCAL_SIZE", "RANK")
        )
        if local != count:
            return None
        key, host = zlib.crc32(environment["PMIX_NAMESPACE"].encode()), "127.0.0.1"
    else:
        return None
    port = _int(environment, "JAX_COORDINATOR_PORT") or _FIRST_PORT + key % _PORTS
    return Place(f"{host}:{port}", count, index)


def local_devices(environment: Mapping[str, str]) -> list[int] | None:
    """Which devices are this process's, where a launcher started several on its host.

    The one of its rank there, as JAX would say; but where the launcher shows each process a GPU of
    its own (Slurm's --gpus-per-task=1), that one. None leaves it to JAX.

    Examples:
        >>> local_devices({"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_STEP_NUM_TASKS": "16",
        ...     "SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_LOCALID": "3"})
        [3]
    """
    if environment.get("JAX_LOCAL_DEVICE_IDS"):  # JAX reads it
        return None
    found = launcher(environment)
    each_host = re.sub(r"\(x\d+\)", "", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    if found == "Open MPI" and _int(environment, "OMPI_COMM_WORLD_LOCAL_SIZE") > 1:
        rank = "OMPI_COMM_WORLD_LOCAL_RANK"
    elif found == "Slurm" and set(each_host.split(",")) - {"1", ""}:
        rank = "SLURM_LOCALID"
    else:
        return None
    seen = environment.get("CUDA_VISIBLE_DEVICES", "")
    return [0] if seen and "," not in seen else [_int(environment, rank)]


def launcher(environment: Mapping[str, str]) -> str | None:
    """What started this process with others, as far as it or JAX can say where they are.

    Examples:
        >>> launcher({"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_STEP_NUM_TASKS": "2"})
        'Slurm'
        >>> launcher({"SLURM_NTASKS": "2"}) is None  # a batch script that did not use srun
        True
    """
    if _int(environment, "OMPI_COMM_WORLD_SIZE") > 1:
        return "Open MPI"
    # Not SLURM_NTASKS: in salloc's interactive step that is the allocation's.
    if "SLURM_STEP_NODELIST" in environment and _int(environment, "SLURM_STEP_NUM_TASKS") > 1:
        return "Slurm"
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
