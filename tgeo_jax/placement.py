"""What a run puts on its devices before the first step: data, teacher, state."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tgeo_jax import distill, feeds, parallel, teachers
from tgeo_jax.assemble import Run
from tgeo_jax.data import streaming
from tgeo_jax.dispatch import Resident
from tgeo_jax.randomness import of_generation
from tgeo_jax.state import Best, TrainState

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Placed:
    """The splits, on the devices unless they are streamed, and what feeds the steps."""

    train: Any
    validation: Any
    test: Any
    extra: dict[str, Any]  # further test splits by name
    feed: feeds.InMemory | feeds.Streamed


def data(run: Run, first_seed: int) -> Placed:
    """Puts the splits where the steps and the evaluation find them.

    Where the role is `cached`, stored teacher logits lie beside the images.

    Args:
        run: from `assemble`.
        first_seed: whose order a stream has; it trains one seed.
    """
    dataset, sharding = run.dataset, parallel.replicated(run.mesh)
    test = feeds.placed(dataset.test, sharding)
    extra = {name: feeds.placed(split, sharding) for name, split in dataset.extra.items()}
    train, validation = dataset.train, dataset.validation
    if isinstance(dataset, streaming.StreamedDataset):
        seed = of_generation(first_seed, run.config.generation)
        feed = feeds.Streamed(run.config, run.method, dataset, run.mesh, seed)
        return Placed(train, validation, test, extra, feed)
    splits: tuple[Any, Any] = (train, validation)
    parts = [feeds.placed(split, sharding) for split in splits]
    if run.method.role.cached is not None:
        assert run.teacher is not None
        found = teachers.with_logits(run.config, run.method, run.teacher, dataset)
        parts = [
            part._replace(
                ids_B=parallel.put(split.ids, sharding),
                teacher_logits_BxVxK=parallel.put(logits, sharding),
            )
            for part, split, logits in zip(parts, splits, found, strict=True)
        ]
    return Placed(parts[0], parts[1], test, extra, feeds.InMemory(Resident(*parts)))


def teacher(run: Run) -> teachers.Trained | None:
    """The trained teacher with its variables on the devices, in parts along `mesh.model`."""
    trained = run.teacher
    if trained is None or trained.variables is None:
        return trained
    where = parallel.weight_shardings(run.mesh, trained.variables)
    return dataclasses.replace(trained, variables=parallel.put(trained.variables, where))


def first_state(run: Run, seeds: tuple[int, ...]) -> tuple[TrainState, Best]:
    """The state before the first step, and what is best so far: nothing."""
    method, images = run.method, run.dataset.example
    # A teacher that trains along starts from these; another one is not in the state.
    trained = None if run.teacher is None else run.teacher.variables
    init = jax.vmap(
        lambda seed, trained, anchor: distill.init_state(
            method, seed, images, trained_teacher=trained, anchor=anchor
        ),
        in_axes=(0, None, 0),
        out_axes=parallel.SEED_AXES,
    )
    own = [of_generation(seed, run.config.generation) for seed in seeds]
    inputs = np.asarray(own, np.uint32), trained, run.anchor
    where = parallel.state_shardings(run.mesh, jax.eval_shape(init, *inputs))
    state = jax.jit(init, out_shardings=where)(*inputs)
    by_seed = parallel.by_seed(run.mesh)
    # The state's buffers are donated to the first dispatch; best must not share them.
    student = jax.tree.map(jnp.copy, (state.student, state.fusion.params))
    best = Best(
        params=student[0].params,
        batch_stats=student[0].batch_stats,
        fusion=student[1],
        validation_score=parallel.put(np.full(len(seeds), -np.inf, np.float32), by_seed),
        step=parallel.put(np.zeros(len(seeds), np.int32), by_seed),
    )
    return state, best
