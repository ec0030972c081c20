"""Many training steps of many seeds in one compiled program.

    order of examples -> scan over steps [ gather -> vmap over seeds [ step ] -> keep if finite ]

XLA's CPU backend is slow at convolutions inside of loops and branches, and at those that `vmap`
makes of several seeds; there a dispatch is one step, and seeds come one by one (`loop_free`).
A step whose loss or update is not finite is undone, and so is everything after it in the same
dispatch: the state that comes back is the last good one, its `step` names the step that failed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tgeo_jax import distill, parallel, rows
from tgeo_jax.data import resident
from tgeo_jax.metrics import Mean
from tgeo_jax.models import convolution
from tgeo_jax.randomness import Purpose
from tgeo_jax.state import Batch, Teacher, TrainState

Array = jax.Array
PyTree = Any
_INNER_TERMS = (
    "hard_loss",
    "soft_loss",
    "teacher_loss",
    "anchor_student_loss",
    "student_teacher_loss",
    "anchor_teacher_loss",
)
_UNKNOWN = -1  # a first step that the host does not know: whatever the state is at
Report = tuple[dict[str, Mean], dict[str, Array]]  # metrics of one step, what was not finite


class Stepped(NamedTuple):
    """A step of all seeds. What is kept of `before` and `after` becomes a state by `finish`."""

    before: TrainState
    after: TrainState
    extra: PyTree
    found: dict[str, Mean]
    finish: Callable[[TrainState], TrainState] = lambda kept: kept


# (state, extra carry, indices), of all seeds
Step = Callable[[TrainState, PyTree, PyTree], Stepped]


class Resident(NamedTuple):
    """Training and validation split on the device(s), or batches of both for some steps."""

    train: Batch
    validation: Batch


class Outcome(NamedTuple):
    """What a dispatch found, per seed."""

    sums: dict[str, Mean]  # summed over the steps that were kept; leaves [seeds, ...]
    failed: dict[str, Array]  # term -> bool [seeds]: what went wrong first at the first bad step


class Dispatcher:
    """Compiles and runs dispatches of a method.

    Args:
        method: what is trained.
        mesh: over which devices.
        batch_size: of the training batches.
        meta_batch_size: of the validation batches.
        streamed: whether `data` holds the batches of these steps in their order, [steps, B, ...],
            and not whole splits to choose from.
        loop_free: whether seeds come one after another instead of side by side; see the module.
    """

    def __init__(
        self,
        method: distill.Distillation,
        mesh: Mesh,
        batch_size: int,
        meta_batch_size: int,
        *,
        streamed: bool = False,
        loop_free: bool = False,
    ):
        self.method, self._mesh, self._streamed = method, mesh, streamed
        self._loop_free = loop_free
        self.batch_size, self._meta_batch_size = batch_size, meta_batch_size
        self._programs: dict[tuple[int, bool | None], jax.stages.Compiled] = {}

    def run(
        self,
        state: TrainState,
        teacher: Teacher,
        data: Resident,
        num_steps: int,
        first_step: int | None = None,
    ) -> tuple[TrainState, Outcome]:
        """Takes some steps from a state, which is donated: its buffers hold the result.

        Args:
            state: of all seeds.
            teacher: of the method.
            data: to choose from, or the batches of these steps.
            num_steps: how many.
            first_step: the state's step, where the host knows it: a single step then has no branch
                for `meta_every`, and nothing is done to a state at another step, which a failed
                dispatch before has left behind.
        """
        program, _ = self.program(state, teacher, data, num_steps, first_step)
        return program(state, teacher, data, _known(first_step))

    def program(
        self,
        state: TrainState,
        teacher: Teacher,
        data: Resident,
        num_steps: int,
        first_step: int | None = None,
    ) -> tuple[jax.stages.Compiled, bool]:
        """The compiled program that `run` calls with these arguments, and whether it is new."""
        static = self._static(num_steps, first_step)
        is_new = static not in self._programs
        if is_new:
            lowered = self.lower(state, teacher, data, num_steps, first_step)
            options = convolution.compiler_options() if self._loop_free else {}
            self._programs[static] = lowered.compile(compiler_options=options)
        return self._programs[static], is_new

    def lower(
        self,
        state: TrainState,
        teacher: Teacher,
        data: Resident,
        num_steps: int,
        first_step: int | None = None,
    ) -> jax.stages.Lowered:
        """That program before it is compiled; the shapes of the arguments will do."""
        where = parallel.state_shardings(self._mesh, state)
        replicated = parallel.replicated(self._mesh)
        of_data = parallel.steps_sharding(self._mesh) if self._streamed else replicated
        jitted = jax.jit(
            self._run,
            static_argnums=(4, 5),
            donate_argnums=0,
            # The teacher stays as it was placed: whole, or in parts.
            in_shardings=(where, None, of_data, replicated),
            # What the host reads must be whole in every process.
            out_shardings=(where, replicated),
        )
        static = self._static(num_steps, first_step)
        return jitted.lower(state, teacher, data, _known(first_step), *static)

    def _static(self, num_steps: int, first_step: int | None) -> tuple[int, bool | None]:
        every = self.method.meta_every
        if num_steps > 1 or first_step is None or every == 1 or not self.method.meta_learned:
            return num_steps, None
        return num_steps, first_step % every == 0

    def _run(
        self,
        state: TrainState,
        teacher: Teacher,
        data: Resident,
        first_step: Array,
        num_steps: int,
        updates_fusion: bool | None,
    ) -> tuple[TrainState, Outcome]:
        healthy = (first_step == _UNKNOWN) | (first_step == state.step)
        make = self._pipelined if self.method.prequential else self._independent
        step, extra, xs = make(state, teacher, data, num_steps, updates_fusion)

        def body(carry: tuple, indices: PyTree) -> tuple[tuple, Report]:
            state, extra, healthy = carry
            done = step(state, extra, indices)
            kept, healthy, report = _keep_if_finite(done.before, done.after, done.found, healthy)
            return (done.finish(kept), done.extra, healthy), report

        start = (state, extra, healthy)
        if num_steps == 1:  # without a loop: on CPU that decides how fast convolutions are
            (state, _, _), report = body(start, jax.tree.map(lambda values: values[0], xs))
            found, failed = jax.tree.map(lambda value: value[None], report)
        else:
            (state, _, _), (found, failed) = jax.lax.scan(body, start, xs)
        sums = jax.tree.map(lambda values: values.sum(0), found)
        return state, Outcome(sums, jax.tree.map(lambda values: values.any(0), failed))

    def _independent(
        self,
        state: TrainState,
        teacher: Teacher,
        data: Resident,
        num_steps: int,
        updates_fusion: bool | None,
    ) -> tuple[Step, PyTree, PyTree]:
        """Steps that share nothing but the state: (step, its extra carry, indices to scan over)."""
        of_seed = self._of_seed(teacher, updates_fusion)

        def step(state: TrainState, extra: PyTree, indices: PyTree) -> Stepped:
            batch = self._batch(data.train, indices[0])
            outer = batch if len(indices) == 1 else self._batch(data.validation, indices[1])
            return of_seed(state, batch, outer)

        train = self._order(state, data.train, num_steps, self.batch_size, Purpose.TRAIN_ORDER)
        if not self.method.meta_learned:
            return step, (), (train,)
        validation = self._order(
            state, data.validation, num_steps, self._meta_batch_size, Purpose.VALIDATION_ORDER
        )
        return step, (), (train, validation)

    def _of_seed(self, teacher: Teacher, updates_fusion: bool | None) -> Callable[..., Stepped]:
        """(state, batch, outer batch) -> one step of all seeds."""
        axes = parallel.SEED_AXES
        if not self.method.lazy_rows:
            whole = self._over_seeds(
                distill.train_step(self.method, teacher, updates_fusion), (axes, 0, 0), (axes, 0)
            )

            def step(state: TrainState, batch: Batch, outer: Batch) -> Stepped:
                stepped, found = whole(state, batch, outer)
                return Stepped(state, stepped, (), found)

            return step
        # Whether to keep a step is asked of the rows in use alone: else all would be read again.
        small = self._over_seeds(
            rows.small_step(self.method, teacher, updates_fusion), (axes, 0, 0), (axes, axes, 0, 0)
        )
        put_back = self._over_seeds(rows.put_back, (axes, axes, 0), axes)

        def lazy_step(state: TrainState, batch: Batch, outer: Batch) -> Stepped:
            before, after, found, rows_SxU = small(state, batch, outer)
            return Stepped(before, after, (), found, lambda kept: put_back(state, kept, rows_SxU))

        return lazy_step

    def _pipelined(
        self,
        state: TrainState,
        teacher: Teacher,
        data: Resident,
        num_steps: int,
        updates_fusion: bool | None,
    ) -> tuple[Step, PyTree, PyTree]:
        """Prequential steps: each hands its successor the forward pass on the successor's batch.

        A forward pass carries the trace that made it, and a scan compares those by identity: only
        its arrays ride in the carry, under the structure of the first one.
        """
        start = self._over_seeds(
            lambda s, batch: distill.prequential_start(self.method, teacher, s, batch),
            (parallel.SEED_AXES, 0),
            0,
        )
        of_seed = self._over_seeds(
            lambda s, f, batch: distill.prequential_step(
                self.method, teacher, s, f, batch, updates_fusion
            ),
            (parallel.SEED_AXES, 0, 0),
            (parallel.SEED_AXES, 0, 0),
        )
        # One batch more than steps: each step's outer batch is its successor's.
        order = self._order(state, data.train, num_steps + 1, self.batch_size, Purpose.TRAIN_ORDER)
        first_order = jax.tree.map(lambda values: values[0], order)
        first, structure = jax.tree.flatten(start(state, self._batch(data.train, first_order)))

        def step(state: TrainState, leaves: PyTree, indices: PyTree) -> Stepped:
            next_batch = self._batch(data.train, indices)
            current = jax.tree.unflatten(structure, leaves)
            stepped, following, found = of_seed(state, current, next_batch)
            return Stepped(state, stepped, jax.tree.leaves(following), found)

        return step, first, jax.tree.map(lambda values: values[1:], order)

    def _over_seeds(self, function: Callable, in_axes: PyTree, out_axes: PyTree) -> Callable:
        return parallel.over_seeds(
            function, in_axes, out_axes, mesh=self._mesh, one_by_one=self._loop_free
        )

    def _order(
        self, state: TrainState, split: Batch, num_steps: int, batch_size: int, purpose: Purpose
    ) -> PyTree:
        """Example indices [steps, seeds, batch]; of a stream the batches themselves."""
        if self._streamed:
            return split
        of_seed = jax.vmap(
            lambda seed: resident.batch_indices(
                seed, state.step, num_steps, batch_size, split.labels_B.shape[0], purpose
            )
        )
        return jnp.swapaxes(of_seed(state.seed), 0, 1)

    def _batch(self, split: Batch, indices_SxB: PyTree) -> Batch:
        """One step's batch, [seeds, batch, ...]."""
        sharding = parallel.batch_sharding(self._mesh)
        if self._streamed:
            return jax.tree.map(lambda values: values[None], indices_SxB)
        indices_SxB = jax.lax.with_sharding_constraint(indices_SxB, sharding)
        batch = jax.tree.map(lambda values: values[indices_SxB], split)
        return jax.lax.with_sharding_constraint(batch, sharding)


def _known(first_step: int | None) -> np.ndarray:
    return np.asarray(_UNKNOWN if first_step is None else first_step, np.int32)


def chunks(steps: int, largest: int) -> list[int]:
    """Cuts an interval into dispatches whose lengths differ by one at most: two compilations.

    Examples:
        >>> chunks(703, 300)
        [235, 234, 234]
    """
    count = -(-steps // largest)
    size, longer = divmod(steps, count)
    return [size + 1] * longer + [size] * (count - longer)


def chunks_left(first: int, step: int, last: int, largest: int) -> list[int]:
    """Those of an interval that are left from some step on; after an interruption the same ones.

    Where the step is between two of them, the rest is cut anew.

    Examples:
        >>> chunks_left(0, 0, 703, 300), chunks_left(0, 235, 703, 300), chunks_left(0, 9, 703, 300)
        ([235, 234, 234], [234, 234], [232, 231, 231])
    """
    left = chunks(last - first, largest)
    while left and first < step:
        first += left.pop(0)
    return left if first == step else chunks(last - step, largest)


def most_in_flight(mesh: Mesh) -> int:
    """How many dispatches may be queued behind the one that runs.

    One hides the host's work. With several simulated CPU devices it must be none: queued programs
    compete for the threads that their collectives wait in, and can deadlock.
    """
    device = mesh.devices.flat[0]
    return 0 if device.platform == "cpu" and mesh.size > 1 else 1


def _keep_if_finite(
    old: TrainState, new: TrainState, found: dict[str, Mean], healthy: Array
) -> tuple[TrainState, Array, Report]:
    # In the order of cause and effect; only the first is blamed, the rest follow from it.
    bad = {name: ~jnp.isfinite(found[name].total) for name in _INNER_TERMS if name in found}
    bad["student update"] = ~_all_finite(new.student)
    if new.teacher is not None:
        bad["teacher update"] = ~_all_finite(new.teacher)
    if "outer_loss" in found:
        bad["outer_loss"] = ~jnp.isfinite(found["outer_loss"].total)
    if jax.tree.leaves(new.fusion.params):
        bad["fusion update"] = ~_all_finite(new.fusion)
    blamed: dict[str, Array] = {}
    so_far = jnp.zeros_like(bad["hard_loss"])
    for name, flags in bad.items():
        blamed[name] = flags & ~so_far & healthy
        so_far |= flags
    keep = healthy & ~so_far.any()
    state = jax.tree.map(lambda a, b: jnp.where(keep, a, b), new, old)
    kept = jax.tree.map(lambda value: jnp.where(keep, value, jnp.zeros_like(value)), found)
    return state, keep, (kept, blamed)


def _all_finite(tree: PyTree) -> Array:
    """[seeds]: whether all floating leaves of each seed are finite."""
    flags = [
        jnp.isfinite(leaf).reshape(leaf.shape[0], -1).all(1)
        for leaf in jax.tree.leaves(tree)
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    return jnp.stack(flags).all(0)
