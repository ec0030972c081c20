"""Ratios of several teachers, and what the step tells a ratio and makes of its weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests import methods
from tests.test_ratios import BATCH, CLASSES, parameters, situation, softmax
from tgeo_jax import distill, fusion, models, objective, ratios, roles
from tgeo_jax.state import Batch, Teacher

TEACHERS = 3


@pytest.mark.parametrize(
    ("hard", "soft", "share"), [(1.0, 3.0, 0.75), (0.8, 0.2, 0.2), (0.0, 2.0, 1.0), (0.0, 0.0, 0.0)]
)
def test_teacher_share_is_the_soft_part_of_the_weights(hard, soft, share):
    found = fusion.teacher_share(jnp.float32([hard]), jnp.float32([soft]))
    np.testing.assert_allclose(found, [share], rtol=1e-6)


def test_teacher_share_has_a_finite_gradient_where_both_weights_are_zero():
    share = jax.jit(jax.grad(lambda h, s: jnp.sum(fusion.teacher_share(h, s)), argnums=(0, 1)))
    assert np.isfinite(share(jnp.zeros(2), jnp.zeros(2))).all()


def test_nothing_learned_is_an_empty_dict_for_any_number_of_classes():
    assert fusion.nothing_learned(jax.random.key(0), 10) == {}
    assert fusion.nothing_learned(jax.random.key(1), 2) == {}


def of_each_teacher():
    """What each of the teachers' ratios may look at: they share student, labels and time."""
    seen = [situation(seed) for seed in range(TEACHERS)]
    return [
        seen[0]._replace(
            teacher_logits_BxK=one.teacher_logits_BxK,
            soft_B=one.soft_B,
            class_means_KxK=one.class_means_KxK,
        )
        for one in seen
    ]


def of_all_teachers():
    each = of_each_teacher()
    return each[0]._replace(
        teacher_logits_BxK=jnp.stack([one.teacher_logits_BxK for one in each]),
        soft_B=jnp.stack([one.soft_B for one in each]),
        class_means_KxK=jnp.stack([one.class_means_KxK for one in each]),
    )


def slices(tree, count=TEACHERS):
    return [jax.tree.map(lambda leaf, m=m: leaf[m], tree) for m in range(count)]


def hypergradient():
    random = np.random.RandomState(4)
    return {name: jnp.float32(random.randn(TEACHERS, BATCH)) for name in ("hard", "soft")}


@pytest.mark.parametrize("name", ratios.RATIOS)
def test_lifted_weights_are_the_mean_of_hards_and_each_soft_divided_by_m(name):
    ratio = ratios.RATIOS[name]()
    lifted = fusion.for_each_teacher(ratio, TEACHERS)
    if lifted.per_batch is None:
        params = jax.jit(lambda: lifted.init(jax.random.key(0), CLASSES))()
    else:
        params = lifted.per_batch.update(hypergradient())
    hard, soft = jax.jit(lifted.weights)(params, of_all_teachers())
    alone = jax.jit(ratio.weights)
    each = [alone(*pair) for pair in zip(slices(params), of_each_teacher(), strict=True)]
    assert (hard.shape, soft.shape) == ((BATCH,), (TEACHERS, BATCH))
    np.testing.assert_allclose(hard, np.mean([h for h, _ in each], axis=0), rtol=1e-5)
    np.testing.assert_allclose(soft, [np.asarray(s) / TEACHERS for _, s in each], rtol=1e-5)
    if name not in ("constant", "weighted", "annealed"):  # the same for all teachers
        assert np.ptp(soft, axis=0).max() > 1e-4


@pytest.mark.parametrize("name", ["tgeo", "bikd"])
def test_every_teacher_has_its_own_meta_parameters_of_the_single_ratios_shapes(name):
    ratio = ratios.RATIOS[name]()
    one = jax.eval_shape(lambda: parameters(ratio))
    all_of_them = jax.jit(lambda: parameters(fusion.for_each_teacher(ratio, TEACHERS)))()
    shapes = jax.tree.map(lambda leaf: (TEACHERS, *leaf.shape), one)
    assert jax.tree.map(jnp.shape, all_of_them) == shapes
    kernels = all_of_them["params"]["Dense_0"]["kernel"]
    assert not (kernels[0] == kernels[1]).any()


def test_a_lifted_ratio_without_meta_parameters_has_none():
    lifted = fusion.for_each_teacher(ratios.constant(), TEACHERS)
    assert lifted.init(jax.random.key(0), CLASSES) == {}
    assert lifted.per_batch is None


def test_a_lifted_ratio_does_not_need_class_means():
    case = of_all_teachers()._replace(class_means_KxK=None)
    hard, soft = fusion.for_each_teacher(ratios.constant(alpha=0.6), TEACHERS).weights({}, case)
    np.testing.assert_allclose(hard, [0.4] * BATCH, rtol=1e-6)
    np.testing.assert_allclose(soft, [[0.2] * BATCH] * TEACHERS, rtol=1e-6)


def test_lifted_meta_parameters_of_one_batch_start_and_change_for_each_teacher():
    per_batch = fusion.for_each_teacher(ratios.rw(), TEACHERS).per_batch
    start = per_batch.start(BATCH)
    np.testing.assert_array_equal([start["hard"], start["soft"]], np.zeros((2, TEACHERS, BATCH)))
    u = {name: np.maximum(-np.asarray(g), 1e-8) for name, g in hypergradient().items()}
    alpha = u["soft"] / (u["hard"] + u["soft"])
    found = per_batch.update(hypergradient())
    np.testing.assert_allclose([found["hard"], found["soft"]], [1 - alpha, alpha], 1e-5, 1e-7)


def test_a_ratio_of_ones_own_sees_one_teacher_at_a_time():
    """Its losses, and an update that mixes the samples of a batch but never the teachers."""
    own = fusion.FusionRatio(
        fusion.nothing_learned,
        lambda meta_params, shown: (shown.hard_B, meta_params * shown.soft_B),
        fusion.PerBatch(jnp.zeros, lambda grads: jax.nn.softmax(grads, axis=None)),
    )
    lifted, case = fusion.for_each_teacher(own, TEACHERS), of_all_teachers()
    grads = np.float64(hypergradient()["soft"])
    chosen = np.exp(grads) / np.exp(grads).sum(1, keepdims=True)
    found = lifted.per_batch.update(jnp.float32(grads))
    np.testing.assert_allclose(found, chosen, rtol=1e-5)
    hard, soft = lifted.weights(found, case)
    np.testing.assert_allclose(hard, case.hard_B, rtol=1e-6)
    np.testing.assert_allclose(soft, chosen * np.asarray(case.soft_B) / TEACHERS, rtol=1e-5)


# The step. Views are exact in any precision, so that a test can say what the networks saw.

TRAIN, VAL = methods.examples(8), methods.examples(6, seed=1)


def clean(images):
    return images.astype(float) / 64 - 2


def unaugmented(**changes) -> distill.Distillation:
    fields = {
        "training_view": lambda keys, images: clean(images),
        "clean_view": clean,
        "student": linear(),
        "optimizer": optax.sgd(methods.RATE),
    }
    return methods.method(**{**fields, **changes})


def linear():
    return models.build("mlp", methods.NUM_CLASSES, hidden=())


def two_teachers() -> tuple[roles.Role, Teacher]:
    both = roles.Ensemble((linear(), linear()))
    variables = jax.jit(both.init)(jax.random.key(3), clean(TRAIN.images_BxHxWxC))
    means = jax.nn.softmax(jax.random.normal(jax.random.key(8), (2, CLASSES, CLASSES)))
    role = roles.several(both, workdirs=("a", "b"), combine="each")
    return role, Teacher(jax.tree.map(lambda leaf: 3 * leaf, variables), means)


def cross_entropies(logits, labels):
    return -np.log(softmax(logits)[np.arange(len(labels)), np.asarray(labels)])


def kl_divergences(student, teacher, tau=methods.TEMPERATURE):
    """tau^2 KL of each sample, by NumPy; teacher [B, K] or [M, B, K]."""
    p, q = np.exp(np.float64(teacher) / tau), np.exp(np.float64(student) / tau)
    p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    return tau**2 * (p * np.log(p / q)).sum(-1)


def train_mode(method, state, params, images):
    variables = {"params": params, "batch_stats": state.student.batch_stats}
    logits, _ = method.student.apply(variables, clean(images), train=True, mutable=True)
    return logits


def test_a_ratio_is_told_the_epoch_from_1_to_num_epochs():
    """10 steps in each of 10 epochs, annealed from 1 to 0."""
    method = unaugmented(ratio=ratios.annealed())
    step = methods.quick_jit(distill.train_step(method, methods.teacher()))
    start = methods.start(method)
    for index, alpha in [(0, 1), (9, 1), (10, 8 / 9), (49, 5 / 9), (90, 0), (99, 0)]:
        _, found = step(start.replace(step=jnp.int32(index)), TRAIN, VAL)
        np.testing.assert_allclose(found["ratio"].total / 8, alpha, atol=1e-6)


@pytest.mark.parametrize("several", [False, True])
def test_a_ratio_is_shown_both_logits_both_losses_and_the_class_means(several):
    role, teacher = two_teachers() if several else (roles.frozen(linear()), methods.teacher())
    method = unaugmented(role=role, ratio=ratios.constant())
    state = methods.start(method)
    student = np.random.RandomState(0).randn(8, CLASSES).astype(np.float32)
    teachers = role.teach(teacher.variables, clean(TRAIN.images_BxHxWxC))
    view = objective.View(None, TRAIN.labels_B, teachers)
    _, seen = objective.fused_loss(method, teacher, state, view, jnp.asarray(student), {})
    shown = seen.situation
    np.testing.assert_array_equal(shown.student_logits_BxK, student)
    np.testing.assert_array_equal(shown.teacher_logits_BxK, teachers)
    np.testing.assert_array_equal(shown.labels_B, TRAIN.labels_B)
    np.testing.assert_array_equal(shown.class_means_KxK, teacher.class_means_KxK)
    np.testing.assert_allclose(shown.hard_B, cross_entropies(student, TRAIN.labels_B), rtol=1e-5)
    np.testing.assert_allclose(shown.soft_B, kl_divergences(student, teachers), 1e-4, 1e-6)
    assert (shown.epoch, shown.num_epochs) == (1, 10)


@pytest.mark.parametrize(
    "ratio", [ratios.constant(alpha=0.3), ratios.tgeo(hidden=(4,)), ratios.wls()]
)
def test_several_teachers_fuse_to_the_mean_of_what_each_would_alone(ratio):
    role, teacher = two_teachers()
    method = unaugmented(role=role, ratio=ratio)
    state = methods.start(method)
    teachers = role.teach(teacher.variables, clean(TRAIN.images_BxHxWxC))
    student = jax.random.normal(jax.random.key(1), (8, CLASSES))
    view = objective.View(None, TRAIN.labels_B, teachers)
    params = state.fusion.params
    found, _ = objective.fused_loss(method, teacher, state, view, student, params)
    hard = cross_entropies(student, TRAIN.labels_B)
    alone = []
    for m, meta_params in enumerate(slices(params, 2)):
        soft = kl_divergences(student, teachers[m])
        means = teacher.class_means_KxK[m]
        shown = ratios.Situation(student, teachers[m], TRAIN.labels_B, hard, soft, means, 1, 10)
        hard_weight, soft_weight = jax.jit(ratio.weights)(meta_params, shown)
        alone.append(np.mean(hard_weight * hard + soft_weight * soft))
    assert abs(alone[0] - alone[1]) > 0.01
    np.testing.assert_allclose(found, np.mean(alone), rtol=1e-5)


def with_logits(batch: Batch, views: int, seed: int) -> Batch:
    """As a cached teacher's batches: logits of every view, unlike those of any network here."""
    random = np.random.RandomState(seed)
    count = len(batch.labels_B)
    logits = jnp.float32(random.randn(count, views, CLASSES))
    return batch._replace(ids_B=jnp.arange(count), teacher_logits_BxVxK=logits)


def outer_case(name):
    """(what differs in the method, teacher, batch, outer batch)."""
    if name == "each of several":
        role, teacher = two_teachers()
        return {"role": role}, teacher, TRAIN, VAL
    if name == "cached":
        role = roles.cached(linear(), views=2)
        return {"role": role}, methods.teacher(), with_logits(TRAIN, 2, 0), with_logits(VAL, 1, 1)
    if name == "dml":
        return {"role": roles.dml(linear())}, Teacher(None, None), TRAIN, VAL
    if name == "prequential":
        return {"order": "prequential"}, methods.teacher(), TRAIN, VAL
    # With BatchNorm, in training mode: the running statistics are still those of the beginning.
    student = models.build("cnn", methods.NUM_CLASSES, widths=(3,))
    return {"student": student}, methods.teacher(), TRAIN, VAL


@pytest.mark.parametrize(
    ("name", "share"),
    [
        ("frozen", 0.3),
        ("frozen", 1.0),
        ("each of several", 0.3),
        ("cached", 0.3),
        ("dml", 0.3),
        ("prequential", 0.3),
    ],
)
def test_outer_loss_is_hard_and_soft_in_the_shares_asked_for(name, share):
    fields, teacher, batch, val_batch = outer_case(name)
    method = unaugmented(outer_soft=share, **fields)
    state = methods.start(method)
    after, found = methods.quick_jit(distill.train_step(method, teacher))(state, batch, val_batch)
    student = train_mode(method, state, after.student.params, VAL.images_BxHxWxC)
    if name == "cached":
        targets = val_batch.teacher_logits_BxVxK[:, 0]
    elif name == "dml":  # as it was before its own step
        targets = linear().apply(
            {"params": state.teacher.learner.params}, clean(VAL.images_BxHxWxC)
        )
    else:
        targets = method.role.teach(teacher.variables, clean(VAL.images_BxHxWxC))
    hard = cross_entropies(student, VAL.labels_B).mean()
    soft = kl_divergences(student, targets).mean()
    assert abs(hard - soft) > 0.05  # or the share would not show
    outer = found["outer_loss"]
    assert outer.count == len(VAL.labels_B)
    np.testing.assert_allclose(outer.total / outer.count, (1 - share) * hard + share * soft, 1e-4)
