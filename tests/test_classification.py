"""Figures from a confusion matrix and from all scores, against scikit-learn and by hand."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix, f1_score, recall_score, roc_auc_score

from tgeo_jax import classification

RANDOM = np.random.RandomState(0)


@pytest.mark.parametrize("present", [range(7), [0, 5], [6]])
@pytest.mark.parametrize("predicted", [range(7), [5, 6], [1]])
def test_macro_f1_and_recall_are_those_of_scikit_learn(present, predicted):
    labels, said = RANDOM.choice(present, 200), RANDOM.choice(predicted, 200)
    matrix = confusion_matrix(labels, said, labels=range(7))
    common = {"labels": range(7), "zero_division": 0}
    expected = f1_score(labels, said, average="macro", **common)
    assert classification.macro_f1(matrix) == pytest.approx(expected, abs=1e-12)
    expected = recall_score(labels, said, average=None, **common)
    np.testing.assert_allclose(classification.recall(matrix), expected, atol=1e-12)


def test_an_empty_matrix_has_figures_of_zero():
    assert classification.macro_f1(np.zeros((3, 3), np.int32)) == 0
    assert classification.recall(np.zeros((3, 3), np.int32)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("values", [2, 5, 100, 10**6])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.97])
def test_auc_is_that_of_scikit_learn_with_many_ties(values, share):
    labels = RANDOM.rand(3000) < share
    scores = np.float32(RANDOM.randint(0, values, 3000) + 0.3 * values * labels).round()
    expected = roc_auc_score(labels, scores)
    assert classification.auc(scores, labels) == pytest.approx(expected, abs=1e-12)


def test_auc_of_infinite_and_signed_zero_scores():
    # Pairs (positive, negative): inf beats both, 0 ties with -0 and beats -inf.
    scores = np.float32([np.inf, 0.0, -0.0, -np.inf])
    assert classification.auc(scores, np.array([1, 1, 0, 0])) == 3.5 / 4


def test_millions_of_pairs_are_counted_exactly():
    """2**17 positives against as many negatives: 2**34 pairs, one of them lost."""
    scores = np.arange(2**18, dtype=np.float64)
    labels = scores >= 2**17
    labels[[2**17 - 1, 2**17]] = True, False
    assert classification.auc(scores, labels) == 1 - 2.0**-34
