"""BatchNorm over the whole batch or a device's part, on eight simulated devices, in float64."""

from __future__ import annotations

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests import methods, several
from tgeo_jax import bilevel, collectives, distill, objective, parallel, roles
from tgeo_jax.dispatch import Dispatcher, Resident
from tgeo_jax.state import Batch, Teacher

BATCH, META_BATCH = 16, 8


def test_every_replica_normalises_by_its_own_part(x64):
    chosen = methods.method()
    images = chosen.clean_view(methods.examples(BATCH).images_BxHxWxC).astype(np.float64)
    variables = _wide(methods.trained(chosen.student, 3))
    logits, stats = objective.training_mode(
        chosen.student, variables["params"], variables["batch_stats"], images, jax.random.key(0), 4
    )
    parts = [
        methods.train_mode(chosen.student, variables["params"], variables["batch_stats"], part)
        for part in np.split(np.asarray(images), 4)
    ]
    np.testing.assert_allclose(logits, np.concatenate([p[0] for p in parts]), rtol=1e-12)
    expected = jax.tree.map(lambda *leaves: np.mean(leaves, 0), *(p[1] for p in parts))
    methods.close(stats, expected["batch_stats"], rtol=1e-12, atol=0)
    whole, _ = methods.train_mode(
        chosen.student, variables["params"], variables["batch_stats"], images
    )
    assert np.abs(logits - whole).max() > 1e-3


@pytest.mark.parametrize("estimator", ["mixed", "reverse"])
def test_the_hypergradient_through_replicas_is_that_of_central_differences(x64, estimator):
    chosen = methods.method(replicas=4, estimator=estimator)
    state, teacher, batch, outer = _case(chosen)
    view = objective.look(chosen, teacher, state, state.step, batch)
    inner = objective.inner_loss(chosen, teacher, state, view)
    outer_loss = objective.outer_loss(chosen, teacher, state, outer)
    flat, unflatten = jax.flatten_util.ravel_pytree(state.fusion.params)

    def of_meta(meta):
        grads = jax.grad(inner, has_aux=True)(state.student.params, unflatten(meta))[0]
        updates, _ = chosen.optimizer.update(grads, state.student.opt_state, state.student.params)
        return outer_loss(optax.apply_updates(state.student.params, updates))

    found = bilevel.one_step(
        inner, lambda p: (outer_loss(p), None), state.student.params, state.fusion.params,
        chosen.optimizer, state.student.opt_state, estimator=estimator, has_aux=True,
    ).meta_grads  # fmt: skip
    found = jax.flatten_util.ravel_pytree(found)[0]
    value, step = jax.jit(of_meta), 1e-5
    for index in np.argsort(-np.abs(found))[:5]:
        away = step * jnp.zeros_like(flat).at[index].set(1)
        expected = (value(flat + away) - value(flat - away)) / (2 * step)
        assert found[index] == pytest.approx(float(expected), rel=1e-5, abs=1e-12)


def _wide(tree):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), tree)


def _case(chosen):
    """State, teacher and two batches in float64."""
    frozen = methods.teacher()
    state = methods.start(chosen)
    state = state.replace(student=_wide_floats(state.student), fusion=_wide_floats(state.fusion))
    batches = methods.examples(BATCH), methods.examples(META_BATCH, 1)
    return state, Teacher(*map(_wide, frozen)), *batches


def _wide_floats(tree):
    return jax.tree.map(
        lambda leaf: leaf.astype(jnp.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf,
        tree,
    )


def _by_pmap(chosen, state, batch: Batch):
    """A plain step as people write it for `jax.pmap`: parameters and statistics after it."""
    images = chosen.clean_view(batch.images_BxHxWxC).astype(jnp.float64)
    parts = [jnp.reshape(values, (8, -1, *values.shape[1:])) for values in (images, batch.labels_B)]

    def step(images, labels):
        def loss(params):
            logits, updated = methods.train_mode(
                chosen.student, params, state.student.batch_stats, images
            )
            return jnp.mean(methods.hard_by_hand(logits, labels)), updated["batch_stats"]

        grads, stats = jax.grad(loss, has_aux=True)(state.student.params)
        grads, stats = jax.lax.pmean((grads, stats), "device")
        updates, _ = chosen.optimizer.update(grads, state.student.opt_state, state.student.params)
        return optax.apply_updates(state.student.params, updates), stats

    return jax.tree.map(lambda leaf: leaf[0], jax.pmap(step, "device")(*parts))


def on_eight_devices(path: pathlib.Path) -> None:
    """Runs in a process of its own: the number of devices is fixed when JAX starts."""
    jax.config.update("jax_enable_x64", True)
    found = {"gap": {}, "collectives": {}}
    alone = methods.method(role=roles.alone(None), replicas=8, training_view=lambda k, x: _view(x))
    state, teacher, batch, _ = _case(alone)
    stepped, _ = jax.jit(distill.train_step(alone, Teacher(None, None)))(state, batch, batch)
    found["gap"]["pmap"] = _gap(
        (stepped.student.params, stepped.student.batch_stats), _by_pmap(alone, state, batch)
    )
    for replicas in (1, 8):
        chosen = methods.method(replicas=replicas)
        state, teacher, batch, outer = _case(chosen)
        after = {}
        for devices in (1, 8):
            mesh = parallel.make_mesh(1, jax.devices()[:devices])
            dispatcher = Dispatcher(chosen, mesh, BATCH, META_BATCH)
            # A copy: what is dispatched is donated.
            of_seeds = jax.tree.map(lambda leaf: leaf[None] + 0, state)
            of_seeds = of_seeds.replace(step=state.step + 0)
            program, _ = dispatcher.program(of_seeds, teacher, Resident(batch, outer), 1, 0)
            stepped, _ = dispatcher.run(of_seeds, teacher, Resident(batch, outer), 1, 0)
            after[devices] = jax.device_get((stepped.student, stepped.fusion.params))
        found["gap"][f"bilevel, {replicas} replicas"] = _gap(after[1], after[8])
        found["collectives"][replicas] = len(collectives.collectives(program.as_text()))
    found["gap"]["teacher in parts"] = _gap(
        _with_a_teacher_in_parts(4), _with_a_teacher_in_parts(1)
    )
    path.write_text(json.dumps(found))


def _with_a_teacher_in_parts(parts: int):
    """Student and fusion network after a step; the teacher is cut over `parts` of the devices."""
    chosen = methods.method()
    state, teacher, batch, outer = _case(chosen)
    mesh = parallel.make_mesh(model_devices=parts)
    where = parallel.weight_shardings(mesh, teacher.variables)
    if parts > 1:
        kernel = jax.tree.leaves(where)[-1].shard_shape((25, methods.NUM_CLASSES))
        assert kernel != (25, methods.NUM_CLASSES), where
    placed = Teacher(parallel.put(teacher.variables, where), teacher.class_means_KxK)
    of_seeds = jax.tree.map(lambda leaf: leaf[None], state).replace(step=state.step)
    dispatcher = Dispatcher(chosen, mesh, BATCH, META_BATCH)
    stepped, _ = dispatcher.run(of_seeds, placed, Resident(batch, outer), 1, 0)
    return jax.device_get((stepped.student, stepped.fusion.params))


def _view(images):
    return methods.method().clean_view(images)


def _gap(a, b) -> float:
    """The largest difference in units of the largest number."""
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(np.max(np.abs(x - y)) / np.max(np.abs(y) + 1e-3)) for x, y in leaves)


def test_eight_devices_are_pmap_or_one_large_device_as_one_likes(tmp_path):
    found = several.on_eight_devices("test_replicas.on_eight_devices", tmp_path / "found.json")
    assert set(found["gap"]) == {
        "pmap", "bilevel, 1 replicas", "bilevel, 8 replicas", "teacher in parts"
    }  # fmt: skip
    assert max(found["gap"].values()) < 1e-9, found
    # BatchNorm over the whole batch asks the other devices, in every pass; otherwise nobody does.
    assert found["collectives"]["8"] < found["collectives"]["1"], found
