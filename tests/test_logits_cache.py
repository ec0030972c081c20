"""Stored teacher logits: what was written comes back, or the reader is told why not."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from tgeo_jax.data import fingerprints, logits_cache
from tgeo_jax.errors import DataError

HEADER = {
    "teacher": "a" * 64,
    "dataset": "b" * 64,
    "normalisation": [[0.1], [1 / 3]],
    "views": 2,
    "augmentation": {"seed": 5, "crop_padding": 1, "flip": False},
}
# 150 examples: more than two of array_record's groups.
LOGITS = (20 * np.random.RandomState(0).randn(150, 3, 4)).astype(np.float32)
LOGITS[0, 0] = [65504, -65504, 6e-8, -0.0]  # the largest, the smallest, and a signed zero


def never():
    raise AssertionError("what is stored must not be computed again")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "teacher_logits" / "x.array_record"


@pytest.fixture
def stored(path):
    logits_cache.load_or_compute(path, HEADER, lambda: LOGITS)
    return path


def test_logits_come_back_as_the_float16_that_was_written(path):
    first = logits_cache.load_or_compute(path, HEADER, lambda: LOGITS)
    again = logits_cache.load_or_compute(path, HEADER, never)
    for found in (first, again):
        assert (found.dtype, found.shape) == (np.float16, (150, 3, 4))
        assert found.tobytes() == LOGITS.astype("<f2").tobytes()


def test_the_header_lies_first_and_a_record_for_each_example_behind_it(stored):
    reader = ArrayRecordReader(str(stored))
    header, *rows = reader.read_all()
    reader.close()
    assert json.loads(header) == {"format": 1, **HEADER, "shape": [150, 3, 4]}
    assert len(rows) == 150
    assert rows[7] == LOGITS[7].astype("<f2").tobytes()


def test_nothing_but_the_file_is_left_beside_it(stored):
    assert [entry.name for entry in stored.parent.iterdir()] == ["x.array_record"]


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("teacher", "c" * 64, "aaaaaaaaaaaa there, cccccccccccc here"),
        ("dataset", "c" * 64, "bbbbbbbbbbbb there, cccccccccccc here"),
        ("normalisation", [[0.1], [0.25]], "there"),
        ("views", 3, "2 there, 3 here"),
        ("augmentation", {**HEADER["augmentation"], "seed": 6}, "there"),
        ("augmentation", None, "None here"),
    ],
)
def test_logits_of_something_else_are_refused_by_what_differs(stored, field, value, told):
    said = (
        rf"^{re.escape(str(stored))}: stale: these logits are of another {field} "
        rf"\(.*{re.escape(told)}.*\); delete the file .*, or set role\.cached\.name"
    )
    with pytest.raises(DataError, match=said):
        logits_cache.load_or_compute(stored, {**HEADER, field: value}, never)
    assert stored.exists()


def test_what_differs_can_be_told_apart(stored):
    other = {**HEADER, "augmentation": {**HEADER["augmentation"], "crop_padding": 2}}
    with pytest.raises(DataError) as caught:
        logits_cache.load_or_compute(stored, other, never)
    there, here = re.search(r"\((.*) there, (.*) here\)", str(caught.value)).groups()
    assert there != here


def test_everything_that_differs_is_named(stored):
    with pytest.raises(DataError, match=r"another teacher, views \(aaaaaaaaaaaa, 2 there"):
        logits_cache.load_or_compute(stored, {**HEADER, "teacher": "c", "views": 0}, never)


def _rewritten(path, header, rows):
    writer = ArrayRecordWriter(str(path), "group_size:64")
    for record in (json.dumps(header).encode(), *rows):
        writer.write(record)
    writer.close()


def test_another_format_of_the_file_is_stale(stored):
    rows = [row.astype(np.float16).tobytes() for row in LOGITS]
    _rewritten(stored, {**HEADER, "format": 2, "shape": [150, 3, 4]}, rows)
    with pytest.raises(DataError, match=r"stale: these logits are of another format \(2 there, 1"):
        logits_cache.load_or_compute(stored, HEADER, never)


def _flipped(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 0xFF]) + data[position + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda data: b"", id="empty"),
        pytest.param(lambda data: data[: len(data) // 2], id="half"),
        pytest.param(lambda data: data[:-1], id="without_its_last_byte"),
        pytest.param(lambda data: _flipped(data, 2000), id="a_byte_of_the_logits"),
        pytest.param(lambda data: b"not an array_record" * 9000, id="something_else"),
    ],
)
def test_a_damaged_file_is_named_with_what_to_do(stored, damage):
    stored.write_bytes(damage(stored.read_bytes()))
    said = rf"^{re.escape(str(stored))}: cannot be read \(.*\); delete the file to compute it again"
    with pytest.raises(DataError, match=said):
        logits_cache.load_or_compute(stored, HEADER, never)


def test_missing_rows_are_noticed(stored):
    rows = [row.astype(np.float16).tobytes() for row in LOGITS[:-1]]
    _rewritten(stored, {**HEADER, "format": 1, "shape": [150, 3, 4]}, rows)
    with pytest.raises(DataError, match=r"cannot be read \(.*\); delete the file"):
        logits_cache.load_or_compute(stored, HEADER, never)


def test_a_record_that_is_no_header_is_noticed(stored):
    writer = ArrayRecordWriter(str(stored), "group_size:64")
    writer.write(b"\x00\xff\x00")
    writer.close()
    with pytest.raises(DataError, match=r"cannot be read \(.*\); delete the file"):
        logits_cache.load_or_compute(stored, HEADER, never)


@pytest.mark.parametrize(("value", "told"), [(65520.0, "6.552e\\+04"), (-1e6, "1e\\+06")])
def test_logits_that_float16_cannot_hold_are_named_and_nothing_is_written(path, value, told):
    logits = LOGITS.copy()
    logits[17, 2, 1] = value
    said = (
        rf"^role\.name='cached': .*training example 17 reach {told}, more than float16 holds "
        r"\(65504\); use role\.name='frozen'$"
    )
    with pytest.raises(DataError, match=said), np.errstate(over="ignore"):
        logits_cache.load_or_compute(path, HEADER, lambda: logits)
    assert not path.exists()


def test_logits_that_are_not_finite_are_named(path):
    logits = LOGITS.copy()
    logits[3, 0, 0] = np.nan
    with pytest.raises(DataError, match="training example 3 reach nan"):
        logits_cache.load_or_compute(path, HEADER, lambda: logits)
    assert not path.exists()


def test_an_exception_while_computing_leaves_no_file(path):
    with pytest.raises(KeyboardInterrupt):
        logits_cache.load_or_compute(path, HEADER, _interrupted)
    assert not path.exists()
    found = logits_cache.load_or_compute(path, HEADER, lambda: LOGITS)
    assert found.shape == LOGITS.shape


def _interrupted():
    raise KeyboardInterrupt


class _FullDisk:
    """Fails at the hundredth record."""

    def __init__(self, *arguments):
        self._real, self._left = ArrayRecordWriter(*arguments), 100

    def write(self, record):
        self._left -= 1
        if not self._left:
            raise OSError("No space left on device")
        self._real.write(record)

    def close(self):
        self._real.close()


def test_an_exception_while_writing_leaves_no_file_under_its_name(path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(logits_cache, "ArrayRecordWriter", _FullDisk)
        with pytest.raises(OSError, match="No space left"):
            logits_cache.load_or_compute(path, HEADER, lambda: LOGITS)
    assert not path.exists()
    found = logits_cache.load_or_compute(path, HEADER, lambda: LOGITS)
    assert found.tobytes() == LOGITS.astype(np.float16).tobytes()


TREE = {"a": {"w": np.float32([1, 2, 3, 4])}, "b": np.float32([[5], [6]])}


def test_equal_trees_have_one_fingerprint_whatever_their_order_and_memory():
    reordered = {"b": np.asfortranarray(TREE["b"]), "a": {"w": np.float32([0, 1, 2, 3, 4])[1:]}}
    assert fingerprints.of(TREE) == fingerprints.of(reordered)
    strided = {"a": {"w": np.repeat(TREE["a"]["w"], 2)[::2]}, "b": TREE["b"]}
    assert fingerprints.of(TREE) == fingerprints.of(strided)


@pytest.mark.parametrize(
    "other",
    [
        pytest.param({**TREE, "a": {"w": np.float32([1, 2, 3, 5])}}, id="a_value"),
        pytest.param({**TREE, "a": {"w": np.float32([1, 3, 2, 4])}}, id="the_order_of_values"),
        pytest.param({**TREE, "a": {"v": TREE["a"]["w"]}}, id="a_name"),
        pytest.param({**TREE, "a": TREE["a"]["w"]}, id="a_level"),
        pytest.param({**TREE, "a": {"w": TREE["a"]["w"].view(np.int32)}}, id="a_type"),
        pytest.param({**TREE, "b": np.float32([[5, 6]])}, id="a_shape"),
        pytest.param({**TREE, "c": np.zeros(0, np.float32)}, id="an_empty_leaf"),
        pytest.param({"a": TREE["a"]}, id="a_leaf_less"),
    ],
)
def test_a_fingerprint_changes_with(other):
    assert fingerprints.of(other) != fingerprints.of(TREE)
