"""Every role runs through one table: a new one in `ROLES` needs its row there."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from tests import methods
from tgeo_jax import distill, models, objective, online, ratios, roles
from tgeo_jax.state import Batch, Teacher

K, B = methods.NUM_CLASSES, 5
MLP = models.build("mlp", K, hidden=(3,))
CNN = models.build("cnn", K, widths=(2,))  # with BatchNorm: its two modes differ
PAIR = roles.Ensemble((MLP, CNN))


@dataclasses.dataclass(frozen=True)
class Case:
    """A role built with as few options as possible, and what must be true of it."""

    role: roles.Role
    module: nn.Module | None
    source: str | None  # the field that the teacher's logits come from
    shape: tuple[int, ...] = (B, K)
    needs_trained: bool = True
    anchored: bool = False


CASES = {
    "alone": Case(roles.alone(None), None, None, needs_trained=False),
    "frozen": Case(roles.frozen(CNN), CNN, "teach"),
    "cached": Case(roles.cached(CNN), CNN, "cached"),
    # They name their own workdirs: no single trained teacher is asked for.
    "several mean": Case(
        roles.several(PAIR, workdirs=("a", "b")), PAIR, "teach", needs_trained=False
    ),
    "several each": Case(
        roles.several(PAIR, workdirs=("a", "b"), combine="each"),
        PAIR,
        "teach",
        (2, B, K),
        needs_trained=False,
    ),
    "dml": Case(roles.dml(CNN), CNN, "peer", needs_trained=False),
    "trikd": Case(roles.trikd(CNN), CNN, "peer", needs_trained=False, anchored=True),
    "trikd trained": Case(roles.trikd(CNN, start="trained"), CNN, "peer", anchored=True),
    "trikd frozen": Case(roles.trikd(CNN, start="frozen"), CNN, "teach", anchored=True),
}
TAUGHT = [name for name, case in CASES.items() if case.source]
TEACHING = [name for name, case in CASES.items() if case.source == "teach"]


def variables_of(module: nn.Module, seed: int) -> Any:
    return methods.trained(module, seed)


def images(seed=0, scale=1.0, dtype=jnp.float32):
    return jnp.asarray(scale * np.random.RandomState(seed).randn(B, 5, 5, 1), dtype)


def taught(name: str, variables, inputs):
    """A batch's teacher logits, found the way that a step finds them."""
    case = CASES[name]
    method = methods.method(
        student=CNN,
        role=case.role,
        ratio=ratios.constant(),
        training_view=lambda keys, images: images,
        clean_view=lambda images: images,
    )
    trained = variables if case.source == "peer" else None
    state = distill.init_state(
        method, 0, inputs, trained_teacher=trained, anchor=variables_of(CNN, 9)
    )
    stored: Any = None
    if case.source == "cached":
        stored = CNN.apply(variables, inputs)[:, None]
    batch = Batch(inputs, jnp.zeros(B, jnp.int32), jnp.arange(B), stored)
    view = objective.look(method, Teacher(variables, None), state, state.step, batch)
    if case.source == "peer":
        return online.speak(method, state, view.inputs).logits_BxK
    return view.teacher_logits


@functools.cache
def compiled(name: str):
    return methods.quick_jit(functools.partial(taught, name))


def test_every_role_has_a_row():
    assert {name.split()[0] for name in CASES} == set(roles.ROLES)


@pytest.mark.parametrize("name", CASES)
def test_role_has_its_teacher_in_one_place(name):
    case, role = CASES[name], CASES[name].role
    filled = [field for field in ("teach", "cached", "peer") if getattr(role, field) is not None]
    assert filled == ([case.source] if case.source else [])
    assert role.has_teacher == bool(case.source)
    assert role.needs_trained == case.needs_trained
    assert role.anchored == case.anchored
    assert role.num_teachers == (case.shape[0] if len(case.shape) == 3 else 0)
    assert role.workdirs == (("a", "b") if name.startswith("several") else ())


@pytest.mark.parametrize("name", TAUGHT)
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
def test_logits_have_their_shape_and_are_finite_at_extreme_inputs(name, scale):
    variables = variables_of(CASES[name].module, 1)
    found = compiled(name)(variables, images(scale=scale))
    assert found.shape == CASES[name].shape
    assert found.dtype == jnp.float32
    assert np.isfinite(found).all()


@pytest.mark.parametrize("name", TAUGHT)
def test_logits_are_the_same_under_jit(name):
    variables = variables_of(CASES[name].module, 1)
    eager = taught(name, variables, images())
    np.testing.assert_allclose(compiled(name)(variables, images()), eager, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", TAUGHT)
def test_under_vmap_every_seed_asks_its_own_network(name):
    each = [variables_of(CASES[name].module, seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
    together = methods.quick_jit(jax.vmap(functools.partial(taught, name), (0, None)))(
        stacked, images()
    )
    for seed, variables in enumerate(each):
        alone = compiled(name)(variables, images())
        np.testing.assert_allclose(together[seed], alone, rtol=1e-5, atol=1e-6)
    assert not np.allclose(together[0], together[1])


@pytest.mark.parametrize("name", TAUGHT)
def test_bfloat16_inputs_are_computed_in_float32(name):
    variables, coarse = variables_of(CASES[name].module, 1), images(dtype=jnp.bfloat16)
    found = compiled(name)(variables, coarse)
    assert found.dtype == jnp.float32
    exact = compiled(name)(variables, coarse.astype(jnp.float32))
    np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", TEACHING)
def test_a_frozen_teacher_has_no_gradient(name):
    case = CASES[name]
    variables = variables_of(case.module, 1)
    random = jnp.asarray(np.random.RandomState(2).randn(*case.shape), jnp.float32)

    def total(variables, inputs):
        return jnp.sum(random * case.role.teach(variables, inputs))

    for leaf in jax.tree.leaves(jax.jit(jax.grad(total, argnums=(0, 1)))(variables, images())):
        np.testing.assert_array_equal(leaf, np.zeros(leaf.shape))


@pytest.mark.parametrize("name", ["frozen", "trikd frozen"])
def test_a_frozen_teacher_is_its_network_by_running_statistics(name):
    variables = variables_of(CNN, 1)
    found = CASES[name].role.teach(variables, images())
    np.testing.assert_allclose(found, normalised_cnn(variables, images()), rtol=1e-4, atol=1e-5)


def normalised_cnn(variables, inputs):
    """The CNN in evaluation mode, by NumPy: 3x3 convolution, running statistics, ReLU, means."""
    params, stats = variables["params"], variables["batch_stats"]["BatchNorm_0"]
    padded = np.pad(np.asarray(inputs), ((0, 0), (1, 1), (1, 1), (0, 0)))
    kernel = np.asarray(params["Conv_0"]["kernel"])
    x = sum(
        np.einsum("bhwc,cd->bhwd", padded[:, i : i + 5, j : j + 5], kernel[i, j])
        for i in range(3)
        for j in range(3)
    )
    norm = params["BatchNorm_0"]
    x = (x - stats["mean"]) / np.sqrt(stats["var"] + 1e-5) * norm["scale"] + norm["bias"]
    x = np.maximum(x, 0).mean(axis=(1, 2))
    return x @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"]


@pytest.mark.parametrize("name", ["dml", "trikd"])
def test_a_teacher_that_trains_along_answers_by_batch_statistics(name):
    variables = variables_of(CNN, 1)
    found = compiled(name)(variables, images())
    params, padded = variables["params"], np.pad(images(), ((0, 0), (1, 1), (1, 1), (0, 0)))
    kernel = np.asarray(params["Conv_0"]["kernel"])
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    x = np.einsum("bhwcij,ijcd->bhwd", windows, kernel)
    of_batch = {"mean": x.mean((0, 1, 2)), "var": x.var((0, 1, 2))}
    expected = normalised_cnn(
        {"params": params, "batch_stats": {"BatchNorm_0": of_batch}}, images()
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in roles.ROLES if name != "alone"])
def test_every_role_with_a_teacher_wants_its_module(name):
    options = {"workdirs": ("a", "b")} if name == "several" else {}
    with pytest.raises(ValueError, match=rf"role\.name='{name}' needs a teacher: set teacher\."):
        roles.ROLES[name](None, **options)


WEIGHTS = ("hard_student", "teacher_student", "hard_teacher", "student_teacher")


@pytest.mark.parametrize("weight", [(-1.0,), (1.0, -0.1), (), (float("nan"),), (1, float("inf"))])
@pytest.mark.parametrize(
    ("name", "field"),
    [("dml", field) for field in WEIGHTS]
    + [("trikd", field) for field in (*WEIGHTS, "anchor_student", "anchor_teacher")],
)
def test_a_weight_that_is_negative_missing_or_not_finite_is_named(name, field, weight):
    with pytest.raises(ValueError, match=rf"role\.{name}\.{field}=\(.*must hold one or more"):
        roles.ROLES[name](MLP, **{field: weight})


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("cached", {"views": -1}, r"role\.cached\.views=-1: must be >= 0"),
        ("cached", {"augmentation_seed": -1}, r"role\.cached\.augmentation_seed=-1: must be in"),
        ("cached", {"augmentation_seed": 2**32}, r"augmentation_seed=4294967296: must be in"),
        ("several", {}, r"role\.several\.workdirs=\(\): .* two or more"),
        ("several", {"workdirs": ("a",)}, r"role\.several\.workdirs=\('a',\): .* two or more"),
        (
            "several",
            {"workdirs": ("a", "b"), "combine": "sum"},
            r"role\.several\.combine='sum': use one of mean, each",
        ),
        ("trikd", {"start": "warm"}, r"role\.trikd\.start='warm': use one of fresh, trained, fro"),
        ("trikd", {"generations": 0}, r"role\.trikd\.generations=0: must be >= 1"),
    ],
)
def test_an_option_that_makes_no_sense_is_named(name, options, said):
    with pytest.raises(ValueError, match=said):
        roles.ROLES[name](MLP, **options)


def test_the_largest_seed_and_number_of_views_are_kept():
    role = roles.cached(MLP, views=3, augmentation_seed=2**32 - 1)
    assert role.cached == roles.Cached(3, 4294967295)


def test_weights_of_the_methods_are_those_of_the_specification():
    # hard_student, teacher_student, anchor_student, hard_teacher, student_teacher, anchor_teacher
    assert tuple(roles.trikd(MLP).weights) == ((1.0,),) * 6
    assert tuple(roles.dml(MLP).weights) == ((1.0,), (1.0,), (0.0,), (1.0,), (1.0,), (0.0,))


@pytest.mark.parametrize("name", ["dml", "trikd"])
def test_every_weight_keeps_its_name(name):
    fields = [f for f in roles.Weights._fields if name == "trikd" or "anchor" not in f]
    given = {field: (float(n + 2), 7.0) for n, field in enumerate(fields)}
    found = roles.ROLES[name](MLP, **given).weights._asdict()
    assert {field: found[field] for field in fields} == given


@pytest.mark.parametrize(
    ("student", "teacher", "anchored"),
    [((0,), (0, 0), False), ((0, 1), (0,), True), ((0,), (0, 2), True), ((1,), (0,), True)],
)
def test_an_anchor_is_needed_where_it_ever_weighs(student, teacher, anchored):
    role = roles.trikd(MLP, anchor_student=student, anchor_teacher=teacher)
    assert role.anchored == anchored


def logits(members=3, seed=0, scale=3.0, dtype=np.float64):
    return (scale * np.random.RandomState(seed).randn(members, B, K)).astype(dtype)


@pytest.mark.parametrize("members", [1, 2, 5])
@pytest.mark.parametrize("scale", [0.1, 3.0, 1e4])
def test_mean_prediction_is_the_mean_of_the_probabilities(members, scale):
    given = logits(members, scale=scale, dtype=np.float32)
    found = jax.jit(roles.mean_prediction)(given)
    assert found.dtype == jnp.float32
    log_probs = scipy.special.log_softmax(given.astype(np.float64), axis=-1)
    expected = scipy.special.logsumexp(log_probs, axis=0) - np.log(members)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    probs = scipy.special.softmax(given.astype(np.float64), axis=-1).mean(axis=0)
    np.testing.assert_allclose(np.exp(found), probs, rtol=1e-3, atol=1e-6)


def test_mean_prediction_of_bfloat16_is_computed_in_float32():
    coarse = jnp.asarray(logits(), jnp.bfloat16)
    found = jax.jit(roles.mean_prediction)(coarse)
    exact = scipy.special.softmax(np.asarray(coarse, np.float64), axis=-1).mean(axis=0)
    np.testing.assert_allclose(found, np.log(exact), rtol=1e-5, atol=1e-6)


def test_mean_prediction_of_float64_stays_there(x64):
    found = roles.mean_prediction(jnp.asarray(logits()))
    exact = scipy.special.softmax(logits(), axis=-1).mean(axis=0)
    np.testing.assert_allclose(found, np.log(exact), rtol=1e-13)


@pytest.mark.parametrize("train", [False, True])
def test_an_ensemble_is_its_members_side_by_side(train):
    each = [variables_of(MLP, 1), variables_of(CNN, 2)]
    joined = {
        "params": {f"models_{n}": part["params"] for n, part in enumerate(each)},
        "batch_stats": {"models_1": each[1]["batch_stats"]},
    }
    found, updated = PAIR.apply(joined, images(), train=train, mutable=["batch_stats"])
    assert found.shape == (2, B, K)
    for n, (module, variables) in enumerate(zip((MLP, CNN), each, strict=True)):
        alone, own = module.apply(variables, images(), train=train, mutable=["batch_stats"])
        np.testing.assert_allclose(found[n], alone, rtol=1e-6, atol=1e-7)
    moved = updated["batch_stats"]["models_1"]["BatchNorm_0"]["mean"]
    np.testing.assert_allclose(moved, own["batch_stats"]["BatchNorm_0"]["mean"], rtol=1e-6)


def test_several_ask_their_members_and_mean_them():
    each = [variables_of(MLP, 1), variables_of(CNN, 2)]
    joined = {
        "params": {f"models_{n}": part["params"] for n, part in enumerate(each)},
        "batch_stats": {"models_1": each[1]["batch_stats"]},
    }
    answers = [MLP.apply(each[0], images()), normalised_cnn(each[1], images())]
    of_each = CASES["several each"].role.teach(joined, images())
    np.testing.assert_allclose(of_each, np.stack(answers), rtol=1e-4, atol=1e-5)
    probs = sum(scipy.special.softmax(answer, axis=-1) for answer in answers) / 2
    mean = CASES["several mean"].role.teach(joined, images())
    np.testing.assert_allclose(mean, np.log(probs), rtol=1e-4, atol=1e-5)
