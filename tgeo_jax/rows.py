"""Training steps that read and write only the rows of embedding tables that their batches use.

    ids of both batches -> their rows, each once -> [ the step, on tables of these ] -> put back

Everything inside of the brackets is the step of `distill`, unchanged: gradient, hypergradient and
optimiser see tables of U rows in place of V. With SGD without momentum and weight decay the numbers
are those of the whole tables. Otherwise what the optimiser does to a row without a gradient is left
out until the row is used again: moments of Adam and momentum do not decay in between (lazy Adam),
and weight decay reaches the rows in use alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tgeo_jax import distill, metrics
from tgeo_jax.method import Distillation
from tgeo_jax.models import tables
from tgeo_jax.state import Batch, Teacher, TrainState, is_table

Array = jax.Array
PyTree = Any
Found = dict[str, metrics.Mean]


def used(
    method: Distillation, batch: Batch, val_batch: Batch, takes_hypergradient: bool | Array = True
) -> Array:
    """The rows that a step reads, each once, in increasing order.

    Args:
        method: what is trained, with a student that has tables.
        batch: of the step.
        val_batch: the outer batch.
        takes_hypergradient: whether the step looks at it; where it does not, nothing of it counts.

    Returns:
        int32 [U] with U the number of indices in the batches, or V if that is less; behind the last
        row, V stands in every place that is left.

    Examples:
        >>> from types import SimpleNamespace
        >>> from tgeo_jax import models
        >>> student = models.build("deepfm", 2, vocabulary=(9, 9))
        >>> method = SimpleNamespace(student=student, clean_view=lambda x: x)
        >>> batch, other = (Batch(jnp.array(ids), None) for ids in ([[3, 0], [3, 5]], [[4, 0]]))
        >>> print(used(method, batch, other), used(method, batch, other, False))
        [ 3  4  9 14 18 18] [ 3  9 14 18]
    """
    module: Any = method.student
    size = sum(tables.field_sizes(module.vocabulary, module.hash_buckets))
    flat = _row_numbers(module, method.clean_view(batch.images_BxHxWxC)).ravel()
    if takes_hypergradient is not False:
        outer = _row_numbers(module, method.clean_view(val_batch.images_BxHxWxC)).ravel()
        flat = jnp.concatenate([flat, jnp.where(takes_hypergradient, outer, size)])
    return jnp.unique(flat, size=min(flat.size, size), fill_value=size)


def take(state: TrainState, rows_U: Array) -> TrainState:
    """The state with these rows in place of the student's tables, and of its anchor's.

    What the optimiser keeps for every parameter is cut to the same rows. A row number behind the
    last one gives zeros.

    Args:
        state: of one seed.
        rows_U: from `used`.

    Examples:
        >>> tree = {"table": {"rows": jnp.array([[0.0], [1.0], [2.0]])}, "bias": jnp.ones(1)}
        >>> state = TrainState(step=0, seed=0, student=tree, fusion=None)
        >>> print(take(state, jnp.array([0, 2, 3])).student["table"]["rows"].T)
        [[0. 2. 0.]]
    """

    def of_leaf(path: tuple, leaf: Array) -> Array:
        if not is_table(path):
            return leaf
        return leaf.at[rows_U].get(mode="fill", fill_value=0, indices_are_sorted=True)

    student, anchor = jax.tree_util.tree_map_with_path(of_leaf, (state.student, state.anchor))
    return state.replace(student=student, anchor=anchor)


def put_back(state: TrainState, small: TrainState, rows_U: Array) -> TrainState:
    """The state after a step: tables of before with these rows exchanged, the rest as it is now.

    Args:
        state: before the step, with whole tables.
        small: after the step, with tables of U rows.
        rows_U: as in `take`; what lies behind the last row is dropped.

    Examples:
        >>> before, small = (
        ...     TrainState(step=0, seed=0, student={"rows": jnp.asarray(rows)}, fusion=None)
        ...     for rows in ([[0.0], [1.0], [2.0]], [[7.0], [8.0], [9.0]]))
        >>> print(put_back(before, small, jnp.array([0, 2, 3])).student["rows"].T)
        [[7. 1. 8.]]
    """

    def of_leaf(path: tuple, old: Array, new: Array) -> Array:
        if not is_table(path):
            return new
        return old.at[rows_U].set(new, mode="drop", indices_are_sorted=True)

    student = jax.tree_util.tree_map_with_path(of_leaf, state.student, small.student)
    return small.replace(student=student, anchor=state.anchor)


def small_step(
    method: Distillation, teacher: Teacher, updates_fusion: bool | None = None
) -> Callable[[TrainState, Batch, Batch], tuple[TrainState, TrainState, Found, Array]]:
    """The step of `distill.train_step` between `take` and `put_back`.

    Args:
        method: as there, with a student that has tables; not with order `prequential`.
        teacher: as there; frozen teachers and teachers that train along have tables of their own,
            and look them up by the batch's own indices.
        updates_fusion: as there.

    Returns:
        `step(state, batch, val_batch) -> (small before, small after, metrics, rows_U)`.

    Examples: in `train_step`.
    """

    def step(
        state: TrainState, batch: Batch, val_batch: Batch
    ) -> tuple[TrainState, TrainState, Found, Array]:
        when = distill.takes_hypergradient(method, state, updates_fusion)
        rows_U = used(method, batch, val_batch, when)
        student: Any = _Holding(method.student, rows_U)
        small = take(state, rows_U)
        of_rows = dataclasses.replace(method, student=student, lazy_rows=False)
        stepped, found = distill.train_step(of_rows, teacher, updates_fusion)(
            small, batch, val_batch
        )
        return small, stepped, found, rows_U

    return step


def train_step(
    method: Distillation, teacher: Teacher, updates_fusion: bool | None = None
) -> Callable[[TrainState, Batch, Batch], tuple[TrainState, Found]]:
    """`distill.train_step` on the rows in use.

    Args:
        method: as of `small_step`.
        teacher: likewise.
        updates_fusion: likewise.

    Returns:
        `step(state, batch, val_batch) -> (state, metrics)`.

    Examples:
        >>> import optax
        >>> from tgeo_jax import losses, models, ratios, roles
        >>> method = Distillation(
        ...     models.build("deepfm", 2, vocabulary=(5, 9)), 2, roles.alone(None),
        ...     losses.soft_loss("kl"), ratios.constant(), optax.sgd(0.1), optax.adam(1e-3), 10, 10,
        ...     lambda keys, ids: ids, lambda ids: ids)
        >>> batch = Batch(jnp.array([[1, 0], [0, 8]]), jnp.array([0, 1]))
        >>> start = distill.init_state(method, 0, batch.images_BxHxWxC)
        >>> state, _ = jax.jit(train_step(method, Teacher(None, None)))(start, batch, batch)
        >>> before, now = (s.student.params["table"]["rows"] for s in (start, state))
        >>> print(jnp.flatnonzero((before != now).any(axis=1)))    # 0 and 1; 5 and 13 behind them
        [ 0  1  5 13]
    """
    of_rows = small_step(method, teacher, updates_fusion)

    def step(state: TrainState, batch: Batch, val_batch: Batch) -> tuple[TrainState, Found]:
        _, stepped, found, rows_U = of_rows(state, batch, val_batch)
        return put_back(state, stepped, rows_U), found

    return step


@dataclasses.dataclass(frozen=True, eq=False)
class _Holding:
    """A network that holds some rows of its tables, called as if it held them all."""

    module: nn.Module
    rows_U: Array

    def apply(self, variables: PyTree, ids_BxF: Array, **how: Any) -> Any:
        numbers_BxF = _row_numbers(self.module, ids_BxF)
        places_BxF = jnp.searchsorted(self.rows_U, numbers_BxF).astype(jnp.int32)
        module: Any = self.module.clone(held=self.rows_U.shape[0])
        return module.apply(variables, places_BxF, **how)


def _row_numbers(module: Any, ids_BxF: Array) -> Array:
    return tables.row_numbers(ids_BxF, module.vocabulary, module.hash_buckets)
