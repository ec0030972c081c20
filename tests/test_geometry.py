import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tgeo_jax import geometry

# Two samples with K = 3, in numbers that can be squared by head.
STUDENT = np.float32([[0.5, 0.3, 0.2], [0.2, 0.2, 0.6]])
TEACHER = np.float32([[0.7, 0.2, 0.1], [0.1, 0.5, 0.4]])
LABELS = np.int32([0, 2])
MEANS = np.float32([[0.6, 0.3, 0.1], [0.3, 0.3, 0.4], [0.2, 0.1, 0.7]])

# Differences:  sample 0            sample 2
#   M - S       ( .1,  0, -.1)      (  0, -.1,  .1)
#   G - S       ( .5,-.3, -.2)      (-.2, -.2,  .4)
#   T - S       ( .2,-.1, -.1)      (-.1,  .3, -.2)
#   T - G       (-.3, .2,  .1)      ( .1,  .5, -.6)
#   M - G       (-.4, .3,  .1)      ( .2,  .1, -.3)
BLOCKS = {
    "S": [[0.5, 0.3, 0.2], [0.2, 0.2, 0.6]],
    "T": [[0.7, 0.2, 0.1], [0.1, 0.5, 0.4]],
    "G": [[1, 0, 0], [0, 0, 1]],
    "M": [[0.6, 0.3, 0.1], [0.2, 0.1, 0.7]],
    "(M-S)^2": [[0.01, 0, 0.01], [0, 0.01, 0.01]],
    "(G-S)^2": [[0.25, 0.09, 0.04], [0.04, 0.04, 0.16]],
    "(T-S)^2": [[0.04, 0.01, 0.01], [0.01, 0.09, 0.04]],
    "(T-G)^2": [[0.09, 0.04, 0.01], [0.01, 0.25, 0.36]],
    "(M-G)^2": [[0.16, 0.09, 0.01], [0.04, 0.01, 0.09]],
    "(M-S)(G-S)": [[0.05, 0, 0.02], [0, 0.02, 0.04]],
    "(T-S)(G-S)": [[0.1, 0.03, 0.02], [0.02, -0.06, -0.08]],
}
FULL = ["S", "T", "G", "M", "(M-S)^2", "(G-S)^2", "(T-S)^2", "(T-G)^2", "(M-G)^2"]
ORDER = {
    "sg_tg": ["(G-S)^2", "(T-G)^2"],
    "intra": ["S", "T", "G", "(G-S)^2", "(T-G)^2", "(T-S)^2"],
    "full": FULL,
    "edges": FULL[4:],
    "vertices": FULL[:4],
    "angles": ["(M-S)(G-S)", "(T-S)(G-S)"],
    "full+angles": [*FULL, "(M-S)(G-S)", "(T-S)(G-S)"],
}


def test_every_relation_set_has_its_row_in_the_table():
    assert set(geometry.RELATIONS) == {name for name in ORDER if "+" not in name}


@pytest.mark.parametrize("relations", ORDER)
def test_features_are_the_documented_blocks_in_the_documented_order(relations):
    found = geometry.trilateral_features(STUDENT, TEACHER, LABELS, MEANS, relations)
    expected = np.concatenate([np.float32(BLOCKS[name]) for name in ORDER[relations]], axis=1)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_the_default_relation_set_is_full():
    found = geometry.trilateral_features(STUDENT, TEACHER, LABELS, MEANS)
    np.testing.assert_array_equal(
        found, geometry.trilateral_features(STUDENT, TEACHER, LABELS, MEANS, "full")
    )


def test_a_block_named_by_two_sets_appears_once():
    assert geometry.relation_blocks("sg_tg+edges") == ("G-S", "T-G", "M-S", "T-S", "M-G")


def test_an_unknown_relation_set_raises_with_the_known_ones():
    said = r"relations='full\+angels': unknown relation set 'angels'.*sg_tg, intra, full, edges"
    with pytest.raises(ValueError, match=said):
        geometry.relation_blocks("full+angels")


@pytest.mark.parametrize("argument", [0, 1, 3])
def test_features_carry_no_gradient_to_any_input(argument):
    def total(*inputs):
        features = geometry.trilateral_features(
            inputs[0], inputs[1], LABELS, inputs[3], "full+angles"
        )
        return jnp.sum(features**2)

    gradient = jax.grad(total, argument)(STUDENT, TEACHER, LABELS, MEANS)
    np.testing.assert_array_equal(gradient, np.zeros_like(gradient))


def test_features_of_a_sample_do_not_depend_on_its_companions():
    both = geometry.trilateral_features(STUDENT, TEACHER, LABELS, MEANS)
    alone = geometry.trilateral_features(STUDENT[1:], TEACHER[1:], LABELS[1:], MEANS)
    np.testing.assert_array_equal(both[1:], alone)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"labels_B": LABELS[:, None]}, "labels_B has shape (2, 1); expected rank 1"),
        ({"student_probs_BxK": STUDENT[None]}, "student_probs_BxK has shape (1, 2, 3); expected"),
        ({"teacher_probs_BxK": TEACHER[0]}, "teacher_probs_BxK has shape (3,); expected rank 2"),
        ({"teacher_probs_BxK": TEACHER[:, :2]}, "teacher_probs_BxK has K = 2 but student_probs"),
        ({"class_means_KxK": MEANS[:2]}, "class_means_KxK has K = 2 but student_probs_BxK has"),
        ({"labels_B": LABELS[:1]}, "labels_B has B = 1 but student_probs_BxK has B = 2"),
    ],
)
def test_features_of_wrong_shapes_raise_with_name_and_shape(changed, said):
    inputs = {
        "student_probs_BxK": STUDENT,
        "teacher_probs_BxK": TEACHER,
        "labels_B": LABELS,
        "class_means_KxK": MEANS,
    }
    with pytest.raises(ValueError, match=re.escape(said)):
        geometry.trilateral_features(**(inputs | changed))


def test_class_means_average_the_predictions_of_each_class():
    probs = np.float32([[0.8, 0.2], [0.3, 0.7], [0.6, 0.4]])
    found = geometry.class_mean_predictions(probs, np.int32([0, 1, 0]), 2)
    # Class 0: ((.8 + .6) / 2, (.2 + .4) / 2).
    np.testing.assert_allclose(found, [[0.7, 0.3], [0.3, 0.7]], atol=1e-6)


def test_absent_class_gets_the_uniform_row():
    probs = np.float32([[0.8, 0.1, 0.05, 0.05], [0.1, 0.1, 0.1, 0.7]])
    found = geometry.class_mean_predictions(probs, np.int32([0, 3]), 4)
    np.testing.assert_array_equal(found[1:3], np.full((2, 4), 0.25))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_class_means_of_many_samples_are_right(dtype):
    # 1,000 samples of one class: a bfloat16 sum of ones would stay at 256.
    probs = jnp.tile(jnp.asarray([[0.75, 0.25]], dtype), (1000, 1))
    found = geometry.class_mean_predictions(probs, np.zeros(1000, np.int32), 2)
    np.testing.assert_allclose(np.float32(found[0]), [0.75, 0.25], rtol=1e-2)


def test_class_means_raise_where_num_classes_is_not_k():
    with pytest.raises(ValueError, match="teacher_probs_NxK has K = 3 but num_classes=4"):
        geometry.class_mean_predictions(TEACHER, LABELS, 4)


def test_class_means_raise_on_labels_of_rank_two():
    with pytest.raises(ValueError, match=r"labels_N has shape \(2, 1\); expected rank 1"):
        geometry.class_mean_predictions(TEACHER, LABELS[:, None], 3)


def test_student_teacher_edge_is_the_distance_of_the_probabilities():
    # softmax(log p) = p: sample 0 differs by (.2, -.1, -.1), sample 1 by (-.1, .3, -.2).
    found = geometry.student_teacher_edge(np.log(STUDENT), np.log(TEACHER))
    np.testing.assert_allclose(found, [0.06**0.5, 0.14**0.5], rtol=1e-5)
