"""What is learned from a table's training rows alone, before a network sees any row.

Numeric tables: what stands for infinity and NaN, and one-hot vocabularies. Categorical tables:
which values get an id. Scaling follows, see `normalisation`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tgeo_jax.data.layouts import MISSING, Layout


@dataclasses.dataclass(frozen=True)
class Fitted:
    """How rows of a table become input.

    Attributes:
        encode: raw rows [N, F] -> float32 [N, F'] of a numeric table, int32 [N, F] of a categorical
            one: ids in [0, vocabulary[f]), 0 for values that are unknown or rare.
        feature_names: of the columns that come out.
        vocabulary: of a categorical table, one size for each column; else ().
    """

    encode: Callable[[np.ndarray], np.ndarray]
    feature_names: tuple[str, ...]
    vocabulary: tuple[int, ...] = ()


def fit(
    layout: Layout, about: Mapping[str, Any], training_rows: np.ndarray, min_count: int = 1
) -> Fitted:
    """Fits a table's encoding.

    Args:
        layout: of the table.
        about: what its files held, `info.metadata` of its builder.
        training_rows: raw, [N, F].
        min_count: categorical tables only: a value that fewer training rows have is rare.

    Examples:
        >>> from tgeo_jax.data import attacks
        >>> about = {"values": {"protocol_type": ["tcp"], "service": ["http"], "flag": ["SF"]}}
        >>> fitted = fit(attacks.NSL_KDD, about, np.zeros((2, 41)))
        >>> fitted.feature_names[:4]
        ('duration', 'protocol_type=tcp', 'service=http', 'flag=SF')
    """
    if layout.kind == "categorical":
        return _vocabularies(layout, training_rows, min_count)
    return _numeric(layout, about, training_rows)


def _numeric(layout: Layout, about: Mapping[str, Any], training_rows: np.ndarray) -> Fitted:
    columns = tuple(about.get("columns", layout.columns))
    seen: dict[str, list[str]] = {}
    for column in layout.symbolic:
        found = np.unique(training_rows[:, columns.index(column)]).astype(int)
        seen[column] = sorted(about["values"][column][index] for index in found)
    stand_ins = _stand_ins(training_rows)

    def encode(rows: np.ndarray) -> np.ndarray:
        parts = []
        for index, column in enumerate(columns):
            values = rows[:, index, None]
            if column in seen:
                known = [about["values"][column].index(text) for text in seen[column]]
                parts.append(values == np.array(known))
                continue
            low, middle, high = stand_ins[:, index]
            parts.append(np.nan_to_num(values, nan=middle, posinf=high, neginf=low))
        with np.errstate(over="ignore"):  # what float32 cannot hold is refused before training
            return np.concatenate(parts, axis=1, dtype=np.float32, casting="unsafe")

    names = [
        name
        for column in columns
        for name in ([f"{column}={v}" for v in seen[column]] if column in seen else [column])
    ]
    return Fitted(encode, tuple(names))


def _stand_ins(rows: np.ndarray) -> np.ndarray:
    """Minimum, median and maximum of each column's finite values, [3, F]; 0 where there is none.

    They stand for -inf, NaN and inf.
    """
    finite = [column[np.isfinite(column)] for column in rows.T]
    return np.array(
        [(c.min(), np.median(c), c.max()) if len(c) else (0.0, 0.0, 0.0) for c in finite]
    ).T


def _vocabularies(layout: Layout, training_rows: np.ndarray, min_count: int) -> Fitted:
    known = []
    for column in buckets(training_rows, layout.buckets).T:
        values, counts = np.unique(column, return_counts=True)
        known.append(values[counts >= min_count])

    def encode(rows: np.ndarray) -> np.ndarray:
        ids = np.zeros(rows.shape, np.int32)
        for index, column in enumerate(buckets(rows, layout.buckets).T):
            values = known[index]
            place = np.searchsorted(values, column)
            place[place == len(values)] = 0  # beyond the last: compared with any, not found
            if len(values):
                ids[:, index] = np.where(values[place] == column, place + 1, 0)
        return ids

    return Fitted(encode, layout.columns, tuple(len(values) + 1 for values in known))


def hashed(rows: np.ndarray, counts: int, hash_buckets: int) -> np.ndarray:
    """Ids of a categorical table without a vocabulary: a hash of every value.

    `id_f(v) = 0` where the field is empty, else
    `1 + mix(v xor (f + 1) * 0x9E3779B97F4A7C15) mod (hash_buckets - 1)`, where v is the value after
    `buckets`, all numbers have 64 bits, and `mix` is the finaliser of MurmurHash3 on them. Each
    field has a hash of its own, the same on every machine; values that share an id cannot be told
    apart.

    Args:
        rows: int64 [N, F].
        counts: how many of the first columns are counts, see `buckets`.
        hash_buckets: ids of each field, at least 2.

    Returns:
        int32 [N, F], in [0, hash_buckets).

    Examples:
        >>> ids = hashed(np.array([[MISSING, 7], [7, 7]]), 0, 100)
        >>> ids[0, 0], ids[0, 1] == ids[1, 1], ids[1, 0] == ids[1, 1]
        (np.int32(0), np.True_, np.False_)
    """
    salts_F = np.arange(1, rows.shape[1] + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed = buckets(rows, counts).view(np.uint64) ^ salts_F[None]
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        mixed = (mixed ^ (mixed >> np.uint64(33))) * np.uint64(factor)
    mixed ^= mixed >> np.uint64(33)
    ids = 1 + (mixed % np.uint64(hash_buckets - 1)).astype(np.int32)
    return np.where(rows == MISSING, np.int32(0), ids)


def buckets(rows: np.ndarray, count: int) -> np.ndarray:
    """Counts x > 2 of the first columns become 2 + floor(ln(x)^2); the rest, and MISSING, stays.

    Args:
        rows: int64 [N, F].
        count: how many columns.

    References:
        The winning features of the Criteo display advertising challenge (Juan et al. 2014).

    Examples:
        >>> buckets(np.array([[-1, 7], [2, 7], [3, 7], [1000, 7]]), 1)[:, 0].tolist()
        [-1, 2, 3, 49]
    """
    if not count:
        return rows
    first = rows[:, :count]
    logs = np.log(np.maximum(first, 3).astype(np.float64))
    values = np.where(first > 2, 2 + logs**2, first).astype(np.int64)
    return np.concatenate([values, rows[:, count:]], axis=1)
