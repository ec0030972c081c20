"""Shapes of what a run puts on its devices, without putting it there; see `placement`."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from tgeo_jax import dispatch, distill, parallel, placement
from tgeo_jax.assemble import Run
from tgeo_jax.data import streaming
from tgeo_jax.dispatch import Resident
from tgeo_jax.state import Batch, Best, Teacher, TrainState

PyTree = Any


def state(run: Run) -> tuple[TrainState, Best]:
    """Shapes of the first state and of what is best so far.

    Args:
        run: from `assemble`; the anchor of a chain may be missing, its shape is the student's.
    """
    config, anchor = run.config, run.anchor
    if run.method.role.anchored and anchor is None:  # an earlier run of the chain will train it
        example = run.dataset.example
        student = jax.eval_shape(lambda: distill.init_state(run.method, 0, example)).student
        anchor = {"params": student.params, "batch_stats": student.batch_stats}
        anchor = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((config.seeds, *leaf.shape), leaf.dtype), anchor
        )
    seeds = tuple(range(config.seed, config.seed + config.seeds))
    found: tuple[TrainState, Best] = jax.eval_shape(
        lambda anchor: placement.first_state(dataclasses.replace(run, anchor=anchor), seeds), anchor
    )
    return found


def teacher(run: Run) -> tuple[Teacher, int]:
    """What the step gets of frozen teachers, and bytes on each device of all that is placed."""
    method, trained, mesh = run.method, run.teacher, run.mesh
    if trained is None:
        return Teacher(None, None), 0
    variables: Any = None
    means: Any = None
    count = 0
    if trained.variables is not None:
        where = parallel.weight_shardings(mesh, trained.variables)
        variables = jax.tree.map(_shape, trained.variables, where)
        count = parallel.bytes_on_one(where, variables)
    if method.role.peer is not None:
        return Teacher(None, None), count
    if method.ratio.reads_class_means:
        each = (method.role.num_teachers,) if method.role.num_teachers else ()
        shape = (*each, method.num_classes, method.num_classes)
        replicated = parallel.replicated(mesh)
        means = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=replicated)
        count += parallel.bytes_on_one(replicated, means)
    return Teacher(None if method.role.cached is not None else variables, means), count


def data(run: Run) -> tuple[Resident, int]:
    """What one step gets, and bytes on each device of all that is placed, the test split too."""
    dataset, mesh = run.dataset, run.mesh
    if isinstance(dataset, streaming.StreamedDataset):
        return _streamed(run, dataset)
    both = [_batch(part.images, part.labels) for part in (dataset.train, dataset.validation)]
    cached = run.method.role.cached
    if cached is not None:
        views = (cached.views or 1, 1)
        both = [
            batch._replace(
                ids_B=_shape(part.ids),
                teacher_logits_BxVxK=_float32(len(part), count, dataset.num_classes),
            )
            for batch, part, count in zip(
                both, (dataset.train, dataset.validation), views, strict=True
            )
        ]
    test = _batch(dataset.test.images, dataset.test.labels)
    pairs = [] if dataset.verification is None else [_shape(dataset.verification.images)]
    where = parallel.replicated(mesh)
    others = [_batch(split.images, split.labels) for split in dataset.extra.values()]
    return Resident(*both), parallel.bytes_on_one(where, (both, test, others, pairs))


def _streamed(run: Run, dataset: streaming.StreamedDataset) -> tuple[Resident, int]:
    """One step's batches; the devices hold those of a dispatch, and read those of the next."""
    config, method = run.config, run.method
    sizes = {"train": config.data.batch_size}
    if method.meta_learned and not method.prequential:
        sizes["validation"] = config.meta.batch_size

    example = dataset.example

    def batches(steps: int) -> list[Batch]:
        steps += method.prequential
        return [
            _batch(
                jax.ShapeDtypeStruct((steps, size, *example.shape[1:]), example.dtype),
                jax.ShapeDtypeStruct((steps, size), np.int32),
            )
            for size in sizes.values()
        ]

    interval = config.train.eval_every * run.steps_per_epoch
    longest = max(dispatch.chunks(interval, config.train.steps_per_dispatch))
    of_step = batches(1)
    count = 2 * parallel.bytes_on_one(parallel.steps_sharding(run.mesh), batches(longest))
    return Resident(of_step[0], of_step[-1]), count


def _batch(images: Any, labels: Any) -> Batch:
    found: Any = Batch(_shape(images), _shape(labels))
    return found


def _float32(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _shape(array: Any, sharding: NamedSharding | None = None) -> Any:
    """As JAX would hold it: in 32 bits, unless told otherwise."""
    dtype = jax.dtypes.canonicalize_dtype(array.dtype)
    return jax.ShapeDtypeStruct(array.shape, dtype, sharding=sharding)
