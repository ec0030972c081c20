import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tgeo_jax import shapes


@pytest.mark.parametrize(
    "arrays",
    [
        {"logits_BxK": np.zeros((4, 3)), "labels_B": np.zeros(4, int)},
        {"class_means_KxK": np.zeros((3, 3)), "probs_NxK": np.zeros((7, 3))},
        {"images_BxHxWxC": np.zeros((2, 8, 8, 1)), "labels_B": np.zeros(2, np.uint8)},
    ],
)
def test_agreeing_shapes_pass(arrays):
    assert shapes.check(**arrays) is None


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ((4, 1), "labels_B has shape (4, 1); expected rank 1, that is [B]"),
        ((), "labels_B has shape (); expected rank 1, that is [B]"),
    ],
)
def test_wrong_rank_names_argument_shape_and_expected_rank(shape, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        shapes.check(labels_B=np.zeros(shape, int))


def test_wrong_rank_of_a_matrix_names_all_its_dimensions():
    with pytest.raises(ValueError, match=r"logits_BxK has shape \(4,\).*rank 2.*\[B, K\]"):
        shapes.check(logits_BxK=np.zeros(4))


@pytest.mark.parametrize("wrong", [2, 5])
def test_two_sizes_for_one_letter_name_both_arguments_and_both_shapes(wrong):
    said = f"teacher_BxK has K = {wrong} but student_BxK has K = 3 (shapes (4, {wrong}) and (4, 3))"
    with pytest.raises(ValueError, match=re.escape(said)):
        shapes.check(student_BxK=np.zeros((4, 3)), teacher_BxK=np.zeros((4, wrong)))


def test_a_letter_repeated_in_one_name_must_agree_with_itself():
    with pytest.raises(ValueError, match=re.escape("class_means_KxK has K = 4")):
        shapes.check(class_means_KxK=np.zeros((3, 4)))


def test_labels_that_are_not_integers_name_their_dtype():
    with pytest.raises(ValueError, match=r"labels_B has dtype float32.*integer class indices"):
        shapes.check(labels_B=np.zeros(4, np.float32))


def test_a_wrong_shape_raises_while_tracing():
    def traced(labels):
        shapes.check(labels_B=labels)
        return jnp.sum(labels)

    # eval_shape only traces: nothing could have been compiled or run when it raises.
    with pytest.raises(ValueError, match=r"labels_B has shape \(4, 1\)"):
        jax.eval_shape(traced, jax.ShapeDtypeStruct((4, 1), jnp.int32))
