"""What a compiled program needs of a device's memory, known before it runs for the first time."""

from __future__ import annotations

import pathlib
from typing import NamedTuple

import jax

from tgeo_jax import simulated
from tgeo_jax.errors import ConfigError

_MEGABYTE = 1e6


class Needed(NamedTuple):
    """Bytes on each device."""

    arguments: int  # the state, the data and the frozen networks; there already
    working: int  # activations and gradients, results that do not replace arguments, the code

    @property
    def total(self) -> int:
        """Bytes while the program runs."""
        return self.arguments + self.working


def needed(compiled: jax.stages.Compiled) -> Needed:
    """What a program needs, as its compiler planned it.

    Args:
        compiled: any; donated arguments count once.

    Examples:
        >>> add = jax.jit(lambda x: x + 1.0, donate_argnums=0)
        >>> needed(add.lower(jax.numpy.zeros(1000)).compile()).arguments
        4000
    """
    found = compiled.memory_analysis()
    if found is None:  # a backend that does not say
        return Needed(0, 0)
    outputs = found.output_size_in_bytes - found.alias_size_in_bytes
    code = found.generated_code_size_in_bytes
    return Needed(found.argument_size_in_bytes, found.temp_size_in_bytes + outputs + code)


def free(device: jax.Device) -> int | None:
    """Bytes that can still be allocated on a device, None where nobody says.

    Examples:
        >>> free(jax.devices("cpu")[0]) > 0
        True
    """
    if simulated.are_accelerators():
        return None
    if device.platform == "cpu":
        return _free_of_host()
    found = device.memory_stats()
    if not found or "bytes_limit" not in found:
        return None
    return found["bytes_limit"] - found["bytes_in_use"]


def check(wanted: Needed, available: int | None) -> None:
    """Checks that a program fits beside what its device already holds.

    Args:
        wanted: by the program.
        available: see `free`.

    Raises:
        ConfigError: it does not, with both figures and the fields that make it smaller.

    Examples:
        >>> check(Needed(10, 20), 19)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        tgeo_jax.errors.ConfigError: data.batch_size: a step needs 0.00 MB of working space ...
    """
    if available is None or wanted.working <= available:
        return
    raise ConfigError(
        f"data.batch_size: a step needs {_mb(wanted.working)} of working space on each device, "
        f"beside {_mb(wanted.arguments)} for state and data, and {_mb(available)} are free; lower "
        "data.batch_size or meta.batch_size, set remat=True or precision='bfloat16', train fewer "
        "seeds at once, or use more devices"
    )


def told(wanted: Needed, available: int | None) -> str:
    """One line for a person.

    Examples:
        >>> told(Needed(3_000_000, 5_000_000), 9_000_000)
        'memory of each device: 3 MB for state and data, 5 MB of working space; 9 MB are free'
    """
    end = "" if available is None else f"; {_mb(available)} are free"
    return (
        f"memory of each device: {_mb(wanted.arguments)} for state and data, "
        f"{_mb(wanted.working)} of working space{end}"
    )


def _mb(count: int) -> str:
    """Examples:
    >>> _mb(0), _mb(62_000), _mb(3_000_000), _mb(22_603_000_000)
    ('0 MB', '0.06 MB', '3 MB', '22,603 MB')
    """
    digits = 0 if not count or count >= _MEGABYTE else 2
    return f"{count / _MEGABYTE:,.{digits}f} MB"


def _free_of_host() -> int | None:
    """What Linux could still give to a process, within the limit of its container."""
    known = []
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            known.append(1024 * int(line.split()[1]))
    limit, used = _read("/sys/fs/cgroup/memory.max"), _read("/sys/fs/cgroup/memory.current")
    if limit.isdigit() and used.isdigit():
        # Files in the page cache count as used, though they would make room.
        known.append(int(limit) - int(used) + _reclaimable())
    return min(known, default=None)


def _reclaimable() -> int:
    for line in _read("/sys/fs/cgroup/memory.stat").splitlines():
        name, _, count = line.partition(" ")
        if name == "file":
            return int(count)
    return 0


def _read(path: str) -> str:
    try:
        return pathlib.Path(path).read_text().strip()
    except OSError:
        return ""
