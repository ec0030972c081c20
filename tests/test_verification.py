"""Verification: against scikit-learn, by hand, and by trying every threshold."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics, model_selection

from tgeo_jax import verification as verified


def pairs(seed=0, count=600, ties=False):
    random = np.random.RandomState(seed)
    same = random.rand(count) < 0.4
    similarity = random.randn(count) + 1.5 * same
    if ties:
        similarity = similarity.round(1)
    return similarity, same, random.randint(0, 10, count)


@pytest.mark.parametrize("ties", [False, True])
def test_the_roc_is_that_of_scikit_learn(ties):
    similarity, same, _ = pairs(ties=ties)
    found = verified.roc(similarity, same)
    far, tar, _ = metrics.roc_curve(same, similarity, drop_intermediate=False)
    np.testing.assert_allclose(found.far, far)
    np.testing.assert_allclose(found.tar, tar)
    assert found.area == pytest.approx(metrics.roc_auc_score(same, similarity), abs=1e-12)


@pytest.mark.parametrize("far", [0.0, 1e-3, 0.01, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("ties", [False, True])
def test_the_true_accept_rate_is_the_best_of_all_thresholds_that_are_allowed(ties, far):
    similarity, same, _ = pairs(1, ties=ties)
    best = 0.0
    for threshold in [*similarity, np.inf]:
        accepted = similarity >= threshold
        if accepted[~same].mean() <= far:
            best = max(best, accepted[same].mean())
    assert verified.tar_at_far(verified.roc(similarity, same), far) == pytest.approx(best)


@pytest.mark.parametrize("ties", [False, True])
def test_the_best_threshold_is_the_best_of_all(ties):
    similarity, same, _ = pairs(2, count=80, ties=ties)
    tried = [((similarity >= t) == same).mean() for t in [*similarity, np.inf]]
    found = verified.best_threshold(similarity, same)
    assert ((similarity >= found) == same).mean() == pytest.approx(max(tried))
    assert found not in similarity


def test_of_equally_good_thresholds_the_lowest_is_taken_halfway():
    similarity = np.array([0.0, 0.2, 0.4, 0.6])
    assert verified.best_threshold(similarity, np.array([0, 0, 1, 1])) == pytest.approx(0.3)
    # At 0.1 and at 0.5 three of four are right.
    assert verified.best_threshold(similarity, np.array([0, 1, 0, 1])) == pytest.approx(0.1)
    assert verified.best_threshold(similarity, np.array([1, 1, 1, 1])) < 0
    assert verified.best_threshold(similarity, np.array([0, 0, 0, 0])) > 0.6


def test_a_fold_is_judged_by_the_threshold_of_the_others():
    # Fold 1 alone would put its threshold at 0.5; fold 0's is 0.05.
    similarity = np.array([0.1, 0.0, 0.6, 0.4])
    same, folds = np.array([True, False, True, False]), np.array([0, 0, 1, 1])
    found = verified.cross_validated_accuracy(similarity, same, folds)
    np.testing.assert_array_equal(found, [0.5, 0.5])


def test_the_folds_are_those_of_scikit_learn():
    similarity, same, folds = pairs(3)
    found = verified.cross_validated_accuracy(similarity, same, folds)
    grid = np.linspace(-5, 5, 20_001)
    expected = []
    for train, test in model_selection.PredefinedSplit(folds).split():
        right = [((similarity[train] >= t) == same[train]).mean() for t in grid]
        threshold = grid[int(np.argmax(right))]
        expected.append(((similarity[test] >= threshold) == same[test]).mean())
    np.testing.assert_allclose(found, expected, atol=1 / 40)
    assert found.mean() == pytest.approx(np.mean(expected), abs=0.003)


def test_cosines_are_those_of_scikit_learn():
    random = np.random.RandomState(0)
    embeddings = random.randn(7, 5).astype(np.float32)
    chosen = random.randint(0, 7, (20, 2))
    expected = metrics.pairwise.cosine_similarity(np.float64(embeddings))
    found = verified.cosines(embeddings, chosen)
    np.testing.assert_allclose(found, expected[chosen[:, 0], chosen[:, 1]], rtol=1e-12)
    assert np.abs(found).max() <= 1


def test_an_embedding_of_zero_is_like_nothing():
    found = verified.cosines(np.zeros((2, 3), np.float32), np.array([[0, 1]]))
    np.testing.assert_array_equal(found, [0])


def test_rates_are_reported_as_far_as_the_pairs_go():
    similarity, same, folds = pairs(4, count=1000)
    different = int((~same).sum())
    assert 100 <= different < 1000
    found = verified.scores(similarity, same, folds)
    assert set(found) == {"accuracy", "accuracy_std", "auc", "tar_at_far_0.1", "tar_at_far_0.01"}
    of_folds = verified.cross_validated_accuracy(similarity, same, folds)
    assert found["accuracy"] == pytest.approx(of_folds.mean())
    assert found["accuracy_std"] == pytest.approx(of_folds.std(ddof=1))
    assert "tar_at_far_0.001" in verified.scores(*pairs(4, count=3000))


def test_pairs_of_one_kind_or_in_one_fold_are_refused():
    with pytest.raises(ValueError, match="pairs of one person and pairs of two are needed"):
        verified.roc(np.array([0.1, 0.2]), np.array([True, True]))
    with pytest.raises(ValueError, match="two or more folds"):
        verified.cross_validated_accuracy(np.zeros(2), np.array([True, False]), np.zeros(2))
