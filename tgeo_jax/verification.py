"""Face verification: do two images show one person? From embeddings to rates, in plain NumPy.

Two images are taken for one person where the cosine of their embeddings is at least a threshold.
TAR, the true accept rate, is the share of pairs of one person that are accepted, FAR, the false
accept rate, that of pairs of two people.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

FARS = (1e-1, 1e-2, 1e-3)


class Roc(NamedTuple):
    """Rates at every threshold that tells pairs apart, the strictest first.

    Attributes:
        far: false accept rates, [T], from 0 to 1, not decreasing.
        tar: true accept rates, likewise.
    """

    far: np.ndarray
    tar: np.ndarray

    @property
    def area(self) -> float:
        """Under the curve: the share of (same, different) pairs of pairs that are in order.

        Examples:
            >>> roc(np.array([.9, .2, .2, .1]), np.array([True, True, False, False])).area
            0.875
        """
        return float(np.trapezoid(self.tar, self.far))


def cosines(embeddings_MxD: np.ndarray, pairs_Px2: np.ndarray) -> np.ndarray:
    """Cosine of the embeddings of every pair.

    `c_p = <e_i, e_j> / (|e_i| |e_j|)`, 0 where an embedding is 0.

    Args:
        embeddings_MxD: one row for each image.
        pairs_Px2: indices of both images.

    Returns:
        [P], float64, in [-1, 1].

    Examples:
        >>> cosines(np.array([[1., 0.], [2., 0.], [0., 3.]]), np.array([[0, 1], [0, 2]]))
        array([1., 0.])
    """
    e_MxD = embeddings_MxD.astype(np.float64)
    e_MxD /= np.maximum(np.linalg.norm(e_MxD, axis=1, keepdims=True), 1e-30)
    products_P = np.einsum("pd,pd->p", e_MxD[pairs_Px2[:, 0]], e_MxD[pairs_Px2[:, 1]])
    return np.clip(products_P, -1, 1)


def roc(similarity_P: np.ndarray, same_P: np.ndarray) -> Roc:
    """The receiver operating characteristic, exact: pairs of equal similarity are accepted at once.

    Args:
        similarity_P: of each pair; higher for one person.
        same_P: whether it shows one person; of both kinds there must be some.

    Raises:
        ValueError: pairs of one kind only.

    Examples:
        >>> found = roc(np.array([.9, .5, .1]), np.array([True, False, True]))
        >>> found.far, found.tar
        (array([0., 0., 1., 1.]), array([0. , 0.5, 0.5, 1. ]))
    """
    same_P = np.asarray(same_P, bool)
    if same_P.all() or not same_P.any():
        raise ValueError("pairs of one person and pairs of two are needed for a ROC")
    order = np.argsort(-similarity_P, kind="stable")
    sorted_P, same_P = similarity_P[order], same_P[order]
    last_of_equals = np.append(np.flatnonzero(np.diff(sorted_P)), len(sorted_P) - 1)
    tar, far = (
        np.append(0, np.cumsum(kind)[last_of_equals]) / kind.sum() for kind in (same_P, ~same_P)
    )
    return Roc(far, tar)


def tar_at_far(curve: Roc, far: float) -> float:
    """The highest true accept rate whose false accept rate is no higher than allowed.

    Args:
        curve: from `roc`.
        far: allowed, in [0, 1].

    Examples:
        >>> tar_at_far(roc(np.array([.9, .5, .1]), np.array([True, False, True])), 0.1)
        0.5
    """
    return float(curve.tar[curve.far <= far].max())


def best_threshold(similarity_P: np.ndarray, same_P: np.ndarray) -> float:
    """The threshold that decides most pairs right.

    Halfway between two neighbouring similarities, or beyond all of them; of equally good ones the
    lowest.

    Args:
        similarity_P: of each pair.
        same_P: whether it shows one person.

    Examples:
        >>> best_threshold(np.array([.75, .5, .25]), np.array([True, True, False]))
        0.375
    """
    values, where = np.unique(similarity_P, return_inverse=True)
    same = np.bincount(where, weights=same_P, minlength=len(values))
    different = np.bincount(where, minlength=len(values)) - same
    # Right at a threshold below values[k]: different ones before it, the same from it on.
    right = np.append(0, np.cumsum(different)) + np.append(np.cumsum(same[::-1])[::-1], 0)
    edges = np.concatenate([[values[0] - 1], (values[1:] + values[:-1]) / 2, [values[-1] + 1]])
    return float(edges[int(np.argmax(right))])


def cross_validated_accuracy(
    similarity_P: np.ndarray, same_P: np.ndarray, folds_P: np.ndarray
) -> np.ndarray:
    """Share of pairs decided right in each fold, by the best threshold of all the others.

    Args:
        similarity_P: of each pair.
        same_P: whether it shows one person.
        folds_P: which fold it belongs to; two or more.

    Returns:
        One accuracy for each fold, in [0, 1].

    Raises:
        ValueError: a single fold.

    References:
        Huang et al. 2007, "Labeled Faces in the Wild", view 2, with ten folds.

    Examples:
        >>> cross_validated_accuracy(
        ...     np.array([.9, .1, .8, .2]), np.array([1, 0, 1, 0]), np.array([0, 0, 1, 1]))
        array([1., 1.])
    """
    names = np.unique(folds_P)
    if len(names) < 2:
        raise ValueError("cross-validation needs two or more folds")
    found = []
    for fold in names:
        own = folds_P == fold
        threshold = best_threshold(similarity_P[~own], same_P[~own])
        found.append(np.mean((similarity_P[own] >= threshold) == same_P[own]))
    return np.asarray(found)


def scores(similarity_P: np.ndarray, same_P: np.ndarray, folds_P: np.ndarray) -> dict[str, float]:
    """Everything that is reported of a verification.

    Args:
        similarity_P: of each pair; higher for one person.
        same_P: whether it shows one person.
        folds_P: which fold it belongs to.

    Returns:
        `accuracy` and `accuracy_std` (mean and standard deviation over the folds), `auc`, and
        `tar_at_far_0.1`, `tar_at_far_0.01` and `tar_at_far_0.001` as far as the pairs go: one false
        accept must not be more than the rate allows.

    Examples:
        >>> scores(np.array([.9, .1, .8, .2]), np.array([1, 0, 1, 0]), np.array([0, 0, 1, 1]))
        {'accuracy': 1.0, 'accuracy_std': 0.0, 'auc': 1.0}
    """
    same_P = np.asarray(same_P, bool)
    of_folds = cross_validated_accuracy(similarity_P, same_P, folds_P)
    curve = roc(similarity_P, same_P)
    different = int((~same_P).sum())
    return {
        "accuracy": float(of_folds.mean()),
        "accuracy_std": float(of_folds.std(ddof=1)),
        "auc": curve.area,
        **{f"tar_at_far_{far:g}": tar_at_far(curve, far) for far in FARS if different * far >= 1},
    }
