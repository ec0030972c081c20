"""CIFAR from the official binary layout, written by hand here or real, read back through TFDS."""

import hashlib
import os
import pathlib
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.image_classification import cifar as originals

from tgeo_jax.data import cifar
from tgeo_jax.errors import ConfigError, DataError

ROOT = pathlib.Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.xdist_group("cifar")  # one process prepares the real set, once
SHARED = pathlib.Path(os.environ.get("TGEO_SHARED_DATA", ROOT.parent / "shared" / "data"))
OWN = {"cifar10": originals.Cifar10, "cifar100": originals.Cifar100}
FILES = {
    "cifar10": {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]},
    "cifar100": {"train": ["train.bin"], "test": ["test.bin"]},
}
COARSE = [f"group_{i}" for i in range(20)]
FINE = {"cifar10": [f"thing_{i}" for i in range(10)], "cifar100": [f"kind_{i}" for i in range(100)]}
NUMBER = {"train": 3, "test": 2}  # examples in each file of a split


def example(name, number):
    """Known pixels (all planes differ), label and coarse label of one example."""
    row, column, channel = np.ogrid[:32, :32, :3]
    pixels = (7 * number + 3 * row + 5 * column + 90 * channel) % 256
    return pixels.astype(np.uint8), (number * 37 + 9) % len(FINE[name]), (number * 3) % 20


def write_source(folder, name):
    """A small set in the official layout; {split: {id: (pixels, label, coarse label)}}."""
    folder.mkdir(parents=True, exist_ok=True)
    expected: dict[str, dict] = {"train": {}, "test": {}}
    number = 0
    for split, files in FILES[name].items():
        for file in files:
            content = b""
            for _ in range(NUMBER[split]):
                pixels, label, coarse = example(name, number)
                expected[split][f"{split}_{len(expected[split]):05d}"] = (pixels, label, coarse)
                content += bytes([label] if name == "cifar10" else [coarse, label])
                content += b"".join(pixels[..., plane].tobytes() for plane in (0, 1, 2))  # R, G, B
                number += 1
            (folder / file).write_bytes(content)
    if name == "cifar10":  # the official file ends in blank lines
        (folder / "batches.meta.txt").write_text("\n".join(FINE[name]) + "\n\n\n")
    else:
        (folder / "fine_label_names.txt").write_text("\n".join(FINE[name]) + "\n")
        (folder / "coarse_label_names.txt").write_text("\n".join(COARSE) + "\n")
    return expected


def stored(name, data_dir):
    """What TFDS's own builder reads: {split: {id: (pixels, label, coarse label or None)}}."""
    builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    assert type(builder) is OWN[name]
    return {
        split: {
            record["id"].decode(): (record["image"], record["label"], record.get("coarse_label"))
            for record in builder.as_data_source(split)
        }
        for split in ("train", "test")
    }


def archive(path, folder, mode="w:gz"):
    with tarfile.open(path, mode) as packed:
        packed.add(folder, "cifar-binary")
    return path


@pytest.fixture
def source(tmp_path):
    write_source(tmp_path / "source", "cifar100")
    return tmp_path / "source"


@pytest.fixture
def data_dir(tmp_path):
    return str(tmp_path / "tfds")


def refused(source, data_dir, message, name="cifar100", digests=()):
    """Preparation fails with this message and a fix, and writes nothing."""
    with pytest.raises(DataError, match=message) as raised:
        cifar.prepare(name, source, data_dir, digests=None if digests is None else dict(digests))
    assert not pathlib.Path(data_dir).exists()
    text = str(raised.value)
    assert f"python -m experiments.prepare --dataset={name} --source=cifar-10" in text
    assert "https://www.cs.toronto.edu/~kriz/cifar-10" in text
    return text


# What TFDS's own builders read.


@pytest.mark.parametrize("name", cifar.NAMES)
def test_tfds_reads_every_pixel_label_and_id_that_was_written(name, tmp_path, data_dir):
    expected = write_source(tmp_path / "source", name)
    folder = cifar.prepare(name, tmp_path / "source", data_dir, digests={})
    assert folder == pathlib.Path(data_dir) / name / "3.0.2"
    found = stored(name, data_dir)
    for split, rows in expected.items():
        assert sorted(found[split]) == sorted(rows)
        for key, (pixels, label, coarse) in rows.items():
            np.testing.assert_array_equal(found[split][key][0], pixels)
            assert found[split][key][1] == label
            assert found[split][key][2] == (coarse if name == "cifar100" else None)


@pytest.mark.parametrize("name", cifar.NAMES)
def test_tfds_finds_features_names_and_counts_however_it_is_asked(name, tmp_path, data_dir):
    write_source(tmp_path / "source", name)
    folder = cifar.prepare(name, tmp_path / "source", data_dir, digests={})
    unprepared = OWN[name](data_dir="/nowhere", file_format="array_record").info
    for builder in (
        cifar.builder(name, data_dir),
        tfds.builder(name, data_dir=data_dir),
        tfds.builder_from_directory(folder),
    ):
        found = builder.info
        assert str(found.features) == str(unprepared.features)
        assert (found.full_name, found.supervised_keys) == (f"{name}/3.0.2", ("image", "label"))
        assert found.features["label"].names == FINE[name]
        assert name == "cifar10" or found.features["coarse_label"].names == COARSE
        for split, files in FILES[name].items():
            assert found.splits[split].num_examples == NUMBER[split] * len(files)
            assert len(builder.as_data_source(split)) == NUMBER[split] * len(files)


# Sources.


@pytest.mark.parametrize("layout", ["inside", ".tar.gz", ".tar", ".tar.xz"])
def test_archives_and_outer_folders_give_the_same_as_the_folder(layout, tmp_path, source, data_dir):
    given = tmp_path / f"given{layout}"
    if layout == "inside":
        given.mkdir()
        source.rename(given / "cifar-100-binary")
    else:
        archive(given, source, "w:" + layout[5:])
    cifar.prepare("cifar100", given, data_dir, digests={})
    pixels, label, coarse = example("cifar100", 1)
    found = stored("cifar100", data_dir)["train"]["train_00001"]
    np.testing.assert_array_equal(found[0], pixels)
    assert found[1:] == (label, coarse)


def test_members_that_point_outside_of_an_archive_write_nothing(tmp_path, source, data_dir):
    with tarfile.open(tmp_path / "given.tar", "w") as packed:
        packed.add(source, "../../cifar-100-binary")
        packed.add(source / "train.bin", "/evil.bin")
        link = tarfile.TarInfo("cifar-100-binary/test.bin")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        packed.addfile(link)
    before = sorted(tmp_path.iterdir())
    cifar.prepare("cifar100", tmp_path / "given.tar", data_dir, digests={})
    assert sorted(tmp_path.iterdir()) == sorted([*before, pathlib.Path(data_dir)])


def test_a_missing_source_says_where_to_get_it_and_what_to_run(tmp_path, data_dir):
    text = refused(tmp_path / "no.tar.gz", data_dir, r"no\.tar\.gz: no such file or folder")
    assert text.endswith(f"--source=cifar-100-binary.tar.gz --data_dir={data_dir}")
    refused("", data_dir, r"^cifar10: not prepared yet", name="cifar10")


@pytest.mark.parametrize("version", ["cifar-100-python", "cifar-100-matlab", "cifar-10-batches-py"])
@pytest.mark.parametrize("packed", [True, False])
def test_other_versions_are_refused_unread(version, packed, tmp_path, data_dir):
    folder = tmp_path / "given" / version
    folder.mkdir(parents=True)
    for file in ("train.mat", "meta.mat") if "matlab" in version else ("data_batch_1", "meta"):
        (folder / file).write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    given = archive(tmp_path / "given.tar.gz", folder.parent) if packed else folder
    name = "cifar100" if "100" in version else "cifar10"
    refused(given, data_dir, r"not the binary version \(pickles are never read\)", name, None)


@pytest.mark.parametrize("packed", [True, False])
def test_missing_files_are_named(packed, tmp_path, source, data_dir):
    (source / "test.bin").unlink()
    (source / "fine_label_names.txt").unlink()
    given = archive(tmp_path / "given.tar", source, "w") if packed else source
    refused(given, data_dir, r": lacks test\.bin, fine_label_names\.txt; ")


@pytest.mark.parametrize("ending", ["tar", "tar.gz", "tar.xz"])
def test_half_of_an_archive_and_no_archive_are_told(ending, tmp_path, source, data_dir):
    given = tmp_path / f"given.{ending}"
    whole = archive(given, source, "w:" + ending[4:]).read_bytes()
    half = whole[: len(whole) // 2]
    for content in (half, half + b"<html>" * 999, whole[:50] + b"<html>" * 999, b"<html>"):
        given.write_bytes(content)
        refused(given, data_dir, r"given\.tar.*: (not a readable archive|lacks train\.bin)")


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("test.bin", b"", r"0 bytes, expected a multiple of 3,074"),
        ("test.bin", bytes(3073), r"3,073 bytes, expected a multiple of 3,074"),
        ("train.bin", bytes(6149), r"6,149 bytes, expected a multiple of 3,074"),
        ("test.bin", bytes([20] + [0] * 3073), r"coarse_label 20 in test\.bin is not in 0\.\.19"),
        ("train.bin", bytes([0, 100] + [0] * 3072), r"label 100 in train\.bin is not in 0\.\.99"),
        ("fine_label_names.txt", b"apple\npear", r"2 class names, expected 100"),
    ],
)
def test_damaged_files_are_named(file, content, said, source, data_dir):
    (source / file).write_bytes(content)
    assert file in refused(source, data_dir, said)


def test_digests_of_the_files_are_compared(source, data_dir):
    files = ("train.bin", "test.bin")
    digests = {file: hashlib.md5((source / file).read_bytes()).hexdigest() for file in files}
    said = rf"test\.bin: MD5 {digests['test.bin']}, expected 0{{32}}"
    refused(source, data_dir, said, digests={**digests, "test.bin": "0" * 32})
    cifar.prepare("cifar100", source, data_dir, digests=digests)


def test_official_archives_have_their_digest_and_files_their_number_of_records(tmp_path, data_dir):
    write_source(tmp_path / "source", "cifar10")
    said = r"data_batch_1\.bin: 3 records, expected 10,000"
    refused(tmp_path / "source", data_dir, said, "cifar10", None)
    given = archive(tmp_path / "renamed.tar.gz", tmp_path / "source")
    digest = hashlib.md5(given.read_bytes()).hexdigest()
    said = rf"renamed\.tar\.gz: MD5 {digest}, expected c32a1d4ab5d03f1284b67883e8d87530"
    refused(given, data_dir, said, "cifar10", None)
    cifar.prepare("cifar10", given, data_dir, digests={"cifar-10-binary.tar.gz": digest})


def test_an_unknown_set_is_answered_with_the_nearest_name():
    with pytest.raises(ConfigError, match=r"^data\.name='cifar1000': unknown.*'cifar100'"):
        cifar.prepare("cifar1000", "x")


# Once, and whole.


def test_preparing_again_needs_no_source_and_leaves_the_files_alone(source, data_dir):
    folder = cifar.prepare("cifar100", source, data_dir, digests={})
    assert [path.name for path in pathlib.Path(data_dir).iterdir()] == ["cifar100"]
    assert list(folder.parent.iterdir()) == [folder]
    assert not list(folder.glob("*incomplete*"))
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert cifar.prepare("cifar100", "/nowhere", data_dir) == folder
    assert cifar.prepare("cifar100", "", data_dir) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_preparation_leaves_nothing(error, source, data_dir, monkeypatch):
    # In the second split: the first one's file is there.
    encode, results = cifar._png, iter([None, None, None, error])

    def interrupted(pixels):
        if raised := next(results):
            raise raised
        return encode(pixels)

    monkeypatch.setattr(cifar, "_png", interrupted)
    with pytest.raises(error):
        cifar.prepare("cifar100", source, data_dir, digests={})
    assert [path for path in pathlib.Path(data_dir).rglob("*") if path.is_file()] == []
    assert not (pathlib.Path(data_dir) / "cifar100" / "3.0.2").exists()
    monkeypatch.undo()
    folder = cifar.prepare("cifar100", source, data_dir, digests={})
    assert list(folder.parent.iterdir()) == [folder]
    assert len(stored("cifar100", data_dir)["train"]) == 3


def test_what_a_killed_preparation_left_is_removed_by_the_next(source, data_dir):
    killed = f"""
from tgeo_jax.data import cifar
encode, calls = cifar._png, iter(range(9))
cifar._png = lambda pixels: encode(pixels) if next(calls) < 4 else __import__("os")._exit(9)
cifar.prepare("cifar100", {str(source)!r}, {data_dir!r}, digests={{}})
"""
    done = subprocess.run([sys.executable, "-c", killed], cwd=ROOT, timeout=120, check=False)
    assert done.returncode == 9
    assert list(pathlib.Path(data_dir).glob("cifar100/incomplete.*/*train*"))
    folder = cifar.prepare("cifar100", source, data_dir, digests={})
    assert list(folder.parent.iterdir()) == [folder]


def test_folders_that_cannot_be_read_are_not_taken_for_prepared(source, data_dir):
    folder = cifar.prepare("cifar100", source, data_dir, digests={})
    described = folder / "dataset_info.json"
    described.write_text(described.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(DataError, match=r"3\.0\.2: prepared as tfrecord, which needs TensorFlow"):
        cifar.builder("cifar100", data_dir)
    described.unlink()
    with pytest.raises(DataError, match=r"3\.0\.2: holds no .* incomplete; delete the folder"):
        cifar.prepare("cifar100", source, data_dir, digests={})


def test_one_progress_bar_counts_all_images(source, data_dir, capsys):
    cifar.prepare("cifar100", source, data_dir, digests={})
    shown = capsys.readouterr()
    assert (shown.out, "Generating" in shown.err) == ("", False)  # what TFDS itself would print
    assert "Preparing cifar100: 100%" in shown.err


def test_the_command_prints_what_to_compare(source, data_dir, command):
    cifar.prepare("cifar100", source, data_dir, digests={})
    options = ("--dataset=cifar100", f"--data_dir={data_dir}")
    said = command("-m", "experiments.prepare", *options).stdout
    images = np.stack([example("cifar100", number)[0] for number in range(5)])
    labels = np.array([example("cifar100", number)[1] for number in range(5)], "<i4")
    for split, count, rows in (("train", 3, slice(0, 3)), ("test", 2, slice(3, 5))):
        digest = hashlib.sha256(images[rows].tobytes() + labels[rows].tobytes()).hexdigest()
        assert f"{split}: {count} images\n" in said
        assert f"{split}: SHA-256 of pixels and labels {digest}\n" in said
    pixels = images[:3].reshape(-1, 3) / np.float64(255)
    assert "train: mean " + " ".join(f"{value:.8f}" for value in pixels.mean(0)) in said
    assert "train: std  " + " ".join(f"{value:.8f}" for value in pixels.std(0)) in said


@pytest.mark.parametrize("name", ["cifar100", "digits"])
def test_the_command_refuses_what_it_cannot_use(name, data_dir, command):
    options = (f"--dataset={name}", f"--data_dir={data_dir}", "--source=x")
    done = command("-m", "experiments.prepare", *options, check=False)
    said = {"cifar100": "x: no such file or folder", "digits": "--source=x: digits needs no files"}
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {said[name]}; ")


# The real set.


@pytest.fixture(scope="session")
def cifar100_dir(tmp_path_factory) -> str:
    """A TFDS folder with the real CIFAR-100; skips where its files are not at hand."""
    parts = sorted((SHARED / "cifar100").glob("cifar-100-binary.tar.xz.part*"))
    if not parts:
        pytest.skip(f"no CIFAR-100 in {SHARED / 'cifar100'}; TGEO_SHARED_DATA names its parent")
    folder = tmp_path_factory.mktemp("cifar100")
    packed = folder / "cifar-100-binary.tar.xz"
    packed.write_bytes(b"".join(part.read_bytes() for part in parts))
    cifar.prepare("cifar100", packed, str(folder / "tfds"))
    packed.unlink()
    return str(folder / "tfds")


@pytest.fixture(scope="session")
def real(cifar100_dir):
    """TFDS's own builder, and {split: records in the order of their ids}."""
    builder = tfds.builder("cifar100", data_dir=cifar100_dir, file_format="array_record")
    assert type(builder) is originals.Cifar100
    sources = {split: builder.as_data_source(split) for split in ("train", "test")}
    return builder, {s: sorted(sources[s], key=lambda record: record["id"]) for s in sources}


@pytest.mark.parametrize(("split", "examples"), [("train", 500), ("test", 100)])
def test_every_class_of_the_real_set_has_its_examples(real, split, examples):
    records = real[1][split]
    assert np.bincount([record["label"] for record in records]).tolist() == [examples] * 100
    assert np.bincount([r["coarse_label"] for r in records]).tolist() == [5 * examples] * 20


@pytest.mark.parametrize(
    ("split", "digest"),
    [("train", "6172c7755cfe09b2fe270c85cebc1b15"), ("test", "4499cfba6c016c1be1438163640a0898")],
)
def test_the_official_file_is_restored_from_what_tfds_reads(real, split, digest):
    found = hashlib.md5()
    for index, record in enumerate(real[1][split]):
        assert record["id"].decode() == f"{split}_{index:05d}"
        found.update(bytes([record["coarse_label"], record["label"]]))
        found.update(record["image"].transpose(2, 0, 1).tobytes())
    assert found.hexdigest() == digest


def test_the_channels_of_the_real_set_have_their_known_statistics(real):
    pixels = np.stack([record["image"] for record in real[1]["train"]]).reshape(-1, 3).astype("u2")
    mean = pixels.mean(0, dtype=np.float64) / 255
    std = np.sqrt((pixels**2).mean(0, dtype=np.float64) / 255**2 - mean**2)
    np.testing.assert_allclose(mean, [0.50707516, 0.48654887, 0.44091784], rtol=0, atol=5.1e-9)
    np.testing.assert_allclose(std, [0.26733429, 0.25643846, 0.27615047], rtol=0, atol=5.1e-9)


def test_names_and_order_of_the_real_set_are_those_of_tfds(real):
    names = real[0].info.features["label"].names
    assert (len(names), names[:3], names[-1]) == (100, ["apple", "aquarium_fish", "baby"], "worm")
    coarse = real[0].info.features["coarse_label"].names
    assert (len(coarse), coarse[0], coarse[-1]) == (20, "aquatic_mammals", "vehicles_2")
    # TFDS orders records by a hash of the index: this order of CIFAR-10's 50,000, often printed in
    # tutorials, is CIFAR-100's too.
    first = [record["id"].decode() for record in real[0].as_data_source("train[:4]")]
    assert first == ["train_16399", "train_01680", "train_47917", "train_17307"]
