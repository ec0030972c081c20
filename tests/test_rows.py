"""Steps on the rows in use, against steps on whole tables and lazy Adam by hand, in float64."""

from __future__ import annotations

import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests import methods, several
from tests.test_config import changed
from tests.test_table_models import CATEGORIES, NUMBERS
from tgeo_jax import assemble, distill, models, parallel, ratios, roles, rows
from tgeo_jax.data import sources
from tgeo_jax.dispatch import Dispatcher, Resident
from tgeo_jax.errors import ConfigError
from tgeo_jax.state import Batch, Teacher

VOCABULARY = (6, 50)
BATCH, META_BATCH = 4, 3


def network(name="deepfm", vocabulary=VOCABULARY, **options):
    options = {"embedding": 3, "hidden": (4,), **options}
    return models.build(name, 2, vocabulary=vocabulary, **options)


def clicks(count, seed=0, vocabulary=VOCABULARY):
    random = np.random.RandomState(seed)
    ids = np.stack([random.randint(0, size, count) for size in vocabulary], 1)
    return Batch(jnp.asarray(ids, jnp.int32), jnp.asarray(random.randint(0, 2, count), jnp.int32))


def method(**changes):
    """TGeo-KD on clicks: a DeepFM and a wider frozen teacher."""
    fields = {
        "student": network(),
        "num_classes": 2,
        "role": roles.frozen(network(embedding=5)),
        "training_view": lambda keys, ids: ids,
        "clean_view": lambda ids: ids,
        "optimizer": optax.sgd(0.5),
        "lazy_rows": True,
    }
    return methods.method(**{**fields, **changes})


def random_like(tree, seed):
    random = np.random.RandomState(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(0.5 * random.randn(*leaf.shape)), tree)


def variables_of(module, seed):
    shapes = jax.eval_shape(module.init, jax.random.key(0), clicks(1).images_BxHxWxC)
    return random_like(shapes, seed)


def teacher_of(chosen):
    if chosen.role.teach is None:
        return Teacher(None, None)
    means = jnp.asarray([[0.8, 0.2], [0.3, 0.7]])
    return Teacher(variables_of(network(embedding=5), 5), means)


def start(chosen, seed=0):
    """A state in float64, all of it as after some training."""
    anchor = variables_of(chosen.student, 6) if chosen.role.anchored else None
    ids = clicks(1).images_BxHxWxC
    init = methods.quick_jit(lambda: distill.init_state(chosen, seed, ids, anchor=anchor))
    state = init()
    params = random_like(state.student.params, 3)
    student = state.student.replace(params=params, opt_state=chosen.optimizer.init(params))
    fusion = random_like(state.fusion.params, 4)
    fusion = state.fusion.replace(params=fusion, opt_state=chosen.fusion_optimizer.init(fusion))
    return state.replace(student=student, fusion=fusion)


def steps(step, state, count=3):
    """States and metrics of some steps, each on batches of its own."""
    step, found = methods.quick_jit(step), []
    for index in range(count):
        state, metrics = step(state, clicks(BATCH, index), clicks(META_BATCH, 90 + index))
        found.append((state, metrics))
    return found


METHODS = {
    "tgeo": {},
    "hashed": {"student": network("wide_deep", hash_buckets=8)},
    "fusion first": {"order": "fusion_first", "estimator": "reverse", "meta_every": 2},
    "an encoder": {
        "student": models.build(
            "row_encoder", 2, vocabulary=VOCABULARY, layers=1, width=4, heads=1, norm="post"
        ),
        "role": roles.alone(None),
    },
    "an anchor and a peer": {
        "role": roles.trikd(network("dcn_v2"), start="fresh"),
        "ratio": ratios.constant(),
    },
}


@pytest.mark.parametrize("changes", METHODS.values(), ids=METHODS)
def test_with_sgd_the_rows_in_use_are_updated_as_in_the_whole_tables(changes, x64):
    chosen = method(**changes)
    teacher, state = teacher_of(chosen), start(chosen)
    dense = steps(distill.train_step(chosen, teacher), state)
    lazy = steps(rows.train_step(chosen, teacher), state)
    methods.close(lazy, dense, rtol=1e-9, atol=1e-12)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), dense[-1][0].student, state.student)
    assert min(jax.tree.leaves(moved.params)) > 1e-6
    if chosen.meta_learned:  # so that the hypergradient was compared
        fusion = jax.tree.map(lambda a, b: np.abs(a - b).max(), dense[-1][0].fusion, state.fusion)
        assert min(jax.tree.leaves(fusion.params)) > 1e-7


def test_one_of_these_methods_has_an_anchor_and_a_peer():
    role = method(**METHODS["an anchor and a peer"]).role
    assert role.anchored
    assert role.peer is not None


def test_adam_and_weight_decay_are_lazy(x64):
    rate, decay, (b1, b2, eps, eps_root) = 0.1, 0.3, (0.9, 0.999, 1e-8, 1e-16)
    optimizer = optax.chain(optax.add_decayed_weights(decay), optax.adam(rate, eps_root=eps_root))
    chosen = method(role=roles.alone(None), optimizer=optimizer)
    state = start(chosen)
    found = steps(rows.train_step(chosen, Teacher(None, None)), state)

    def log_loss(params, batch):
        logits = chosen.student.apply({"params": params}, batch.images_BxHxWxC)
        return -jax.nn.log_softmax(logits)[jnp.arange(BATCH), batch.labels_B].mean()

    offsets = np.array([0, VOCABULARY[0]])
    theta = jax.device_get(state.student.params)
    m, v = (jax.tree.map(np.zeros_like, theta) for _ in range(2))
    gradient = methods.quick_jit(jax.grad(log_loss))
    for t in range(1, 4):
        batch = clicks(BATCH, t - 1)
        touched = np.unique(np.asarray(batch.images_BxHxWxC) + offsets)
        assert len(touched) < sum(VOCABULARY) / 2
        grads = jax.device_get(gradient(theta, batch))
        for module, parts in grads.items():
            for name, g in parts.items():
                here = touched if name == "rows" else slice(None)
                values, first, second = (tree[module][name].copy() for tree in (theta, m, v))
                g = g[here] + decay * values[here]
                first[here] = b1 * first[here] + (1 - b1) * g
                second[here] = b2 * second[here] + (1 - b2) * g**2
                upward, spread = first[here] / (1 - b1**t), second[here] / (1 - b2**t)
                values[here] -= rate * upward / (np.sqrt(spread + eps_root) + eps)
                theta[module][name], m[module][name], v[module][name] = values, first, second
        student = found[t - 1][0].student
        methods.close(student.params, theta, rtol=1e-8, atol=1e-10)
        adam = student.opt_state[1][0]
        methods.close((adam.mu, adam.nu), (m, v), rtol=1e-8, atol=1e-12)
    dense = steps(distill.train_step(chosen, Teacher(None, None)), state)[-1][0].student.params
    assert np.abs(dense["table"]["rows"] - theta["table"]["rows"]).max() > 1e-3


@pytest.mark.parametrize("known", [None, False], ids=["a branch", "known beforehand"])
def test_between_hypergradients_the_rows_of_the_outer_batch_rest(known, x64):
    """Adam would move them by the moments that they have."""
    chosen = method(optimizer=optax.adam(0.1, eps_root=1e-16), meta_every=2)
    moments = jax.tree.map(jnp.ones_like, start(chosen).student.opt_state)
    state = start(chosen)
    state = state.replace(student=state.student.replace(opt_state=moments))
    step = methods.quick_jit(rows.train_step(chosen, teacher_of(chosen), known))
    batch, outer = clicks(BATCH, 0), clicks(META_BATCH, 91)
    offsets = np.array([0, VOCABULARY[0]])
    own, others = (np.unique(np.asarray(one.images_BxHxWxC) + offsets) for one in (batch, outer))
    assert set(others) - set(own)
    for number, expected in ((1, own), (2, np.union1d(own, others))):
        if known is False and number == 2:
            continue
        before = state.replace(step=jnp.int32(number))
        after, _ = step(before, batch, outer)
        pairs = zip(*(jax.tree.leaves(s.student) for s in (before, after)), strict=True)
        tables = [pair for pair in pairs if pair[0].shape[:1] == (sum(VOCABULARY),)]
        assert len(tables) == 6  # of the deep and the wide part: values and Adam's moments
        for a, b in tables:
            np.testing.assert_array_equal(np.flatnonzero((a != b).any(axis=1)), expected)


def of_seeds(states):
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    return stacked.replace(step=states[0].step)


def dispatched(chosen, seeds=2, count=3, data=None):
    mesh = parallel.make_mesh(1, jax.devices()[:1])
    dispatcher = Dispatcher(chosen, mesh, BATCH, META_BATCH)
    state = of_seeds([start(chosen, seed) for seed in range(seeds)])
    data = data or Resident(clicks(12, 7), clicks(9, 8))
    return dispatcher.run(state, teacher_of(chosen), data, count)


def test_several_seeds_and_steps_in_one_program(x64):
    lazy, outcome = dispatched(method())
    dense, expected = dispatched(method(lazy_rows=False))
    methods.close(lazy, dense, rtol=1e-9, atol=1e-12)
    methods.close(outcome.sums, expected.sums, rtol=1e-9, atol=1e-12)
    rows_SxVxD = lazy.student.params["table"]["rows"]
    assert np.abs(rows_SxVxD[0] - rows_SxVxD[1]).max() > 1e-3  # each seed has an order of its own


def test_a_step_that_is_not_finite_is_undone(x64):
    chosen = method(optimizer=optax.sgd(float("nan")))
    state, outcome = dispatched(chosen, count=2)
    assert outcome.failed["student update"].all()
    methods.close(state.student, of_seeds([start(chosen, s) for s in (0, 1)]).student, atol=0)
    assert int(state.step) == 0


def test_unused_places_change_nothing():
    """More places than rows in use: what they hold is thrown away, also where the last row is."""
    chosen = method(role=roles.alone(None), optimizer=optax.chain(
        optax.add_decayed_weights(0.5), optax.sgd(0.1)
    ))  # fmt: skip
    last = np.array([[0, VOCABULARY[1] - 1]] * BATCH, np.int32)
    for ids in (last, 0 * last):
        batch = Batch(jnp.asarray(ids), jnp.arange(BATCH) % 2)
        held = rows.used(chosen, batch, batch, False)
        assert list(held) == [*(ids[0] + [0, VOCABULARY[0]]), *[sum(VOCABULARY)] * 6]
        state = start(chosen)
        stepped, _ = jax.jit(rows.train_step(chosen, Teacher(None, None)))(state, batch, batch)
        for table in ("table", "wide"):
            before, after = (s.student.params[table]["rows"] for s in (state, stepped))
            moved = np.flatnonzero((before != after).any(axis=1))
            np.testing.assert_array_equal(moved, held[:2])


# What the compiled program holds.

LARGE = (200_000, 100_000)
SHAPE = re.compile(r"= \(?\w+\[(?:1,)?300000,(?:3|1)\]\S* ([a-z-]+)\(")
# A table comes in, is read, is written in place, and goes out.
IN_PLACE = {
    "parameter", "get-tuple-element", "gather", "scatter", "dynamic-update-slice", "bitcast",
    "reshape", "fusion", "while", "call", "tuple", "conditional",
}  # fmt: skip


def compiled(lazy):
    chosen = method(
        student=network(vocabulary=LARGE), role=roles.alone(None), lazy_rows=lazy,
        optimizer=optax.adam(1e-3, eps_root=1e-16),
    )  # fmt: skip
    data = Resident(clicks(12, 7, LARGE), clicks(9, 8, LARGE))
    state = jax.eval_shape(
        lambda: of_seeds([distill.init_state(chosen, 0, data.train.images_BxHxWxC)])
    )
    mesh = parallel.make_mesh(1, jax.devices()[:1])
    program, _ = Dispatcher(chosen, mesh, BATCH, META_BATCH).program(
        state, Teacher(None, None), data, 3
    )
    return program


def test_no_array_of_the_size_of_a_table_but_the_table_itself():
    dense, lazy = compiled(False), compiled(True)
    table = 4 * sum(LARGE) * 3
    assert dense.memory_analysis().temp_size_in_bytes > table
    assert lazy.memory_analysis().temp_size_in_bytes < table / 100
    assert lazy.cost_analysis()["flops"] < dense.cost_analysis()["flops"] / 100
    of_dense, of_lazy = (set(SHAPE.findall(program.as_text())) for program in (dense, lazy))
    assert {"scatter"} <= of_lazy <= IN_PLACE, of_lazy
    assert {"multiply", "sqrt"} <= of_dense, of_dense  # Adam's, of every row


# What does not go together.


def test_a_student_without_tables_is_refused(monkeypatch):
    config = changed({"role.name": "alone", "student.name": "mlp", "data.batch_size": 2})
    config.optimizer.lazy_rows = True
    monkeypatch.setattr(sources, "load", lambda *args, **kwargs: NUMBERS)
    with pytest.raises(ConfigError, match=r"^optimizer\.lazy_rows=True: .* no embedding tables"):
        assemble.assemble(config)
    monkeypatch.setattr(sources, "load", lambda *args, **kwargs: CATEGORIES)
    config.student.name = "dcn_v2"
    assert assemble.assemble(config).method.lazy_rows


def test_an_order_that_looks_at_the_next_batch_is_refused():
    with pytest.raises(ValueError, match=r"^meta\.order='prequential' .*lazy_rows=True"):
        method(order="prequential")


# Tables in parts over devices.


IN_PARTS = {  # vocabulary, and what differs
    "rows, lazy": ((6, 50), {}),
    "columns": ((6, 51), {"role": roles.alone(None), "lazy_rows": False}),
}


def on_eight_devices(path: pathlib.Path) -> None:
    """Runs in a process of its own: the number of devices is fixed when JAX starts."""
    jax.config.update("jax_enable_x64", True)
    found: dict = {"gap": {}, "parts": {}, "whole": {}}
    for name, (vocabulary, changes) in IN_PARTS.items():
        student, frozen = network(vocabulary=vocabulary, embedding=4), network(embedding=5)
        chosen = method(**{"student": student, "role": roles.frozen(frozen), **changes})
        data = Resident(clicks(24, 7, vocabulary), clicks(24, 8, vocabulary))
        first, after = jax.device_get(start(chosen)), {}  # what is dispatched is donated
        for parts in (1, 4):
            mesh = parallel.make_mesh(1, jax.devices()[: 8 if parts > 1 else 1], parts)
            state = of_seeds([first])
            where = parallel.state_shardings(mesh, state)
            placed = parallel.put(state, _leaf_by_leaf(where, state))
            dispatcher, teacher = Dispatcher(chosen, mesh, 8, 8), teacher_of(chosen)
            program, _ = dispatcher.program(placed, teacher, data, 1, 0)
            stepped, _ = dispatcher.run(placed, teacher, data, 1, 0)
            after[parts] = jax.device_get((stepped.student, stepped.fusion))
            table = stepped.student.params["table"]["rows"].addressable_shards[0].data
            whole = re.findall(rf"= \(?f64\[1,{sum(vocabulary)},4\]", program.as_text())
            found["parts"].setdefault(name, []).append(table.shape)
            found["whole"].setdefault(name, []).append(len(whole))
        leaves = zip(jax.tree.leaves(after[1]), jax.tree.leaves(after[4]), strict=True)
        found["gap"][name] = max(float(np.abs(a - b).max()) for a, b in leaves)
    path.write_text(json.dumps(found))


def _leaf_by_leaf(prefix, tree):
    """A prefix of a tree of shardings as a whole one."""
    return jax.tree.map(lambda where, part: jax.tree.map(lambda _: where, part), prefix, tree)


def test_tables_in_parts_over_devices_are_trained_as_whole_ones(tmp_path):
    found = several.on_eight_devices("test_rows.on_eight_devices", tmp_path / "found.json")
    assert set(found["gap"]) == set(IN_PARTS)
    assert max(found["gap"].values()) < 1e-10, found
    assert found["parts"] == {
        "rows, lazy": [[1, 56, 4], [1, 14, 4]],
        "columns": [[1, 57, 4], [1, 57, 1]],
    }
    # With lazy rows no device holds a whole table at any time.
    alone, together = found["whole"]["rows, lazy"]
    assert (alone > 0, together) == (True, 0), found
