"""The kinds of devices that a dry run knows, by their makers' figures."""

from __future__ import annotations

from typing import NamedTuple

from tgeo_jax.errors import ConfigError, nearest


class Kind(NamedTuple):
    """A kind of device, as its maker describes it.

    Attributes:
        name: what people call it.
        bfloat16: FLOPs per second of matrix products.
        float32: likewise at JAX's default precision: TPUs multiply bfloat16, GPUs TF32.
        memory: bytes.
        share: of the memory that JAX takes by default.
        bandwidth: of the memory, bytes per second.
        links: bytes per second that a device can send to its neighbours.
    """

    name: str
    bfloat16: float
    float32: float
    memory: float
    share: float
    bandwidth: float
    links: float

    @property
    def usable(self) -> float:
        """Bytes of memory for a run."""
        return self.memory * self.share


# cloud.google.com/tpu/docs (v5e, v5p, v6e): peak, HBM and inter-chip interconnect of one chip, the
# last in bits and one direction. NVIDIA's data sheets of the H100 SXM and the H200 SXM: dense
# products (the sheets' figures are with sparsity, twice as much), and NVLink's 900 GB/s are both
# directions. JAX takes 75 % of a GPU unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
KINDS = {
    kind.name: kind
    for kind in (
        Kind("v5e", 197e12, 197e12, 16e9, 1.0, 819e9, 1600e9 / 8),
        Kind("v5p", 459e12, 459e12, 95e9, 1.0, 2765e9, 4800e9 / 8),
        Kind("v6e", 918e12, 918e12, 32e9, 1.0, 1640e9, 3584e9 / 8),
        Kind("H100", 989e12, 494.5e12, 80e9, 0.75, 3350e9, 900e9 / 2),
        Kind("H200", 989e12, 494.5e12, 141e9, 0.75, 4800e9, 900e9 / 2),
    )
}


def named(name: str) -> list[Kind]:
    """The kinds that a user asks for.

    Args:
        name: of one; empty: all.

    Raises:
        ConfigError: there is no such kind.

    Examples:
        >>> [kind.name for kind in named("")]
        ['v5e', 'v5p', 'v6e', 'H100', 'H200']
        >>> named("h100")[0].usable / 1e9
        60.0
    """
    if not name:
        return list(KINDS.values())
    known = {known.lower(): kind for known, kind in KINDS.items()}
    if name.lower() not in known:
        raise ConfigError(f"--device_kind={name!r}: unknown device{nearest(name, KINDS)}")
    return [known[name.lower()]]
