"""Decoded pixels kept beside the records: used only if they are the records', bit for bit."""

import io
import json
import os
import pathlib
import shutil
import tempfile
import threading

import numpy as np
import pytest

from tgeo_jax.data import decoded, normalisation, sources

FIELDS = ("images", "labels", "ids")


@pytest.fixture
def prepared(digits_dir, tmp_path):
    """The digits, undecoded, in a folder of the test's own."""
    shutil.copytree(
        digits_dir,
        tmp_path / "tfds",
        ignore=shutil.ignore_patterns("decoded.*", "compiled", "teacher_logits"),
    )
    return sources.builder("digits", str(tmp_path / "tfds"))


@pytest.fixture
def decodings(monkeypatch):
    """The splits that were decoded, in order."""
    done, decode = [], sources._decode_all

    def counted(dataset, split):
        done.append(split)
        return decode(dataset, split)

    monkeypatch.setattr(sources, "_decode_all", counted)
    return done


def file_of(prepared, split="train"):
    return pathlib.Path(prepared.data_dir) / f"decoded.{split}.npz"


def record_of(prepared, split="train"):
    (record,) = prepared.info.splits[split].filepaths
    return pathlib.Path(record)


def temporaries(prepared):
    return [path.name for path in pathlib.Path(prepared.data_dir).glob(".decoded*")]


def assert_same(found, expected):
    for field in FIELDS:
        one, other = getattr(found, field), getattr(expected, field)
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert one.tobytes() == other.tobytes()
        assert one.flags.c_contiguous
        assert one.flags.writeable


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_second_time_nothing_is_decoded_and_every_bit_is_the_same(prepared, split, monkeypatch):
    expected = sources._decode_all(prepared, split)
    assert_same(sources.read(prepared, split), expected)

    def refuse(*_):
        raise AssertionError("decoded again")

    monkeypatch.setattr(sources, "_decode", refuse)
    assert_same(sources.read(prepared, split), expected)


def test_each_split_has_one_file_that_all_may_read_and_nothing_else_is_left(prepared):
    before = set(os.listdir(prepared.data_dir))
    for split in ("train", "test", "train"):
        sources.read(prepared, split)
    new = set(os.listdir(prepared.data_dir)) - before
    assert new == {"decoded.train.npz", "decoded.test.npz"}
    assert file_of(prepared).stat().st_mode & 0o777 == 0o644


def other_pixel(content):
    """One bit of a pixel, and a file that zipfile and numpy take for whole."""
    with np.load(io.BytesIO(content)) as stored:
        arrays = dict(stored)
    arrays["images"][5, 3, 3] ^= 1
    whole = io.BytesIO()
    np.savez(whole, **arrays)
    return whole.getvalue()


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[: len(content) // 2],
        lambda content: content[:-1],
        lambda content: content[:9000] + bytes([content[9000] ^ 1]) + content[9001:],
        lambda content: bytes(len(content)),
        lambda content: b"no archive at all",
        lambda content: content.replace(b"'|u1'", b"'|O8'"),
        lambda content: content.replace(b"labels.npy", b"babels.npy"),
        other_pixel,
    ],
    ids=["empty", "half", "torn", "bit", "zeros", "text", "objects", "name", "pixel"],
)
def test_a_damaged_file_is_ignored_and_replaced(damage, prepared, decodings):
    expected = sources.read(prepared, "train")
    content = file_of(prepared).read_bytes()
    damaged = damage(content)
    assert damaged != content
    file_of(prepared).write_bytes(damaged)
    for _ in range(2):
        assert_same(sources.read(prepared, "train"), expected)
    assert decodings == ["train", "train"]  # for the first reading and after the damage
    with np.load(file_of(prepared), allow_pickle=False) as stored:
        assert set(stored.files) == {"header", *FIELDS}


def touched(record):
    stat = record.stat()
    os.utime(record, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))


def longer(record):
    stat = record.stat()
    record.write_bytes(record.read_bytes() + b"more")
    os.utime(record, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def renamed(record):
    record.rename(record.with_name("other"))


@pytest.mark.parametrize("change", [touched, longer, renamed])
def test_other_records_make_the_file_stale(change, tmp_path):
    path, record = tmp_path / "decoded.npz", tmp_path / "record"
    record.write_bytes(b"1")

    def numbered(number):
        (now,) = set(tmp_path.iterdir()) - {path}
        arrays = decoded.load_or_decode(path, [now], lambda: {"x": np.int32([number])})
        return arrays["x"].tolist()

    assert [numbered(1), numbered(2)] == [[1], [1]]
    change(record)
    assert [numbered(3), numbered(4)] == [[3], [3]]


def test_a_changed_record_file_is_decoded_again(prepared, decodings):
    sources.read(prepared, "train")
    touched(record_of(prepared))
    for _ in range(2):
        sources.read(prepared, "train")
    assert decodings == ["train", "train"]


def test_records_that_change_while_they_are_decoded_make_the_file_stale(tmp_path):
    path, record = tmp_path / "decoded.npz", tmp_path / "record"
    record.write_bytes(b"1")

    def decode():
        touched(record)
        return {"x": np.int32([1])}

    decoded.load_or_decode(path, [record], decode)
    arrays = decoded.load_or_decode(path, [record], lambda: {"x": np.int32([2])})
    assert arrays["x"].tolist() == [2]


def test_the_file_of_another_split_is_not_taken(prepared):
    sources.read(prepared, "test")
    shutil.copy(file_of(prepared, "test"), file_of(prepared, "train"))
    expected = sources._decode_all(prepared, "train")
    assert_same(sources.read(prepared, "train"), expected)


@pytest.mark.parametrize(
    ("module", "function"), [(tempfile, "mkstemp"), (os, "chmod"), (os, "replace")]
)
def test_a_folder_that_cannot_be_written_is_decoded_every_time(
    module, function, prepared, decodings, monkeypatch
):
    expected = sources._decode_all(prepared, "test")
    decodings.clear()

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(module, function, refuse)
    for _ in range(2):
        assert_same(sources.read(prepared, "test"), expected)
    assert decodings == ["test", "test"]
    assert not file_of(prepared, "test").exists()
    assert temporaries(prepared) == []


def test_an_interrupted_writer_leaves_nothing(prepared, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", interrupt)
    with pytest.raises(KeyboardInterrupt):
        sources.read(prepared, "test")
    assert not file_of(prepared, "test").exists()
    assert temporaries(prepared) == []


def test_several_may_write_and_read_at_once(tmp_path):
    path, record = tmp_path / "decoded.npz", tmp_path / "record"
    record.write_bytes(b"1")
    arrays = {"x": np.arange(200_000, dtype=np.int32)}
    found, origin = [], decoded._origin([record])

    def write():
        for _ in range(5):
            decoded._write(path, origin, arrays)

    decoded._write(path, origin, arrays)
    writers = [threading.Thread(target=write) for _ in range(4)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        found.append(decoded._read(path, origin))
    assert found
    for one in found:  # None would be half a file
        np.testing.assert_array_equal(one["x"], arrays["x"])
    assert {entry.name for entry in tmp_path.iterdir()} == {"decoded.npz", "record"}


def test_nothing_pickled_is_loaded(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "pickled"),)

    path, record = tmp_path / "decoded.npz", tmp_path / "record"
    record.write_bytes(b"1")
    header = json.dumps({**decoded._origin([record]), "sha256": ""}).encode()
    harmful = np.empty(1, object)
    harmful[0] = Evil()
    np.savez(path, header=np.frombuffer(header, np.uint8), x=harmful)
    arrays = decoded.load_or_decode(path, [record], lambda: {"x": np.int32([2])})
    assert arrays["x"].tolist() == [2]
    assert not (tmp_path / "pickled").exists()


# Mean and standard deviation.


@pytest.mark.parametrize("shape", [(1200, 7, 5, 3), (3, 8, 8, 1), (512, 4, 4, 3), (513, 4, 4, 2)])
@pytest.mark.parametrize("values", [(0, 256), (255, 256), (0, 1), (250, 256)])
def test_statistics_of_bytes_are_those_of_numpy(shape, values):
    images = np.random.default_rng(0).integers(*values, shape).astype(np.uint8)
    channels = [np.ascontiguousarray(images[..., c]) / np.float64(255) for c in range(shape[-1])]
    mean, std = normalisation.statistics(images)
    np.testing.assert_allclose(mean, [c.mean() for c in channels], rtol=1e-12)
    # Of a constant numpy leaves its own rounding, which is all of it.
    atol = 1e-13 if values[1] - values[0] == 1 else 0
    np.testing.assert_allclose(std, [c.std() for c in channels], rtol=1e-12, atol=atol)
    assert {type(number) for number in (*mean, *std)} == {float}


def test_statistics_do_not_overflow():
    images = np.full((normalisation.IMAGES_AT_ONCE + 1, 300, 300, 1), 255, np.uint8)
    images[0] = 254
    mean, std = normalisation.statistics(images)
    share = 1 / len(images)
    np.testing.assert_allclose(mean, [(255 - share) / 255], rtol=1e-12)
    np.testing.assert_allclose(std, [np.sqrt(share * (1 - share)) / 255], rtol=1e-12)


def test_statistics_of_other_types_are_as_they_were():
    images = np.random.default_rng(0).uniform(0, 255, (20, 4, 4, 3)).astype(np.float32)
    pixels = images.reshape(-1, 3) / np.float64(255)
    expected = (tuple(pixels.mean(0).tolist()), tuple(pixels.std(0).tolist()))
    assert normalisation.statistics(images) == expected
