"""What inputs are normalised by: statistics of the examples that are not held out."""

from __future__ import annotations

import math

import numpy as np

from tgeo_jax.errors import ConfigError
from tgeo_jax.values import shown

Normalisation = tuple[tuple[float, ...], tuple[float, ...]]
IMAGES_AT_ONCE = 512  # their squares' sum stays below 2**32


def of(images: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...]) -> Normalisation:
    """What a dataset is normalised by: what is given, or what its training examples say.

    Args:
        images: [N, H, W, C], rows of a numeric table [N, F], or ids (int32), which have no scale.
        mean: given, by channel or feature; empty for that of these examples.
        std: likewise.

    Returns:
        (mean, std): of pixels in [0, 1]; of rows, minimum and range; of ids, () twice.

    Raises:
        ConfigError: given for another number of channels or features.

    Examples:
        >>> of(np.float32([[1], [3]]), (), ())
        ((1.0,), (2.0,))
    """
    if images.dtype == np.int32:  # ids have no scale
        return (), ()
    channels, what = images.shape[-1], "channel"
    if images.ndim == 2:
        what = "feature"
    for field, given in (("mean", mean), ("std", std)):
        if given and len(given) != channels:
            raise ConfigError(
                f"data.{field}={shown(given)}: must hold one number for each {what}, {channels}, "
                "or none for that of the training examples"
            )
    if mean and std:
        return mean, std
    found_mean, found_std = (minimum_and_range if images.ndim == 2 else statistics)(images)
    return mean or found_mean, std or found_std


def statistics(images: np.ndarray) -> Normalisation:
    """Mean and standard deviation of all pixels in [0, 1], by channel.

    Args:
        images: [N, H, W, C], bytes, or other numbers in [0, 255].

    Examples:
        >>> statistics(np.array([0, 255], np.uint8).reshape(2, 1, 1, 1))
        ((0.5,), (0.5,))
    """
    channels = images.shape[-1]
    if images.dtype != np.uint8:
        pixels = images.reshape(-1, channels) / np.float64(255)
        return tuple(pixels.mean(0).tolist()), tuple(pixels.std(0).tolist())
    # Integers are exact, and a few images at a time need no copy of all as float64.
    totals, squares = np.zeros((2, *images.shape[1:]), np.int64)
    for start in range(0, len(images), IMAGES_AT_ONCE):
        some = images[start : start + IMAGES_AT_ONCE]
        totals += some.sum(0, dtype=np.uint32)
        squares += np.square(some, dtype=np.uint16).sum(0, dtype=np.uint32)
    number = images.size // channels
    sums = totals.reshape(-1, channels).sum(0).tolist()
    sums_of_squares = squares.reshape(-1, channels).sum(0).tolist()
    # Python's integers do not overflow, and it divides them with a single rounding.
    return (
        tuple(total / (255 * number) for total in sums),
        tuple(
            math.sqrt((number * square - total**2) / (255 * number) ** 2)
            for total, square in zip(sums, sums_of_squares, strict=True)
        ),
    )


def minimum_and_range(
    rows: np.ndarray,
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Each feature's minimum and its distance to the maximum, 1 where that is 0.

    Args:
        rows: [N, F].

    Examples:
        >>> minimum_and_range(np.float32([[1, 5], [3, 5]]))
        ((1.0, 5.0), (2.0, 1.0))
    """
    low, high = rows.min(0).astype(np.float64), rows.max(0).astype(np.float64)
    return tuple(low.tolist()), tuple(np.where(high > low, high - low, 1).tolist())
