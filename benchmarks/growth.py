"""Part 7: how cost grows with classes, and with simulated devices and what they say to each other.

python -m benchmarks.growth     # prints the collectives of a step, one JSON line a mesh
"""

from __future__ import annotations

import functools
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measure
from benchmarks.subjects import SUBJECTS, data, method, teacher
from benchmarks.table import Row
from tgeo_jax import collectives, distill, losses, parallel, ranking
from tgeo_jax.dispatch import Dispatcher, Resident

CLASSES, DEVICES = "classes", "devices"
_LOSS_BATCH, _RANK_BATCH = 64, 16


def class_rows(
    counts: tuple[int, ...], rank_counts: tuple[int, ...], rounds: int, peak: measure.Peak
) -> Iterator[Row]:
    """Each loss with its gradient, and the soft rank, as the number of classes grows.

    Args:
        counts: of classes, for the losses.
        rank_counts: of numbers to rank.
        rounds: of timing.
        peak: of this machine.
    """
    for name in ("cross_entropy", *losses.SOFT_LOSSES):
        function = _gradient_of(name)
        yield from _grown(CLASSES, name, function, _LOSS_BATCH, counts, rounds, peak)
    yield from _grown(
        CLASSES, "soft_rank", _gradient_of_rank, _RANK_BATCH, rank_counts, rounds, peak
    )


def _gradient_of(name: str) -> Callable:
    def total(student: Any, taught: Any, labels: Any) -> Any:
        if name == "cross_entropy":
            return jnp.sum(losses.cross_entropy(student, labels))
        return jnp.sum(losses.soft_loss(name)(student, taught, labels))

    return jax.grad(total)


def _gradient_of_rank(student: Any, taught: Any, labels: Any) -> Any:
    del labels
    rank = functools.partial(ranking.soft_rank, strength=3 / student.shape[-1])
    return jax.grad(lambda values: jnp.sum(rank(values) * taught))(student)


def _grown(
    part: str,
    name: str,
    function: Callable,
    batch: int,
    counts: tuple[int, ...],
    rounds: int,
    peak: measure.Peak,
) -> Iterator[Row]:
    cases: dict[str, Callable[[], Any]] = {}
    programs = {}
    for count in counts:
        random = np.random.RandomState(0)
        student, taught = (jnp.asarray(random.randn(batch, count), jnp.float32) for _ in range(2))
        labels = jnp.asarray(random.randint(0, count, batch), jnp.int32)
        arguments = (student, taught, labels)
        programs[count] = jax.jit(function).lower(*arguments).compile()
        cases[str(count)] = functools.partial(programs[count], *arguments)
    # Not in turn: the largest takes seconds, the smallest microseconds.
    times = {c: measure.side_by_side({c: run}, rounds)[c] for c, run in cases.items()}
    for count in counts:
        costs, time = measure.costs(programs[count]), times[str(count)]
        previous = counts[max(counts.index(count) - 1, 0)]
        growth = time.milliseconds / times[str(previous)].milliseconds
        logits = 4 * batch * count
        yield Row(
            part,
            f"{name} and gradient, {batch} x {count:,}",
            f"{batch} x {previous:,}",
            ratio=growth,
            milliseconds=time.milliseconds,
            bytes=costs.bytes,
            temporary=costs.temporary,
            copy_share=costs.bytes / (time.milliseconds / 1e3) / peak.bytes_per_second,
            note=f"{costs.bytes / logits:.0f} logits' worth of bytes",
        )


def device_rows(most: int = 8) -> Iterator[Row]:
    """Collectives of one step on simulated devices, read from the compiled programs.

    Args:
        most: devices.
    """
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={most}",
    }
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.growth"],
        env=environment,
        cwd=pathlib.Path(__file__).resolve().parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"benchmarks.growth: {done.stderr}")
    for line in done.stdout.splitlines():
        found = json.loads(line)
        yield Row(
            DEVICES,
            f"{found['case']}, {found['devices']} devices",
            "the gradients' bytes",
            ratio=found["bytes"] / found["gradient_bytes"],
            unit="of them",
            bytes=found["bytes"],
            temporary=found["temporary"],
            expected="reductions only",
            note=f"{found['count']} collectives: {found['kinds']}",
        )


def _of_mesh(name: str, learned: bool, devices: int) -> Mapping[str, Any]:
    """What one step says between devices; its data and its batches are those of `Training`."""
    mesh = parallel.make_mesh(1, jax.devices()[:devices])
    chosen = method(SUBJECTS[name], learned=learned)
    split = data(name)
    dispatcher = Dispatcher(chosen, mesh, 64, 64, loop_free=True)
    init = jax.vmap(
        lambda seed: distill.init_state(chosen, seed, split.images_BxHxWxC[:1]),
        out_axes=parallel.SEED_AXES,
    )
    state = jax.jit(init, out_shardings=parallel.state_shardings(mesh))(np.zeros(1, np.uint32))
    replicated = parallel.replicated(mesh)
    taught, both = jax.device_put((teacher(name), Resident(split, split)), replicated)
    program, _ = dispatcher.program(state, taught, both, 1, 0)
    found = collectives.collectives(program.as_text() or "")
    params = jax.tree.leaves((state.student.params, state.fusion.params if learned else ()))
    return {
        "case": f"{name}, {'bilevel' if learned else 'plain'} step",
        "devices": devices,
        "count": len(found),
        "bytes": sum(one.bytes for one in found),
        "gradient_bytes": sum(leaf.nbytes for leaf in params),
        "kinds": collectives.kinds(found),
        "temporary": measure.costs(program).temporary,
    }


def main() -> None:
    """Prints one line for each mesh and kind of step."""
    for name in ("mlp_256", "cnn"):
        for learned in (False, True):
            for devices in (1, 2, 4, 8):
                if devices <= jax.device_count():
                    print(json.dumps(_of_mesh(name, learned, devices)))


if __name__ == "__main__":
    main()
