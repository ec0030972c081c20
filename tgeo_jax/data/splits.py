"""Held-out splits and label noise, fixed by a seed."""

from __future__ import annotations

import numpy as np
from sklearn.model_selection import train_test_split

from tgeo_jax.errors import DataError


def stratified(
    labels: np.ndarray, fraction: float, seed: int, num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Splits example indices in two, with the same share of every class.

    Args:
        labels: class index of each example, [N].
        fraction: share of the examples in the second part, in (0, 1).
        seed: fixes the split.
        num_classes: K; every class must occur in both parts.

    Returns:
        (kept, held_out), sorted index arrays.

    Raises:
        DataError: a class that one of the parts would lack.

    Examples:
        >>> kept, held_out = stratified(np.repeat([0, 1], 10), 0.1, seed=0, num_classes=2)
        >>> len(kept), np.repeat([0, 1], 10)[held_out]
        (18, array([0, 1]))
    """
    try:
        kept, held_out = train_test_split(
            np.arange(len(labels)), test_size=fraction, stratify=labels, random_state=seed
        )
    except ValueError as error:  # scikit-learn: fewer examples than classes
        raise DataError(
            f"data.validation_fraction={fraction}: cannot hold out a stratified split of "
            f"{len(labels)} examples: {error}"
        ) from error
    for part, indices in (("training", kept), ("held-out", held_out)):
        missing = sorted(set(range(num_classes)) - set(labels[indices].tolist()))
        if missing:
            raise DataError(
                f"data.validation_fraction={fraction}: class {missing[0]} has no example in the "
                f"{part} split; every class needs one, so change the fraction or drop the class"
            )
    return np.sort(kept), np.sort(held_out)


def corrupt_labels(labels: np.ndarray, noise: float, seed: int, num_classes: int) -> np.ndarray:
    """Replaces a share of the labels by another class, uniformly chosen.

    Args:
        labels: [N].
        noise: share replaced, in [0, 1).
        seed: fixes which and by what.
        num_classes: K.

    Returns:
        [N], of the same dtype; exactly `round(noise * N)` differ.

    Examples:
        >>> labels = np.zeros(10, np.int32)
        >>> int((corrupt_labels(labels, 0.4, seed=0, num_classes=3) != labels).sum())
        4
    """
    random = np.random.RandomState(seed)  # its stream is frozen, unlike default_rng's
    chosen = random.permutation(len(labels))[: round(noise * len(labels))]
    shifted = labels.copy()
    shifted[chosen] += random.randint(1, num_classes, size=len(chosen)).astype(labels.dtype)
    return shifted % num_classes
