"""Held-out splits, subsets and label noise, fixed by a seed."""

from __future__ import annotations

import numpy as np
from sklearn.model_selection import train_test_split

from tgeo_jax.errors import DataError


def stratified(
    labels: np.ndarray,
    fraction: float,
    seed: int,
    num_classes: int,
    *,
    field: str = "data.validation_fraction",
    second: str = "held-out",
) -> tuple[np.ndarray, np.ndarray]:
    """Splits example indices in two, with the same share of every class.

    Args:
        labels: class index of each example, [N].
        fraction: share of the examples in the second part, in (0, 1).
        seed: fixes the split.
        num_classes: K; every class must occur in both parts.
        field: which field of the configuration says so, for messages.
        second: what the second part is, for messages.

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
            f"{field}={fraction:g}: cannot hold out a stratified split of {len(labels)} examples: "
            f"{error}"
        ) from error
    for part, indices in (("training", kept), (second, held_out)):
        missing = sorted(set(range(num_classes)) - set(labels[indices].tolist()))
        if missing:
            raise DataError(
                f"{field}={fraction:g}: class {missing[0]} has no example in the "
                f"{part} split; every class needs one, so change the fraction or drop the class"
            )
    return np.sort(kept), np.sort(held_out)


def teacher_and_student(
    labels: np.ndarray, teacher_fraction: float, seed: int, num_classes: int
) -> dict[str, np.ndarray]:
    """Two disjoint parts of the examples with the same share of every class, sorted indices.

    Args:
        labels: [N].
        teacher_fraction: share of the part `teacher`; the rest is `student`. In (0, 1).
        seed: fixes which.
        num_classes: K; every class must occur in both parts.

    Raises:
        DataError: a class that one of the parts would lack.

    Examples:
        >>> parts = teacher_and_student(np.repeat([0, 1], 10), 0.7, seed=0, num_classes=2)
        >>> len(parts["teacher"]), len(parts["student"])
        (14, 6)
    """
    teacher, student = stratified(
        labels, round(1 - teacher_fraction, 12), seed, num_classes,
        field="1 - data.teacher_fraction", second="student's",
    )  # fmt: skip
    return {"teacher": teacher, "student": student}


def oversampled(labels: np.ndarray, seed: int, num_classes: int) -> np.ndarray:
    """Indices that give every class as many examples as the largest has.

    Each example occurs at least once; those of smaller classes again as often as it takes, drawn
    with replacement.

    Args:
        labels: [N].
        seed: fixes which are repeated.
        num_classes: K; a class without examples stays without.

    Returns:
        Sorted indices.

    Examples:
        >>> oversampled(np.array([0, 0, 0, 1]), seed=0, num_classes=2).tolist()
        [0, 1, 2, 3, 3, 3]
    """
    random = np.random.RandomState(seed)  # its stream is frozen, unlike default_rng's
    counts = np.bincount(labels, minlength=num_classes)
    repeated = [
        random.choice(np.flatnonzero(labels == k), counts.max() - counts[k])
        for k in range(num_classes)
        if 0 < counts[k] < counts.max()
    ]
    return np.sort(np.concatenate([np.arange(len(labels)), *repeated]))


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


def outliers(count: int, share: float, seed: int) -> np.ndarray:
    """Which examples become outliers.

    Args:
        count: N, how many examples there are.
        share: of them, in [0, 1).
        seed: fixes which.

    Returns:
        `round(share * N)` sorted indices.

    Examples:
        >>> len(outliers(10, 0.2, seed=0))
        2
    """
    random = np.random.RandomState(seed)  # its stream is frozen, unlike default_rng's
    return np.sort(random.permutation(count)[: round(share * count)])


def with_noise(images: np.ndarray, chosen: np.ndarray, seed: int) -> np.ndarray:
    """Images of which some are Gaussian noise with the mean and deviation of all pixels.

    Args:
        images: [N, H, W, C], uint8.
        chosen: indices of those that become noise.
        seed: fixes the noise.

    Returns:
        [N, H, W, C], uint8; within the range of the pixels that there were.

    References:
        TGeo-KD (arXiv 2312.15112) shows what its ratio does with such outliers.

    Examples:
        >>> images = np.full((2, 1, 2, 1), 7, np.uint8)
        >>> images[1, 0, 1] = 9
        >>> with_noise(images, np.array([0]), seed=0)[1].ravel().tolist()
        [7, 9]
    """
    random = np.random.RandomState(seed)
    noise = random.normal(images.mean(), images.std(), images[chosen].shape)
    noisy = images.copy()
    noisy[chosen] = np.clip(np.rint(noise), images.min(), images.max()).astype(images.dtype)
    return noisy


def subset(labels: np.ndarray, fraction: float, seed: int, num_classes: int) -> np.ndarray:
    """Indices of a share of the examples, with the same share of every class up to rounding.

    Args:
        labels: [N].
        fraction: share kept, in (0, 1].
        seed: fixes which.
        num_classes: K; every class keeps an example.

    Returns:
        `round(fraction * N)` sorted indices; those of a larger fraction of the same seed hold
        them, but for one example of a class at most.

    Raises:
        DataError: a class that would lose all its examples.

    Examples:
        >>> labels = np.repeat([0, 1], 10)
        >>> np.bincount(labels[subset(labels, 0.3, seed=0, num_classes=2)]).tolist()
        [3, 3]
    """
    counts = np.bincount(labels, minlength=num_classes)
    # Rounded sums, not sums of what is rounded: as many examples as the fraction says.
    sizes = np.diff(np.rint(fraction * np.cumsum([0, *counts])).astype(int))
    if sizes.min() < 1:
        raise DataError(
            f"data.fraction={fraction}: class {sizes.argmin()} would have no training example; "
            "every class needs one, so keep more"
        )
    return _first_of_every_class(labels, sizes.tolist(), seed)


def long_tailed(labels: np.ndarray, factor: float, seed: int, num_classes: int) -> np.ndarray:
    """Indices of a long-tailed subset: class k keeps `n * factor^(-k / (K - 1))` examples.

    n is the size of the smallest class, so that every class has as many as it should keep.

    Args:
        labels: [N].
        factor: imbalance factor, the first class's examples over the last's, >= 1.
        seed: fixes which.
        num_classes: K >= 2.

    Returns:
        Sorted indices; those of a smaller factor of the same seed hold them.

    Raises:
        DataError: the last class would keep none.

    References:
        Class-balanced loss (Cui et al. 2019, arXiv 1901.05555), section 5.1.

    Examples:
        >>> labels = np.repeat([0, 1, 2], 100)
        >>> np.bincount(labels[long_tailed(labels, 100, seed=0, num_classes=3)]).tolist()
        [100, 10, 1]
    """
    largest = int(np.bincount(labels, minlength=num_classes).min())
    # Rounded down, as published; 1e-9 for what would be whole but for the last bit.
    sizes = [int(largest * factor ** (-k / (num_classes - 1)) + 1e-9) for k in range(num_classes)]
    if sizes[-1] < 1:
        raise DataError(
            f"data.imbalance={factor:g}: of {largest} examples the last class would keep none; use "
            f"{largest} or less"
        )
    return _first_of_every_class(labels, sizes, seed)


def _first_of_every_class(labels: np.ndarray, sizes: list[int], seed: int) -> np.ndarray:
    """That many examples of each class, in an order that the seed fixes."""
    random = np.random.RandomState(seed)  # its stream is frozen, unlike default_rng's
    kept = [random.permutation(np.flatnonzero(labels == k))[:n] for k, n in enumerate(sizes)]
    return np.sort(np.concatenate(kept))


def check_balanced(labels: np.ndarray, fraction: float, num_classes: int) -> None:
    """Checks that a held-out split holds every class equally often, up to rounding.

    Raises:
        DataError: it does not.

    Examples:
        >>> check_balanced(np.array([0, 0, 1, 1]), 0.1, 2)
    """
    counts = np.bincount(labels, minlength=num_classes)
    if counts.max() - counts.min() > 1:
        raise DataError(
            f"data.validation_fraction={fraction}: the held-out split has {counts.min()} to "
            f"{counts.max()} examples of a class, and with data.imbalance it must be balanced; the "
            "dataset itself is not"
        )
