"""Many training steps of many seeds in one compiled program.

    order of examples -> scan over steps [ gather -> vmap over seeds [ step ] -> keep if finite ]

A step whose loss or update is not finite is undone, and so is everything after it in the same
dispatch: the state that comes back is the last good one, its `step` names the step that failed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from tgeo_jax import distill, parallel
from tgeo_jax.data import resident
from tgeo_jax.metrics import Mean
from tgeo_jax.randomness import Purpose
from tgeo_jax.state import Batch, Teacher, TrainState

Array = jax.Array
PyTree = Any


class Resident(NamedTuple):
    """Training and validation split on the device(s)."""

    train: Batch
    validation: Batch


class Outcome(NamedTuple):
    """What a dispatch found, per seed."""

    sums: dict[str, Mean]  # summed over the steps that were kept; leaves [seeds, ...]
    failed: dict[str, Array]  # term -> bool [seeds]: not finite at the first bad step


@dataclasses.dataclass(frozen=True)
class Dispatcher:
    """Compiles and runs dispatches of a method; `run` donates the state it is given."""

    method: distill.Distillation
    mesh: Mesh
    batch_size: int
    meta_batch_size: int

    def __post_init__(self) -> None:
        replicated, seeds = parallel.replicated(self.mesh), parallel.by_seed(self.mesh)
        state = parallel.state_shardings(self.mesh)
        run = jax.jit(
            self._run,
            static_argnums=3,
            donate_argnums=0,
            in_shardings=(state, replicated, replicated),
            out_shardings=(state, seeds),
        )
        object.__setattr__(self, "run", run)

    run: Callable[[TrainState, Teacher, Resident, int], tuple[TrainState, Outcome]] = (
        dataclasses.field(init=False, repr=False, compare=False)
    )

    def _run(
        self, state: TrainState, teacher: Teacher, data: Resident, num_steps: int
    ) -> tuple[TrainState, Outcome]:
        body, extra = self._body(state, teacher, data)
        if self.method.order == "prequential" and distill.learns_ratio(state):
            # One batch more than steps: each step's outer batch is its successor's.
            order = self._order(state, data.train, num_steps + 1, self.batch_size, True)
            xs = (order[:-1], order[1:])
            extra = extra(order[0])
        else:
            xs = (
                self._order(state, data.train, num_steps, self.batch_size, True),
                self._order(state, data.validation, num_steps, self.meta_batch_size, False),
            )
        healthy = jnp.ones((), bool)
        (state, _, _), (found, failed) = jax.lax.scan(body, (state, extra, healthy), xs)
        sums = jax.tree.map(lambda values: values.sum(0), found)
        return state, Outcome(sums, jax.tree.map(lambda values: values.any(0), failed))

    def _order(
        self, state: TrainState, split: Batch, num_steps: int, batch_size: int, training: bool
    ) -> Array:
        """Example indices [steps, seeds, batch]."""
        purpose = Purpose.TRAIN_ORDER if training else Purpose.VALIDATION_ORDER
        size = split.labels_B.shape[0]
        of_seed = jax.vmap(
            lambda seed: resident.batch_indices(
                seed, state.step, num_steps, batch_size, size, purpose
            )
        )
        return jnp.swapaxes(of_seed(state.seed), 0, 1)

    def _gather(self, split: Batch, indices_SxB: Array) -> Batch:
        sharding = parallel.batch_sharding(self.mesh)
        indices_SxB = jax.lax.with_sharding_constraint(indices_SxB, sharding)
        batch = jax.tree.map(lambda values: values[indices_SxB], split)
        return jax.lax.with_sharding_constraint(batch, sharding)

    def _body(self, state: TrainState, teacher: Teacher, data: Resident) -> tuple[Callable, Any]:
        """The scan's body, and its extra carry (for prequential: a function that makes it)."""
        over_seeds = {"spmd_axis_name": "seed"}
        axes = parallel.SEED_AXES
        if self.method.order == "prequential" and distill.learns_ratio(state):
            start = jax.vmap(
                lambda s, b: distill.prequential_start(self.method, teacher, s, b),
                in_axes=(axes, 0),
                **over_seeds,
            )
            step = jax.vmap(
                lambda s, f, b: distill.prequential_step(self.method, teacher, s, f, b),
                in_axes=(axes, 0, 0),
                out_axes=(axes, 0, 0),
                **over_seeds,
            )
            # A forward pass carries the trace that made it, and a scan compares those by identity:
            # only its arrays ride in the carry, under the structure of the first one.
            structure: list[Any] = []

            def first(indices_SxB: Array) -> list[Array]:
                leaves, tree = jax.tree.flatten(start(state, self._gather(data.train, indices_SxB)))
                structure.append(tree)
                return leaves

            def pipelined(carry: tuple, indices: tuple[Array, Array]) -> tuple:
                state, leaves, healthy = carry
                current = structure[0].unflatten(leaves)
                next_batch = self._gather(data.train, indices[1])
                stepped, following, found = step(state, current, next_batch)
                kept, healthy, report = _keep_if_finite(state, stepped, found, healthy)
                return (kept, jax.tree.leaves(following), healthy), report

            return pipelined, first

        step_of_seed = distill.train_step(self.method, teacher)
        step = jax.vmap(
            step_of_seed, in_axes=(axes, 0, 0), out_axes=(axes, 0), **over_seeds
        )

        def body(carry: tuple, indices: tuple[Array, Array]) -> tuple:
            state, extra, healthy = carry
            batch = self._gather(data.train, indices[0])
            val_batch = self._gather(data.validation, indices[1])
            stepped, found = step(state, batch, val_batch)
            kept, healthy, report = _keep_if_finite(state, stepped, found, healthy)
            return (kept, extra, healthy), report

        return body, ()


def _keep_if_finite(
    old: TrainState, new: TrainState, found: dict[str, Mean], healthy: Array
) -> tuple[TrainState, Array, tuple[dict[str, Mean], dict[str, Array]]]:
    bad = {
        name: ~jnp.isfinite(found[name].total)
        for name in ("hard_loss", "soft_loss", "teacher_loss", "outer_loss")
        if name in found
    }
    bad["student update"] = ~_all_finite(new.student)
    if distill.learns_ratio(new):
        bad["fusion update"] = ~_all_finite(new.fusion)
    any_bad = jnp.any(jnp.stack([flags.any() for flags in bad.values()]))
    keep = healthy & ~any_bad
    state = jax.tree.map(lambda a, b: jnp.where(keep, a, b), new, old)
    kept = jax.tree.map(lambda value: jnp.where(keep, value, jnp.zeros_like(value)), found)
    first = {name: flags & healthy for name, flags in bad.items()}
    return state, keep, (kept, first)


def _all_finite(tree: PyTree) -> Array:
    """[seeds]: whether all floating leaves of each seed are finite."""
    flags = [
        jnp.isfinite(leaf).reshape(leaf.shape[0], -1).all(1)
        for leaf in jax.tree.leaves(tree)
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    return jnp.stack(flags).all(0)
