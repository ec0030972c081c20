"""How the soft rank grows with batch and classes, beside a sort, in one run.

python -m benchmarks.soft_rank
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from absl import app, flags

from tgeo_jax import ranking

_LARGEST = flags.DEFINE_integer("largest", 21_000, "Most classes.", lower_bound=2)
_REPEATS = flags.DEFINE_integer("repeats", 9, "Runs of each; the median counts.", lower_bound=1)
_BATCH = 16
_CLASSES = (10, 100, 1_000, 21_000)


def main(argv: Sequence[str]) -> None:
    del argv
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, float32, strength 3/n, medians")
    print(f"{'n':>6} {'batch':>6} {'rank ms':>9} {'and gradient':>13} {'x sort':>7} {'2B/B':>6}")
    for n in [n for n in _CLASSES if n <= _LARGEST.value]:
        sort, rank = jax.jit(jnp.sort), jax.jit(functools.partial(_rank, n=n))
        gradient = jax.jit(jax.grad(lambda values, r=rank: jnp.sum(jnp.square(r(values)))))
        single, double = (
            jax.random.normal(jax.random.key(0), (batch, n)) for batch in (_BATCH, 2 * _BATCH)
        )
        forward, both = _milliseconds(rank, single), _milliseconds(gradient, single)
        print(
            f"{n:6d} {_BATCH:6d} {forward:9.3f} {both:13.3f} "
            f"{forward / _milliseconds(sort, single):7.1f} "
            f"{_milliseconds(rank, double) / forward:6.2f}"
        )


def _rank(values: jax.Array, n: int) -> jax.Array:
    return ranking.soft_rank(values, strength=3 / n)


def _milliseconds(function: Callable, values: jax.Array) -> float:
    jax.block_until_ready(function(values))
    times = []
    for _ in range(_REPEATS.value):
        started = time.perf_counter()
        jax.block_until_ready(function(values))
        times.append(time.perf_counter() - started)
    return 1e3 * statistics.median(times)


if __name__ == "__main__":
    app.run(main)
