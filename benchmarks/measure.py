"""Timing side by side, what a compiled program costs, and what the machine can do at best."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_SAMPLE_SECONDS = 0.05  # a shorter call is repeated within one sample


class Ratio(NamedTuple):
    """How one time compares with another: median and quartiles over rounds."""

    median: float
    low: float
    high: float


class Times(NamedTuple):
    """Seconds of one call in each round; rounds of all cases belong together."""

    seconds: np.ndarray

    @property
    def milliseconds(self) -> float:
        """The median."""
        return 1e3 * float(np.median(self.seconds))

    def over(self, other: Times) -> Ratio:
        """This time in units of another's, round by round.

        Examples:
            >>> Times(np.array([2.0, 4.0, 9.0])).over(Times(np.array([1.0, 2.0, 3.0]))).median
            2.0
        """
        ratios = self.seconds / other.seconds
        low, median, high = np.percentile(ratios, (25, 50, 75))
        return Ratio(float(median), float(low), float(high))


class Costs(NamedTuple):
    """What the compiler says of a program: FLOPs, bytes moved, bytes of working space."""

    flops: float
    bytes: float
    temporary: float


def side_by_side(
    cases: Mapping[str, Callable[[], Any]],
    rounds: int,
    calls: Mapping[str, int] | None = None,
) -> dict[str, Times]:
    """Times several functions in turn, so that a slow minute of the machine hits all of them.

    Args:
        cases: functions that return what has to be waited for.
        rounds: how many times in turn, after one call of each that is not counted.
        calls: units of work in one call of each; 1 if not given.

    Returns:
        Seconds for one unit of work.
    """
    repeats = {}
    for name, run in cases.items():
        jax.block_until_ready(run())
        repeats[name] = max(1, round(_SAMPLE_SECONDS / max(_once(run, 1), 1e-6)))
    found: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(rounds):
        names = list(cases)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            units = (calls or {}).get(name, 1)
            found[name].append(_once(cases[name], repeats[name]) / units)
    return {name: Times(np.asarray(seconds)) for name, seconds in found.items()}


def _once(run: Callable[[], Any], repeats: int) -> float:
    started = time.perf_counter()
    for _ in range(repeats):
        jax.block_until_ready(run())
    return (time.perf_counter() - started) / repeats


def costs(program: jax.stages.Compiled) -> Costs:
    """Of a program without loops: the compiler counts the body of a loop once.

    Examples:
        >>> product = jax.jit(jnp.dot).lower(jnp.ones((8, 4)), jnp.ones((4, 2))).compile()
        >>> costs(product).flops  # 2 * 8 * 4 * 2
        128.0
    """
    found, memory = program.cost_analysis() or {}, program.memory_analysis()
    temporary = 0 if memory is None else memory.temp_size_in_bytes
    flops, moved = found.get("flops", 0.0), found.get("bytes accessed", 0.0)
    return Costs(float(flops), float(moved), float(temporary))


class Peak(NamedTuple):
    """What this machine did at best in this run."""

    flops_per_second: float  # float32 matrix product
    bfloat16_flops_per_second: float
    bytes_per_second: float  # a copy: read and written


def peak(size: int = 2048, rounds: int = 7) -> Peak:
    """Times a matrix product and a copy.

    Args:
        size: of the square matrices; the copied array has 16 times as many numbers.
        rounds: the best counts.
    """
    a = jax.random.normal(jax.random.key(0), (size, size))
    half, large = a.astype(jnp.bfloat16), jnp.zeros((16, size, size))
    product, shift = jax.jit(jnp.matmul), jax.jit(lambda x: x + 1.0)
    cases = {
        "product": lambda: product(a, a),
        "bfloat16": lambda: product(half, half),
        "copy": lambda: shift(large),
    }
    times = side_by_side(cases, rounds)
    best = {name: float(found.seconds.min()) for name, found in times.items()}
    flops = 2.0 * size**3
    return Peak(flops / best["product"], flops / best["bfloat16"], 2 * large.nbytes / best["copy"])


def median_of(values: Sequence[float]) -> float:
    """Examples:
    >>> median_of([3.0, 1.0, 2.0])
    2.0
    """
    return float(np.median(np.asarray(values)))
