"""Stored rows of tables: many records parsed at once."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from tensorflow_datasets.proto import tf_example_pb2

_ENTRIES = ("label", "row")


class _Form(NamedTuple):
    """How the bytes of a record lie: everything but one row and one label is always the same."""

    fixed_L: np.ndarray  # bool, which bytes
    bytes_L: np.ndarray
    row_at: int
    label_at: int


def parsed(
    records: Sequence[bytes], columns: int, dtype: type[np.generic]
) -> tuple[np.ndarray, np.ndarray]:
    """Rows and labels of records as TFDS stores them.

    A record is an Example message of two entries, one after the other. Both have one width where
    the label is below 128, so the numbers lie at the same place in all records and are taken out
    of all at once; a record that looks otherwise is parsed by itself.

    Args:
        records: B of them.
        columns: F.
        dtype: of eight bytes.

    Returns:
        rows [B, F] of that type, labels [B] int32.

    Raises:
        ValueError: a record that holds something else.

    Examples:
        >>> row = np.arange(2, dtype=np.int64)
        >>> parsed([_serialised(row.tobytes(), 1)], 2, np.int64)
        (array([[0, 1]]), array([1], dtype=int32))
    """
    width = columns * np.dtype(dtype).itemsize
    rows_BxW = np.empty((len(records), width), np.uint8)
    labels_B = np.empty(len(records), np.int32)
    left = list(range(len(records)))
    for form in _forms(width):
        alike = [index for index in left if len(records[index]) == len(form.bytes_L)]
        packed = np.frombuffer(b"".join([records[index] for index in alike]), np.uint8)
        packed_BxL = packed.reshape(len(alike), len(form.bytes_L))
        same_B = (packed_BxL == form.bytes_L)[:, form.fixed_L].all(1)
        found = np.array(alike, int)[same_B]
        rows_BxW[found] = packed_BxL[same_B, form.row_at : form.row_at + width]
        labels_B[found] = packed_BxL[same_B, form.label_at]
        left = np.setdiff1d(left, found, assume_unique=True).tolist()
        if not left:
            break
    for index in left:
        feature = tf_example_pb2.Example.FromString(records[index]).features.feature
        values, label = feature["row"].bytes_list.value, feature["label"].int64_list.value
        if len(values) != 1 or len(values[0]) != width or len(label) != 1:
            raise ValueError(f"a record is not a label and {columns} values of 8 bytes")
        rows_BxW[index] = np.frombuffer(values[0], np.uint8)
        labels_B[index] = label[0]
    return rows_BxW.view(dtype), labels_B


@functools.cache
def _forms(width: int) -> tuple[_Form, ...]:
    """Either entry may come first: a map has no order."""
    blank = _serialised(bytes(width), 0)
    entries = {name: _entry(name, bytes(width), 0) for name in _ENTRIES}
    head = blank[: len(blank) - sum(map(len, entries.values()))]
    found = []
    for order in (_ENTRIES, _ENTRIES[::-1]):
        # What varies is the end of an entry.
        ends = dict(zip(order, np.cumsum([len(entries[name]) for name in order]), strict=True))
        row_at, label_at = (
            len(head) + int(ends[name]) - size for name, size in (("row", width), ("label", 1))
        )
        text = head + b"".join(entries[name] for name in order)
        fixed_L = np.ones(len(text), bool)
        fixed_L[row_at : row_at + width] = fixed_L[label_at] = False
        found.append(_Form(fixed_L, np.frombuffer(text, np.uint8), row_at, label_at))
    return tuple(found)


def _entry(name: str, row: bytes, label: int) -> bytes:
    features = tf_example_pb2.Example().features
    if name == "row":
        features.feature[name].bytes_list.value.append(row)
    else:
        features.feature[name].int64_list.value.append(label)
    return bytes(features.SerializeToString())


def _serialised(row: bytes, label: int) -> bytes:
    example = tf_example_pb2.Example()
    for name in _ENTRIES:
        example.features.MergeFromString(_entry(name, row, label))
    return bytes(example.SerializeToString())
