"""Many steps, seeds and devices in one program give the numbers of one step, seed and device."""

from __future__ import annotations

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests import methods, several
from tgeo_jax import distill, models, parallel, ratios, roles
from tgeo_jax.data import resident
from tgeo_jax.dispatch import Dispatcher, Resident
from tgeo_jax.randomness import Purpose
from tgeo_jax.state import Batch

DATA = Resident(methods.examples(40), methods.examples(24, seed=1))
BATCH, META_BATCH = 8, 8


def _mutual(hard_teacher: float = 1.0) -> roles.Role:
    """A BatchNorm teacher that trains along: running statistics and class means of its own."""
    peer = models.build("cnn", methods.NUM_CLASSES, widths=(2,))
    return roles.dml(peer, hard_teacher=(hard_teacher,))


_METHODS = {
    **{order: {"order": order} for order in distill.ORDERS},
    "dml": {"role": _mutual(), "ratio": ratios.weighted()},
}


def _states(method, seeds):
    images = DATA.train.images_BxHxWxC[:1]
    init = jax.vmap(
        lambda seed: distill.init_state(method, seed, images), out_axes=parallel.SEED_AXES
    )
    return jax.jit(init)(np.asarray(seeds, np.uint32))


def _run(method, seeds, chunks, data=DATA, **options):
    mesh = parallel.make_mesh(1, jax.devices()[:1])
    dispatcher = Dispatcher(method, mesh, BATCH, META_BATCH, **options)
    state, outcomes, step = _states(method, seeds), [], 0
    for num_steps in chunks:
        state, outcome = dispatcher.run(state, methods.teacher(), data, num_steps, step)
        step += num_steps
        outcomes.append(jax.device_get(outcome))
    return jax.device_get(state), outcomes


def _close(a, b, rtol=2e-4, atol=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("name", _METHODS)
def test_steps_and_seeds_one_by_one_equal_those_in_a_loop_and_side_by_side(name, every):
    method = methods.method(**_METHODS[name], meta_every=every)
    looped, outcomes = _run(method, [3, 4, 5], [4])
    free, apart = _run(method, [3, 4, 5], [1] * 4, loop_free=True)
    _close(looped, free)
    found = [outcome.sums for outcome in apart]
    _close(outcomes[0].sums, jax.tree.map(lambda *parts: sum(parts), *found))


@pytest.mark.parametrize("num_steps", [1, 3])
def test_nothing_is_done_to_a_state_that_a_failed_dispatch_left_behind(num_steps):
    method = methods.method(meta_every=4)
    mesh = parallel.make_mesh(1, jax.devices()[:1])
    dispatcher = Dispatcher(method, mesh, BATCH, META_BATCH)
    before = _states(method, [3])
    kept = jax.device_get(before)
    # The host thinks that step 0 is done; it was undone.
    after, found = dispatcher.run(before, methods.teacher(), DATA, num_steps, 1)
    jax.tree.map(np.testing.assert_array_equal, kept, jax.device_get(after))
    assert not any(flags.any() for flags in found.failed.values())
    assert all(total.count.sum() == 0 for total in found.sums.values())


def test_a_single_step_whose_number_is_known_has_no_branch():
    mesh = parallel.make_mesh(1, jax.devices()[:1])
    dispatcher = Dispatcher(methods.method(meta_every=2), mesh, BATCH, META_BATCH, loop_free=True)
    arguments = _states(methods.method(), [3, 4]), methods.teacher(), DATA

    def branches(num_steps, first_step):
        program, is_new = dispatcher.program(*arguments, num_steps, first_step)
        return is_new, program.as_text().count(" conditional(") > 0

    assert branches(1, 0) == (True, False)
    assert branches(1, 1) == (True, False)
    assert branches(1, 2) == (False, False)  # as step 0
    assert branches(2, 0) == (True, True)


@pytest.mark.parametrize("order", distill.ORDERS)
def test_a_dispatch_equals_its_steps_one_by_one(order):
    method = methods.method(order=order)
    scanned, _ = _run(method, [5], [7])
    state = methods.start(method, seed=5)
    train, validation = (
        resident.batch_indices(5, 0, 8, size, len(split.labels_B), purpose)
        for size, split, purpose in (
            (BATCH, DATA.train, Purpose.TRAIN_ORDER),
            (META_BATCH, DATA.validation, Purpose.VALIDATION_ORDER),
        )
    )
    step = jax.jit(lambda s, b, v: distill.train_step(method, methods.teacher())(s, b, v))
    pick = lambda split, rows: jax.tree.map(lambda x: x[rows], split)  # noqa: E731
    for n in range(7):
        outer = pick(DATA.validation, validation[n])
        if order == "prequential":
            outer = pick(DATA.train, train[n + 1])
        state, _ = step(state, pick(DATA.train, train[n]), outer)
    _close(jax.tree.map(lambda x: x[0], scanned.student), state.student)
    _close(jax.tree.map(lambda x: x[0], scanned.fusion), state.fusion)
    assert int(scanned.step) == 7


@pytest.mark.parametrize("name", ["student_first", "prequential", "dml"])
def test_cutting_the_steps_differently_changes_nothing(name):
    method = methods.method(**_METHODS[name])
    whole, (outcome,) = _run(method, [0], [6])
    cut, outcomes = _run(method, [0], [2, 4])
    _close(whole, cut)
    total = sum(o.sums["hard_loss"].total for o in outcomes)
    np.testing.assert_allclose(total, outcome.sums["hard_loss"].total, rtol=1e-5)
    assert outcome.sums["hard_loss"].count == 6 * BATCH


@pytest.mark.parametrize("name", _METHODS)
def test_three_seeds_in_one_program_equal_three_runs(name):
    method = methods.method(**_METHODS[name], meta_every=2)
    together, _ = _run(method, [0, 1, 2], [6])
    for index, seed in enumerate([0, 1, 2]):
        alone, _ = _run(method, [seed], [6])
        parts, expected = (
            (state.student, state.fusion, state.teacher) for state in (together, alone)
        )
        own = jax.tree.map(lambda x, i=index: x[i], parts)
        _close(own, jax.tree.map(lambda x: x[0], expected))
    kernels = jax.tree.leaves(together.student.params)
    assert not np.allclose(kernels[-1][0], kernels[-1][1])
    for leaf in jax.tree.leaves(together.teacher):
        assert not np.allclose(leaf[0], leaf[1])


def test_a_step_that_is_not_finite_is_undone_and_named():
    poisoned = np.asarray(DATA.train.images_BxHxWxC, np.float32)
    order = np.asarray(resident.batch_indices(0, 0, 5, BATCH, 40, Purpose.TRAIN_ORDER))
    poisoned[order[3][0]] = np.nan  # met for the first time at step 3
    data = Resident(Batch(jnp.asarray(poisoned), DATA.train.labels_B), DATA.validation)
    method = methods.method()
    state, (outcome,) = _run(method, [0], [5], data)
    good, _ = _run(method, [0], [3], data)
    assert int(state.step) == 3
    _close(state, good, rtol=0, atol=0)
    assert [name for name, flags in outcome.failed.items() if flags[0]] == ["hard_loss"]
    assert outcome.sums["hard_loss"].count == 3 * BATCH


def test_an_update_that_is_not_finite_is_noticed_although_the_loss_is():
    method = methods.method(
        ratio=ratios.constant(), optimizer=optax.scale(float("inf")), training_view=lambda k, x: x
    )
    state, (outcome,) = _run(method, [0], [2])
    assert int(state.step) == 0
    assert [name for name, flags in outcome.failed.items() if flags[0]] == ["student update"]


def test_a_teachers_update_that_is_not_finite_is_noticed_although_the_students_is():
    method = methods.method(
        role=_mutual(hard_teacher=3e38), ratio=ratios.constant(), optimizer=optax.sgd(100.0)
    )
    state, (outcome,) = _run(method, [0], [2])
    assert int(state.step) == 0
    assert [name for name, flags in outcome.failed.items() if flags[0]] == ["teacher update"]


# (devices, of which along the seed axis)
_LAYOUTS = {
    "student_first": ((8, 1), (8, 2)),
    "fusion_first": ((8, 1),),
    "prequential": ((8, 2),),
    "dml": ((8, 2),),
}


def _eight_device_script(path: pathlib.Path) -> None:
    """Runs in a process of its own: the number of devices is fixed when JAX starts."""
    found = {}
    for name, layouts in _LAYOUTS.items():
        for devices, seed_devices in ((1, 1), *layouts):
            mesh = parallel.make_mesh(seed_devices, jax.devices()[:devices])
            method = methods.method(**_METHODS[name])
            dispatcher = Dispatcher(method, mesh, BATCH, META_BATCH)
            state, teacher = _states(method, [0, 1]), methods.teacher()
            losses = []
            for _ in range(2):
                state, outcome = dispatcher.run(state, teacher, DATA, 2)
                jax.block_until_ready((state, outcome))
                sums = jax.device_get(outcome.sums)
                losses += [
                    (summed.total / np.maximum(summed.count, 1)).tolist()
                    for key, summed in sorted(sums.items())
                    if key.endswith("_loss")
                ]
            flat = np.concatenate([np.ravel(x) for x in jax.tree.leaves(jax.device_get(state))])
            key = f"{name} {devices} {seed_devices}"
            found[key] = {"state": flat.astype(float).tolist(), "losses": losses}
    path.write_text(json.dumps(found))


def test_eight_devices_give_the_numbers_of_one(tmp_path):
    found = several.on_eight_devices("test_dispatch._eight_device_script", tmp_path / "found.json")
    for name, layouts in _LAYOUTS.items():
        one = found[f"{name} 1 1"]
        for devices, seed_devices in layouts:
            many = found[f"{name} {devices} {seed_devices}"]
            np.testing.assert_allclose(many["state"], one["state"], rtol=2e-3, atol=2e-5)
            # hard, soft, teacher and outer loss, and of "dml" what the teacher learns from.
            assert np.shape(one["losses"]) == (10 if name == "dml" else 8, 2)
            np.testing.assert_allclose(many["losses"], one["losses"], atol=1e-5)
