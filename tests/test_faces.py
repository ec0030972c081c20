"""Face sets from their published layouts, written by hand here or real, read back through TFDS."""

from __future__ import annotations

import dataclasses
import itertools
import os
import pathlib
import re

import numpy as np
import pytest

from tests import tiny_faces
from tests.conftest import ROOT
from tgeo_jax.data import faces, sources
from tgeo_jax.data import pairs as lists
from tgeo_jax.errors import DataError

pytestmark = pytest.mark.xdist_group("faces")  # one process prepares them, once
SHARED = pathlib.Path(os.environ.get("TGEO_SHARED_DATA", ROOT.parent / "shared" / "data"))
SEVENTH = {"validation_fraction": 1 / 7}


@pytest.fixture(scope="session")
def orl_files():
    return tiny_faces.orl_files()


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("faces"))
    tiny_faces.prepare(folder)
    return folder


def orl_pixels(person, number):
    return tiny_faces.pixels(person, number, 112, 92, 1)


def test_orl_is_split_by_image_and_by_person(prepared):
    dataset = sources.load("orl_faces", prepared, **SEVENTH)
    assert dataset.class_names == tuple(f"s{person}" for person in range(1, 31))
    assert [len(dataset.train), len(dataset.validation), len(dataset.test)] == [180, 30, 90]
    trained = np.concatenate([dataset.train.images, dataset.validation.images])
    order = np.argsort(np.concatenate([dataset.train.ids, dataset.validation.ids]))
    expected = [orl_pixels(person, n) for person in range(1, 31) for n in range(1, 8)]
    np.testing.assert_array_equal(trained[order], expected)
    expected = [orl_pixels(person, n) for person in range(1, 31) for n in range(8, 11)]
    np.testing.assert_array_equal(dataset.test.images, expected)
    np.testing.assert_array_equal(dataset.test.labels, np.repeat(np.arange(30), 3))
    np.testing.assert_array_equal(dataset.validation.labels, np.arange(30))
    others = [orl_pixels(person, n) for person in range(31, 41) for n in range(1, 11)]
    np.testing.assert_array_equal(dataset.verification.images, others)


def test_orls_pairs_are_balanced_in_every_fold_and_none_occurs_twice(prepared):
    found = sources.load("orl_faces", prepared, **SEVENTH).verification
    person = np.arange(100) // 10
    np.testing.assert_array_equal(
        person[found.pairs[:, 0]] == person[found.pairs[:, 1]], found.same
    )
    assert np.bincount(found.folds).tolist() == [90] * 10
    assert np.bincount(found.folds, weights=found.same).tolist() == [45] * 10
    assert len({frozenset(pair) for pair in found.pairs.tolist()}) == len(found) == 900
    # A fold is about one person: in all of its pairs of one, and in all of two.
    for fold in range(10):
        assert (person[found.pairs[found.folds == fold]] == fold).any(1).all()


@pytest.mark.skipif(not (SHARED / "orl_faces").is_dir(), reason=f"no ORL faces in {SHARED}")
def test_the_real_faces_of_orl(tmp_path):
    archive = SHARED / "orl_faces" / "orl_faces.tar.gz"
    faces.prepare("orl_faces", archive, str(tmp_path))
    dataset = sources.load("orl_faces", str(tmp_path), **SEVENTH)
    shown = [s.images for s in (dataset.train, dataset.validation, dataset.test)]
    images = np.concatenate([*shown, dataset.verification.images])
    assert images.shape == (400, 112, 92, 1)
    assert len({image.tobytes() for image in images}) == 400
    # By pixels alone, two images of one person are nearer than two of two people.
    flat = np.float64(dataset.verification.images.reshape(100, -1))
    first, second = dataset.verification.pairs.T
    distance = np.linalg.norm(flat[first] - flat[second], axis=1)
    same = dataset.verification.same
    assert np.median(distance[same]) < np.quantile(distance[~same], 0.1)


def test_a_folder_of_orls_files_is_as_good_as_the_archive(tmp_path, orl_files, prepared):
    for name, content in orl_files.items():
        file = tmp_path / "orl_faces" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    faces.prepare("orl_faces", tmp_path, str(tmp_path / "tfds"))
    found = sources.load("orl_faces", str(tmp_path / "tfds"), **SEVENTH)
    assert found.digest() == sources.load("orl_faces", prepared, **SEVENTH).digest()


def test_the_digest_covers_the_pairs(prepared):
    dataset = sources.load("orl_faces", prepared, **SEVENTH)
    other = dataclasses.replace(dataset.verification, folds=dataset.verification.folds[::-1].copy())
    assert dataclasses.replace(dataset, verification=other).digest() != dataset.digest()


def test_folders_are_read_in_their_layouts(prepared):
    dataset = sources.load("face_folder", prepared, validation_fraction=0.2)
    assert dataset.class_names == tuple(f"{person:07d}" for person in range(5))
    assert [len(dataset.train), len(dataset.validation), len(dataset.test)] == [20, 5, 5]
    assert dataset.test.images.shape == (5, 112, 112, 3)
    found = dataset.verification
    assert found.images.shape == (10, 112, 112, 3)  # of twelve two are in no pair
    assert found.same.tolist() == [True, True, False, False] * 2
    assert found.folds.tolist() == [0] * 4 + [1] * 4
    # JPEG blurs; the person and the photograph are still the nearest of all.
    originals = [tiny_faces.pixels(p, n, 112, 112, 3) for p in range(5) for n in range(1, 7)]
    for image, label in zip(dataset.test.images, dataset.test.labels, strict=True):
        distances = [np.abs(np.float32(image) - original).mean() for original in originals]
        assert np.argmin(distances) == 6 * label + 5  # of six the last is for testing


def test_of_a_verification_image_the_person_and_number_are_those_of_the_list(prepared):
    found = sources.load("face_folder", prepared, validation_fraction=0.2).verification
    source = pathlib.Path(prepared) / "face_source"
    first = lists.read_list(source / "pairs.txt")[2].first
    image = tiny_faces.pixels(100, first.number, 60, 50, 3)
    resized = np.asarray(tiny_faces.Image.fromarray(image).resize((112, 112), 2))
    np.testing.assert_array_equal(found.images[found.pairs[2, 0]], resized)


def test_some_corrupt_images_are_named_and_counted_and_more_are_fatal(tmp_path, orl_files):
    bad = {**orl_files, "s2/3.pgm": b"P5 nonsense", "s7/9.pgm": orl_files["s7/9.pgm"][:500]}
    archive = tiny_faces.write_orl(tmp_path / "bad.tar.gz", bad)
    with pytest.raises(DataError, match=r"2 images cannot be decoded, and --max_malformed=1 may"):
        faces.prepare("orl_faces", archive, str(tmp_path / "strict"), max_corrupt=1)
    faces.prepare("orl_faces", archive, str(tmp_path / "tfds"))
    dataset = sources.load("orl_faces", str(tmp_path / "tfds"), **SEVENTH)
    assert [re.search(r"s\d+/\d+\.pgm$", name)[0] for name in dataset.corrupt] == [
        "s2/3.pgm",
        "s7/9.pgm",
    ]
    assert [len(dataset.train), len(dataset.test)] == [179, 89]
    said = faces.told(faces.builder("orl_faces", str(tmp_path / "tfds")))
    assert "images skipped because they cannot be decoded: 2\n" in said


def test_a_corrupt_image_that_pairs_need_is_fatal(tmp_path, orl_files):
    archive = tiny_faces.write_orl(tmp_path / "bad.tar.gz", {**orl_files, "s31/1.pgm": b"P5"})
    with pytest.raises(DataError, match=r"s31/1\.pgm: cannot be decoded .*pairs to verify need it"):
        faces.prepare("orl_faces", archive, str(tmp_path / "tfds"))


def test_an_image_of_another_size_is_no_image_of_orl(tmp_path, orl_files):
    other = tiny_faces.encoded(tiny_faces.pixels(1, 1, 64, 64, 1), "PPM")
    archive = tiny_faces.write_orl(tmp_path / "bad.tar.gz", {**orl_files, "s1/1.pgm": other})
    with pytest.raises(DataError, match=r"s1/1\.pgm; .*\(64x64 pixels, not 92x112\)"):
        faces.prepare("orl_faces", archive, str(tmp_path / "tfds"), max_corrupt=0)


def test_what_is_missing_is_named_with_where_to_get_it(tmp_path, orl_files):
    how = r"--dataset=orl_faces --source=orl_faces\.tar\.gz"
    with pytest.raises(DataError, match=rf"(?s)no such file or folder; get orl_faces\.tar.*{how}"):
        faces.prepare("orl_faces", tmp_path / "nothing.tar.gz", str(tmp_path))
    with pytest.raises(DataError, match=rf"(?s)orl_faces: not prepared yet; .*{how}"):
        faces.prepare("orl_faces", "", str(tmp_path))
    with pytest.raises(DataError, match=r"data\.name='orl_faces': not prepared in .*\n.*--source="):
        sources.load("orl_faces", str(tmp_path))
    files = {name: content for name, content in orl_files.items() if name != "s40/10.pgm"}
    archive = tiny_faces.write_orl(tmp_path / "few.tar.gz", files)
    with pytest.raises(DataError, match=r"few\.tar\.gz: lacks s40/10\.pgm; get"):
        faces.prepare("orl_faces", archive, str(tmp_path / "tfds"))
    (tmp_path / "text.tar.gz").write_text("no archive")
    with pytest.raises(DataError, match=r"text\.tar\.gz: not a readable archive"):
        faces.prepare("orl_faces", tmp_path / "text.tar.gz", str(tmp_path / "tfds"))
    assert not (tmp_path / "tfds" / "orl_faces" / "1.0.0").exists()


@pytest.fixture
def folder(tmp_path):
    return tiny_faces.write_folder(tmp_path / "source")


def refused(folder, message):
    with pytest.raises(DataError, match=message):
        faces.prepare("face_folder", folder, str(folder.parent / "tfds"))


@pytest.mark.parametrize("part", ["train", "evaluation", "pairs.txt"])
def test_a_folder_that_lacks_a_part_is_told_what_to_put_there(folder, part):
    (folder / part).rename(folder / "elsewhere")
    refused(folder, rf"(?s)source: lacks {part}; make a folder that holds train/PERSON/IMAGE\.jpg")


def test_nobody_is_both_trained_on_and_verified(folder):
    (folder / "train" / "0000003").rename(folder / "train" / "emmy noether")
    refused(folder, r"source: 1 people are in train and in pairs\.txt: emmy noether; remove")


def test_numbered_folders_are_looked_up_in_a_list_of_names(folder):
    names = [f"{person:07d} Somebody_{person}" for person in range(5)]
    (folder / "names.txt").write_text("\n".join(names))
    faces.prepare("face_folder", folder, str(folder.parent / "first"))
    names[2] = "0000002 Ada_Lovelace"
    (folder / "names.txt").write_text("\n".join(names))
    refused(folder, r"1 people are in train and in pairs\.txt: 0000002; remove")
    (folder / "names.txt").write_text("0000002\n")
    refused(folder, r"names\.txt, line 1: must be `FOLDER NAME`; found '0000002'")
    (folder / "names.txt").write_bytes("0000002 Zoë".encode("latin-1"))
    refused(folder, r"names\.txt: byte 10 \(0xeb\) is not UTF-8; save the file as UTF-8")
    (folder / "names.txt").unlink()
    (folder / "names.txt").mkdir()
    refused(folder, r"names\.txt: cannot be read \(.*directory.*\); must be lines `FOLDER NAME`")


def test_a_person_needs_three_images(folder):
    for number in range(3, 7):
        (folder / "train" / "0000001" / f"{number:03d}.jpg").unlink()
    refused(folder, r"0000001: holds 2 images; a person needs three or more")


def test_a_photograph_that_the_list_names_must_be_there(folder):
    (folder / "evaluation" / "Emmy_Noether" / "Emmy_Noether_0003.png").unlink()
    refused(folder, r"Emmy_Noether_0003\.jpg: missing, and pairs\.txt names it")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"pairs\.txt, line 1: must say `FOLDS N`"),
        ("ten 300\n", r"line 1: must say `FOLDS N` or `N`.*found 'ten 300'"),
        ("2 1\na 1 2\na 1 b 1\n", r"holds 2 pairs; its first line promises 2 x 2 x 1"),
        ("2 1\na 1 2\na 1 b 1\na 1\na 1 b 2\n", r"line 4: must be `NAME i j`; found 'a 1'"),
        ("2 1\na 1 2\na 1 a 2\na 1 2\na 1 b 2\n", r"line 3: must be `NAME i OTHER j`; found"),
        ("2 1\na 1 2\na 1 b x\na 1 2\na 1 b 2\n", r"line 3: must be `NAME i OTHER j`"),
        ("2 1\na 0 2\na 1 b 1\na 1 2\na 1 b 2\n", r"line 2: must be `NAME i j`"),
        ("1 1\na 1 2\na 1 b 1\n", r"all pairs are in one fold"),
    ],
)
def test_a_list_of_another_layout_is_refused_by_line(tmp_path, text, message):
    (tmp_path / "pairs.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        lists.read_list(tmp_path / "pairs.txt")


def test_a_list_without_folds_is_dealt_out_to_ten(tmp_path):
    lines = [f"a {i} {i + 1}" for i in range(1, 13)] + [f"a {i} b {i}" for i in range(1, 13)]
    (tmp_path / "pairs.txt").write_text("\n".join(["12", *lines]))
    found = lists.read_list(tmp_path / "pairs.txt")
    assert [pair.fold for pair in found] == [*range(10), 0, 1] * 2
    assert [pair.same for pair in found] == [True] * 12 + [False] * 12


def test_held_out_images_are_of_everybody():
    random = np.random.RandomState(0)
    labels = random.permutation(np.repeat(np.arange(4), [2, 5, 30, 101]))
    kept, held = faces.hold_out(labels, 0.1, seed=0, num_classes=4)
    assert np.bincount(labels[held]).tolist() == [1, 1, 3, 10]
    assert sorted([*kept, *held]) == list(range(len(labels)))
    other = faces.hold_out(labels, 0.1, seed=1, num_classes=4)[1]
    assert np.bincount(labels[other]).tolist() == [1, 1, 3, 10]
    assert not np.array_equal(held, other)
    np.testing.assert_array_equal(held, faces.hold_out(labels, 0.1, seed=0, num_classes=4)[1])


def test_a_person_with_one_image_cannot_be_held_out():
    with pytest.raises(DataError, match=r"person 1 has 1 images to train on, and one must be left"):
        faces.hold_out(np.array([0, 0, 1]), 0.5, seed=0, num_classes=2)


def test_all_pairs_of_one_person_are_compared():
    found = lists.of_everybody({"a": 4, "b": 4, "c": 4})
    same = {(p.first.person, p.first.number, p.second.number) for p in found if p.same}
    expected = {(n, i, j) for n in "abc" for i, j in itertools.combinations(range(1, 5), 2)}
    assert same == expected
    assert sum(not pair.same for pair in found) == len(expected)


def test_the_command_prepares_and_says_what_to_compare(command, tmp_path, orl_files):
    archive = tiny_faces.write_orl(tmp_path / "orl_faces.tar.gz", {**orl_files, "s1/1.pgm": b""})
    done = command(
        "-m", "experiments.prepare", "--dataset=orl_faces", f"--source={archive}",
        f"--data_dir={tmp_path}", "--max_malformed=1",
    )  # fmt: skip
    assert "people: 30 trained on, 10 others for verification" in done.stdout
    assert "pairs: 450 of one person, 450 of two, in 10 folds" in done.stdout
    assert "cannot be decoded: 1\n" in done.stdout
    assert "s1/1.pgm" in done.stdout
    assert "train: 209 images" in done.stdout
