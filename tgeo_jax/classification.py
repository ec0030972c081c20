"""What a confusion matrix or all scores of a classifier tell, on the host in float64."""

from __future__ import annotations

import numpy as np


def recall(confusion_KxK: np.ndarray) -> np.ndarray:
    """Share of each class's examples that are found: diagonal over row sums.

    Args:
        confusion_KxK: examples of class i (row) that were taken for class j (column).

    Returns:
        [K], float64, in [0, 1]; 0 for a class that has no examples.

    Examples:
        >>> recall(np.array([[3, 1], [0, 0]])).tolist()
        [0.75, 0.0]
    """
    confusion_KxK = np.asarray(confusion_KxK, np.float64)
    return _share(np.diagonal(confusion_KxK), confusion_KxK.sum(axis=1))


def macro_f1(confusion_KxK: np.ndarray) -> float:
    """Mean over all K classes of F1 = 2 TP / (2 TP + FP + FN).

    Args:
        confusion_KxK: examples of class i (row) that were taken for class j (column).

    Returns:
        In [0, 1]. A class that is neither there nor predicted counts with F1 = 0, as with
        scikit-learn's `f1_score(labels=range(K), average="macro", zero_division=0)`.

    Examples:
        >>> macro_f1(np.array([[1, 1], [0, 2]]))  # (2/3 + 4/5) / 2
        0.7333333333333334
    """
    confusion_KxK = np.asarray(confusion_KxK, np.float64)
    right_K = np.diagonal(confusion_KxK)
    # Row sum = TP + FN, column sum = TP + FP.
    both_K = confusion_KxK.sum(axis=0) + confusion_KxK.sum(axis=1)
    return float(_share(2 * right_K, both_K).mean())


def auc(scores_N: np.ndarray, labels_N: np.ndarray) -> float | None:
    """Area under the ROC curve: P(score of a positive > score of a negative) + P(equal) / 2.

    Counted over all pairs, by integers: exact for any number of ties.

    Args:
        scores_N: the higher, the more likely positive; may be infinite.
        labels_N: 1 or True where positive, 0 or False where negative.

    Returns:
        In [0, 1]; None where a class is missing, so that there are no pairs; NaN where a score is
        NaN, which has no rank.

    References:
        Hanley & McNeil 1982, "The meaning and use of the area under a receiver operating
        characteristic (ROC) curve", Radiology 143: the Mann-Whitney statistic.

    Examples:
        >>> auc(np.array([0.1, 0.4, 0.4, 0.8]), np.array([0, 0, 1, 1]))  # 3.5 of 4 pairs
        0.875
    """
    positive_N = np.asarray(labels_N).astype(bool)
    positives, negatives = scores_N[positive_N], np.sort(scores_N[~positive_N])
    if not len(positives) or not len(negatives):
        return None
    if np.isnan(scores_N).any():
        return float("nan")
    below = int(np.searchsorted(negatives, positives, side="left").sum(dtype=np.int64))
    not_above = int(np.searchsorted(negatives, positives, side="right").sum(dtype=np.int64))
    return (below + not_above) / (2 * len(positives) * len(negatives))


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.zeros_like(whole), where=whole > 0)
