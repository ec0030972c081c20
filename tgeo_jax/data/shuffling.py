"""Random orders that nobody keeps: where a permutation puts some numbers, on the host."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_ROUNDS = 8  # an even number: both halves have their widths back


def keys(*seeds: int) -> np.ndarray:
    """What one of the permutations is told apart by, uint32 [8].

    Args:
        *seeds: integers >= 0. A trailing 0 makes no difference.
    """
    return np.random.SeedSequence(seeds).generate_state(_ROUNDS, np.uint32)


def permuted(keys_R: Sequence[int] | np.ndarray, places: np.ndarray, count: int) -> np.ndarray:
    """Where a random permutation of `count` numbers puts some of them, without making the rest.

    The algorithm is that of `resident.permuted`, in NumPy: worker processes have no JAX.

    Args:
        keys_R: from `keys`.
        places: integers in [0, count), [B].
        count: how many numbers, at most 2**60.

    Returns:
        int64 [B], in [0, count).

    Examples:
        >>> sorted(permuted(keys(0), np.arange(5), 5).tolist())
        [0, 1, 2, 3, 4]
    """
    bits = max(2, (count - 1).bit_length())
    values_B = _shuffled(keys_R, np.asarray(places, np.uint64), bits)
    while len(outside := np.flatnonzero(values_B >= count)):
        values_B[outside] = _shuffled(keys_R, values_B[outside], bits)
    return values_B.astype(np.int64)


def _shuffled(keys_R: Sequence[int] | np.ndarray, values_B: np.ndarray, bits: int) -> np.ndarray:
    low = bits // 2  # bits of the right half; the halves change places every round
    high = bits - low
    left_B = (values_B >> np.uint64(low)).astype(np.uint32)
    right_B = (values_B & np.uint64(2**low - 1)).astype(np.uint32)
    for key in keys_R:
        mixed_B = _mixed(right_B ^ np.uint32(key)) & np.uint32(2**high - 1)
        left_B, right_B = right_B, left_B ^ mixed_B
        low, high = high, low
    return (left_B.astype(np.uint64) << np.uint64(low)) | right_B


def _mixed(values: np.ndarray) -> np.ndarray:
    """Every bit of a word depends on all of them (MurmurHash3's finaliser)."""
    values = (values ^ (values >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    values = (values ^ (values >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return values ^ (values >> np.uint32(16))
