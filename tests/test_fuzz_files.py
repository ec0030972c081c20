"""Damaged files: each is an error of our own or made again, and nothing in one is ever executed."""

from __future__ import annotations

import io
import json
import os
import pathlib
import pickle
import shutil
import tarfile
import types
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests import pictures, tiny_cifar
from tests.test_fuzz import QUICK, _digits, teacher  # noqa: F401
from tgeo_jax import assemble, convert, models, partial, storage, writers
from tgeo_jax import config as configs
from tgeo_jax.data import cifar, crops, decoded, logits_cache, sources, streaming
from tgeo_jax.errors import CheckpointError, DataError, TgeoError
from tgeo_jax.metrics import Mean
from tgeo_jax.workdir import Workdir

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["step", "seed", "sums", "seconds", "data", "student", "name", "x"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)


@st.composite
def damage(draw: Any) -> Any:
    """A function that cuts a file, flips bits, drops or inserts some bytes, or replaces all."""
    kind = draw(st.sampled_from(("cut", "flip", "flip", "drop", "insert", "header", "other")))
    places = draw(st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=4))
    some, bit = draw(st.binary(max_size=12)), draw(st.integers(0, 7))

    def apply(content: bytes) -> bytes:
        first = int(places[0] * len(content))
        if kind == "cut":
            return content[:first]
        if kind == "flip":
            found = bytearray(content)
            for place in places:
                found[int(place * len(found))] ^= 1 << bit
            return bytes(found)
        if kind == "drop":
            return content[:first] + content[first + 1 + len(some) :]
        if kind == "insert":
            return content[:first] + some + content[first:]
        return some + content[len(some) :] if kind == "header" else some

    return apply


# Of JSON: such damage, or other JSON in its place.
DAMAGE = st.one_of(damage(), JSON.map(lambda value: lambda _: json.dumps(value).encode()))


# Caches: used where they are whole, made again or named where they are not.


@settings(QUICK, max_examples=150)
@given(damage())
def test_decoded_pixels_are_never_those_of_a_damaged_file(tmp_path, change):
    record, path = tmp_path / "record", tmp_path / "decoded.npz"
    record.write_bytes(b"1")
    arrays = {"images": np.arange(256, dtype=np.uint8), "labels": np.arange(4, dtype=np.int32)}
    path.unlink(missing_ok=True)
    decoded.load_or_decode(path, [record], lambda: arrays)
    path.write_bytes(change(path.read_bytes()))
    found = decoded.load_or_decode(path, [record], lambda: arrays)
    assert found.keys() == arrays.keys()
    assert all(found[name].tobytes() == arrays[name].tobytes() for name in arrays)


HEADER = {"teacher": "abc", "views": 0}


def _stored(path: pathlib.Path) -> np.ndarray:
    logits = np.linspace(-3, 3, 60, dtype=np.float32).reshape(20, 1, 3)
    return logits_cache.load_or_compute(path, HEADER, lambda: logits)


@settings(QUICK, max_examples=150)
@given(damage())
def test_stored_logits_are_the_ones_stored_or_refused(tmp_path, change):
    path = tmp_path / "logits.array_record"
    path.unlink(missing_ok=True)
    expected = _stored(path)
    path.write_bytes(change(path.read_bytes()))
    try:
        found = _stored(path)
    except DataError:
        return
    np.testing.assert_array_equal(found, expected)


@settings(QUICK, max_examples=40)
@given(JSON)
def test_logits_with_another_header_are_refused(tmp_path, header):
    path = tmp_path / "logits.array_record"
    writer = logits_cache.ArrayRecordWriter(str(path), "group_size:64")
    writer.write(json.dumps(header).encode())
    writer.write(b"\0" * 6)
    writer.close()
    with pytest.raises(DataError, match=r"logits\.array_record: "):
        _stored(path)


# What a run keeps.


@settings(QUICK, max_examples=200)
@given(DAMAGE)
def test_a_damaged_log_is_refused_but_for_its_last_line(tmp_path, change):
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": step, "seed": 0, "loss": 0.5} for step in (10, 20, 30)]
    path.write_bytes(change("".join(json.dumps(line) + "\n" for line in lines).encode()))
    try:
        found = writers.read_records(path)
    except DataError:
        return
    assert all(isinstance(record["step"], int) for record in found)


@settings(QUICK, max_examples=200)
@given(DAMAGE)
def test_damaged_counts_of_an_interrupted_run_are_left_out(tmp_path, change):
    path, sums = tmp_path / "partial.json", {"loss": Mean(np.ones(2), np.ones(2))}
    partial.write(path, partial.Partial(7, 1.5, sums))
    path.write_bytes(change(path.read_bytes()))
    found = partial.read(path, 7)
    assert found == partial.NOTHING or (found.step == 7 and isinstance(found.seconds, float))


@settings(QUICK, max_examples=200)
@given(st.sampled_from(("config", "result", "commits")), DAMAGE)
def test_a_damaged_file_of_a_run_is_named(tmp_path, name, change):
    folder, config = Workdir(tmp_path), configs.default()
    contents = {"config": configs.to_json(config), "result": '{"steps": 3}', "commits": '["a"]'}
    for each, content in contents.items():
        (tmp_path / f"{each}.json").write_text(content)
    path = tmp_path / f"{name}.json"
    path.write_bytes(change(path.read_bytes()))
    try:
        folder.check_same(config)
        folder.result(), folder.commits()
    except TgeoError as error:
        said = str(error)
    else:
        return
    assert str(tmp_path) in said


@settings(QUICK, max_examples=30)
@given(st.sampled_from(("config", "result")), DAMAGE)
def test_a_teacher_with_a_damaged_file_is_refused(digits_dir, teacher, name, change):  # noqa: F811
    path = pathlib.Path(teacher) / f"{name}.json"
    content = path.read_bytes()
    path.write_bytes(change(content))
    try:
        assemble.assemble(_digits("kd", digits_dir, teacher))
    except TgeoError as error:
        said = str(error)
    else:
        return
    finally:
        path.write_bytes(content)
    assert teacher in said


@settings(QUICK, max_examples=40)
@given(damage())
def test_damaged_ratios_of_samples_are_named(tmp_path, change):
    path, arrays = tmp_path / "samples.npz", {"ratio": np.zeros((1, 5))}
    np.savez_compressed(path, **arrays)
    path.write_bytes(change(path.read_bytes()))
    try:
        found = storage.read_arrays(path)
    except DataError:
        return
    assert set(found) <= {"ratio"}


# Datasets.


@settings(QUICK, max_examples=60)
@given(st.sampled_from(("train.bin", "test.bin", "fine_label_names.txt")), damage())
def test_a_damaged_cifar_file_is_refused_or_of_the_right_form(tmp_path, name, change):
    source, data_dir = tmp_path / "s", tmp_path / "d"
    if not source.exists():
        tiny_cifar.prepare("cifar100", str(source), train=1)
    folder = tmp_path / "damaged"
    shutil.copytree(source / "cifar100_source", folder, dirs_exist_ok=True)
    (folder / name).write_bytes(change((folder / name).read_bytes()))
    try:
        found = cifar._checked("cifar100", folder, str(data_dir), {})
    except DataError:
        return
    assert all(records[:, 1].max() < 100 for records in found.records.values())
    assert len(found.names["label"]) == 100


@settings(QUICK, max_examples=40)
@given(st.sampled_from((".tar", ".tar.gz", ".tar.xz")), damage())
def test_a_damaged_archive_is_refused_and_nothing_is_written(tmp_path, suffix, change):
    path, data_dir = tmp_path / f"cifar-100-binary{suffix}", tmp_path / "data"
    with tarfile.open(path, f"w:{suffix[5:]}") as archive:
        for name in ("../../../train.bin", "/test.bin", "fine_label_names.txt"):
            member = tarfile.TarInfo(name)
            member.size = 3074
            archive.addfile(member, io.BytesIO(bytes(3074)))
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DataError, match="cifar-100-binary"):
        sources.prepare("cifar100", str(data_dir), str(path))
    assert not data_dir.exists()


def _png() -> bytes:
    png = io.BytesIO()
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 3).save(png, "PNG")
    return png.getvalue()


@settings(QUICK, max_examples=150)
@given(damage())
def test_a_damaged_png_is_refused_or_has_pixels(tmp_path, change):
    record = tmp_path / "record"
    record.write_bytes(b"1")
    (tmp_path / "decoded.train.npz").unlink(missing_ok=True)
    examples = [{"id": b"0", "image": _png(), "label": 1}]
    examples.append({"id": b"1", "image": change(_png()), "label": 2})
    dataset = types.SimpleNamespace(
        info=types.SimpleNamespace(splits={"train": types.SimpleNamespace(filepaths=[record])}),
        data_dir=str(tmp_path),
        as_data_source=lambda **_: examples,
    )
    try:
        found = sources.read(dataset, "train")
    except DataError as error:
        said = str(error)
    else:
        assert found.images.shape == (2, 8, 8, 1)
        return
    assert "the train split cannot be read" in said


@settings(QUICK, max_examples=100)
@given(st.integers(0, 3), damage())
def test_a_damaged_jpeg_is_skipped_or_has_pixels(number, change):
    jpeg = pictures.encoded(pictures.picture("train", number))
    records = [{"image": change(jpeg), "label": 1}, {"image": jpeg, "label": 2}]
    found = streaming._Decode(records, 16, 3)((0, 0))
    assert found["image"].shape == (16, 16, 3)
    assert (found["corrupt"] == 0) == (found["label"] == 2)  # the next one, and the first is noted
    if found["label"] == 2:
        np.testing.assert_array_equal(found["image"], crops.square(jpeg, 16, 3, None))


@pytest.fixture(scope="module")
def own_digits(digits_dir, tmp_path_factory) -> pathlib.Path:
    """The digits in a folder that may be damaged."""
    folder = tmp_path_factory.mktemp("own") / "tfds"
    ignored = shutil.ignore_patterns("decoded.*", "compiled", "teacher_logits")
    shutil.copytree(digits_dir, folder, ignore=ignored)
    return folder


@settings(QUICK, max_examples=40)
@given(
    st.sampled_from(("record", "dataset_info.json", "features.json", "label.labels.txt")),
    damage(),
)
def test_a_prepared_dataset_is_read_as_it_was_or_refused(own_digits, name, change):
    folder = own_digits / "digits" / "1.0.0"
    (path,) = folder.glob("digits-train*" if name == "record" else name) or [None]
    content = path.read_bytes()
    path.write_bytes(change(content))
    for cached in folder.glob("decoded.*"):
        cached.unlink()
    try:
        found = sources.load("digits", str(own_digits))
    except DataError as error:
        said = str(error)
    else:
        path.write_bytes(content)
        assert found.digest() == sources.load("digits", str(own_digits)).digest()
        return
    finally:
        path.write_bytes(content)
    assert "digits" in said


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_stream_of_damaged_records_ends_with_their_name(own_digits, tmp_path, share):
    shutil.copytree(own_digits, tmp_path / "tfds")
    (path,) = (tmp_path / "tfds").glob("digits/1.0.0/digits-train*")
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    options: Any = {"image_size": 8, "mean": (0.3,), "std": (0.3,)}
    dataset = streaming.load("digits", str(tmp_path / "tfds"), **options)
    with pytest.raises(DataError, match=r"data\.name='digits': train\[\d+\] cannot be read"):
        list(dataset.train.sweep(64))
    batches = dataset.train.batches(0, 0, 64, crop=True)
    with pytest.raises(DataError, match=r"data\.name='digits': train\[\d+\] cannot be read"):
        list(batches)


# Code in files.


class _Command:
    """What a pickle would execute."""

    def __init__(self, way: str, path: pathlib.Path):
        self.way, self.path = way, path

    def __reduce__(self) -> Any:
        if self.way == "system":
            return os.system, (f"touch {self.path}",)
        if self.way == "eval":
            return eval, (f"open({str(self.path)!r}, 'w').close()",)
        if self.way == "exec":
            return exec, (f"open({str(self.path)!r}, 'w').close()",)
        return open, (str(self.path), "w")


WAYS = ("system", "eval", "exec", "open")


@settings(QUICK, max_examples=30)
@given(
    st.sampled_from(WAYS), st.integers(0, 5), st.sampled_from((".pth", ".pt", "", ".safetensors"))
)
def test_a_checkpoint_that_would_execute_code_does_not(tmp_path, way, protocol, suffix):
    marker, path = tmp_path / "executed", tmp_path / f"network{suffix}"
    path.write_bytes(pickle.dumps({"model": _Command(way, marker)}, protocol))
    with pytest.raises(CheckpointError, match="so it is not read"):
        convert.from_torch("resnet8", path, 10)
    assert not marker.exists()


@settings(QUICK, max_examples=30)
@given(st.sampled_from(WAYS), st.sampled_from(("images", "header", "more")))
def test_objects_in_a_cache_of_pixels_are_not_unpickled(tmp_path, way, name):
    record, path, marker = tmp_path / "record", tmp_path / "decoded.npz", tmp_path / "executed"
    record.write_bytes(b"1")
    objects = np.array([_Command(way, marker)], object)
    np.savez(path, **{"images": np.zeros(3), "header": np.zeros(3, np.uint8), name: objects})
    found = decoded.load_or_decode(path, [record], lambda: {"images": np.ones(3)})
    np.testing.assert_array_equal(found["images"], np.ones(3))
    np.savez(tmp_path / "samples.npz", ratio=objects)
    with pytest.raises(DataError, match="damaged"):
        storage.read_arrays(tmp_path / "samples.npz")
    assert not marker.exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_damaged_checkpoint_is_refused_or_has_the_right_shapes(tmp_path_factory, suffix):
    torch = pytest.importorskip("torch")
    save_file = pytest.importorskip("safetensors.torch").save_file
    path = tmp_path_factory.mktemp("torch") / f"network{suffix}"
    module = models.build("resnet8", 10)
    expected = jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))
    names = {
        convert._torch_name(p): convert._torch_shape(leaf.shape)
        for p, leaf in jax.tree_util.tree_leaves_with_path(expected)
    }
    state = {name: torch.zeros(shape) for name, shape in names.items()}
    (save_file if suffix == ".safetensors" else torch.save)(state, path)
    content = path.read_bytes()
    shapes = jax.tree.map(lambda leaf: leaf.shape, expected)

    @settings(QUICK, max_examples=40)
    @given(damage())
    def check(change: Any) -> None:
        path.write_bytes(change(content))
        try:
            found = convert.from_torch("resnet8", path, 10)
        except CheckpointError:
            return
        assert jax.tree.map(lambda leaf: leaf.shape, dict(found)) == shapes

    check()
