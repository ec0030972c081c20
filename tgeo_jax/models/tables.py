"""Embedding tables: one array for all fields of a categorical table, and which row an index means.

Field f of F has indices in [0, vocabulary[f]), 0 for what is unknown. Its rows lie behind those of
the fields before it. A network that is given `held` rows gets the numbers of rows in place of
indices: see `tgeo_jax.rows`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import initializers

from tgeo_jax.state import ROWS

Array = jax.Array
_small = initializers.normal(0.01)


def field_sizes(vocabulary: Sequence[int], hash_buckets: int = 0) -> tuple[int, ...]:
    """Rows of each field: one for each value, or for each bucket where there are more values.

    Args:
        vocabulary: values of each field, the unknown one counted.
        hash_buckets: 0, or at least 2.

    Raises:
        ValueError: a wrong number of buckets, or more rows than 32 bits can count.

    Examples:
        >>> field_sizes((3, 1000)), field_sizes((3, 1000), hash_buckets=8)
        ((3, 1000), (3, 8))
    """
    if hash_buckets < 0 or hash_buckets == 1:
        raise ValueError(
            f"hash_buckets={hash_buckets}: must be 0 for a row of each value, or at least 2, of "
            "which the first is that of the unknown value"
        )
    sizes = tuple(min(size, hash_buckets or size) for size in vocabulary)
    if sum(sizes) >= 2**31:
        raise ValueError(
            f"hash_buckets={hash_buckets}: the fields have {sum(sizes):,} rows together, and 2**31 "
            "or more cannot be counted; use fewer buckets"
        )
    return sizes


def row_numbers(ids_BxF: Array, vocabulary: Sequence[int], hash_buckets: int = 0) -> Array:
    """The row of every index: `offset_f + bucket_f(id)`.

    `bucket_f(id) = id` where field f has at most `hash_buckets` values or nothing is hashed; else 0
    for the unknown value 0, and `1 + mix(id xor (f + 1) * 0x9E3779B9) mod (hash_buckets - 1)` for
    the others. `mix` is the finaliser of MurmurHash3 on 32 bits: the same on every device and in
    every process, and each field has a hash of its own.

    Args:
        ids_BxF: int32, column f in [0, vocabulary[f]).
        vocabulary: values of each field.
        hash_buckets: as in `field_sizes`.

    Returns:
        int32 [B, F], in [0, sum of the fields' sizes).

    Examples:
        >>> print(row_numbers(jnp.array([[1, 0], [0, 2]]), (2, 3)))
        [[1 2]
         [0 4]]
    """
    sizes = field_sizes(vocabulary, hash_buckets)
    offsets_1xF = np.cumsum((0, *sizes[:-1]), dtype=np.int32)[None]
    if sizes == tuple(vocabulary):
        return ids_BxF + offsets_1xF
    salts_1xF = (np.arange(1, len(sizes) + 1, dtype=np.uint64) * 0x9E3779B9 % 2**32)[None]
    mixed = _mix(ids_BxF.astype(jnp.uint32) ^ salts_1xF.astype(np.uint32))
    hashed = 1 + (mixed % np.uint32(hash_buckets - 1)).astype(jnp.int32)
    is_hashed_1xF = np.asarray(sizes)[None] < np.asarray(vocabulary)[None]
    return jnp.where(is_hashed_1xF & (ids_BxF > 0), hashed, ids_BxF) + offsets_1xF


def _mix(x: Array) -> Array:
    """The finaliser of MurmurHash3 on uint32."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
    return x ^ (x >> np.uint32(16))


def check_ids(name: str, ids: Array, vocabulary: Sequence[int], *, held: int = 0) -> None:
    """Checks what a network of categorical tables is called with.

    Raises:
        ValueError: no vocabulary, floats, images, or another number of fields.

    Examples:
        >>> check_ids("deepfm", jnp.ones((1, 2)), ())
        Traceback (most recent call last):
        ...
        ValueError: model 'deepfm' looks rows up by indices of categories; its input is float32 \
[1, 2]: use 'mlp' or 'row_encoder' for numbers, and a network for images for those
    """
    is_table = ids.ndim == 2 and jnp.issubdtype(ids.dtype, jnp.integer) and vocabulary
    if not is_table or jnp.dtype(ids.dtype).itemsize < 4:
        raise ValueError(
            f"model {name!r} looks rows up by indices of categories; its input is {ids.dtype} "
            f"{list(ids.shape)}: use 'mlp' or 'row_encoder' for numbers, and a network for images "
            "for those"
        )
    if not held and ids.shape[1] != len(vocabulary):
        raise ValueError(
            f"model {name!r}: the input has {ids.shape[1]} fields, the vocabulary {len(vocabulary)}"
        )


def check_dropout(dropout: float) -> None:
    """Checks the share of values that are dropped.

    Raises:
        ValueError: not in [0, 1).

    Examples:
        >>> check_dropout(0.1)
    """
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout}: must lie in [0, 1)")


class Table(nn.Module):
    """One row of `width` numbers for each value of each field, [B, F] -> [B, F, width].

    Attributes:
        vocabulary: values of each field.
        width: of a row.
        hash_buckets: as in `field_sizes`.
        held: where inputs are numbers of rows, how many rows there are; 0: inputs are indices.
        init: of the rows.

    Examples:
        >>> table = Table((2, 3), 4)
        >>> rows, _ = table.init_with_output(jax.random.key(0), jnp.array([[1, 0]]))
        >>> rows.shape
        (1, 2, 4)
    """

    vocabulary: Sequence[int]
    width: int
    hash_buckets: int = 0
    held: int = 0
    init: Any = _small

    @nn.compact
    def __call__(self, ids_BxF: Array) -> Array:
        if self.width < 1:
            raise ValueError(f"a row of {self.width} numbers: must have at least 1")
        size = self.held or sum(field_sizes(self.vocabulary, self.hash_buckets))
        rows_VxD = self.param(ROWS, self.init, (size, self.width))
        if not self.held:
            ids_BxF = row_numbers(ids_BxF, self.vocabulary, self.hash_buckets)
        return jnp.take(rows_VxD, ids_BxF, axis=0, mode="clip")
