"""Click-through rates: stand-ins of the logs that need a licence, and the real public ones."""

import csv
import math
import os
import pathlib

import numpy as np
import pytest

from experiments import prepare as command_prepare
from tests import tiny_tables
from tests.tiny_tables import prepared
from tgeo_jax.data import clicks, layouts, sources, tables
from tgeo_jax.errors import DataError

ROOT = pathlib.Path(__file__).resolve().parent.parent
SHARED = pathlib.Path(os.environ.get("TGEO_SHARED_DATA", ROOT.parent / "shared" / "data"))


def both(builder):
    """The rows of training and test split."""
    return np.concatenate([tables.rows_and_labels(builder, s)[0] for s in ("train", "test")])


def test_criteos_layouts_hold_the_same_rows(tmp_path):
    for index, (separator, header) in enumerate([("\t", False), (",", True), ("\t", True)]):
        source = tiny_tables.criteo(tmp_path / str(index), separator=separator, header=header)
        tables.prepare("criteo", source / "train.txt", str(tmp_path / f"tfds{index}"))
    found = [
        np.concatenate(
            [
                tables.rows_and_labels(tables.builder("criteo", str(tmp_path / f"tfds{i}")), split)[
                    0
                ]
                for split in ("train", "test")
            ]
        )
        for i in range(3)
    ]  # which line is a test row depends on its number, and the header shifts that
    as_sets = [{tuple(row) for row in rows} for rows in found]
    assert len(found[0]) == len(as_sets[0]) == 100
    assert as_sets[0] == as_sets[1] == as_sets[2]


def test_criteos_values_are_kept_and_empty_fields_are_a_value_of_their_own(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    line = "\t".join(["1", "7", "", *["-1"] * 11, "68fd1e64", "", *["00000000"] * 24])
    (folder / "train.txt").write_text((line + "\n") * 50)
    rows, labels = tables.rows_and_labels(prepared("criteo", tmp_path, folder), "train")
    assert rows[0, :3].tolist() == [7, layouts.MISSING, -1]
    assert rows[0, 13:16].tolist() == [0x68FD1E64, layouts.MISSING, 0]
    assert set(labels.tolist()) == {1}


def test_a_fifth_of_a_logs_lines_is_its_test_split():
    share = np.mean([clicks._is_test(number) for number in range(1, 100_001)])
    assert math.isclose(share, 0.2, abs_tol=0.005)


def test_avazus_hour_becomes_hour_and_weekday(tmp_path):
    builder = prepared("avazu", tmp_path)
    rows = both(builder)
    assert rows.shape == (100, 23)
    assert set(map(tuple, rows[:, :2].tolist())) == {
        (index % 24, 1 + index % 2) for index in range(100)
    }  # 21 October 2014 was a Tuesday
    assert set(rows[:, tables.LAYOUTS["avazu"].columns.index("C20")].tolist()) == {-1, 100084}
    (tmp_path / "source" / "train.csv").write_text("id,click\n")
    with pytest.raises(DataError, match="its first line must be id,click,hour,C1"):
        tables.prepare("avazu", tmp_path / "source", str(tmp_path / "other"))


def test_frappes_official_splits_are_kept_where_the_training_file_is_there(tmp_path):
    builder = prepared("frappe", tmp_path, tiny_tables.frappe(tmp_path / "s", train=True))
    assert {s: builder.info.splits[s].num_examples for s in builder.info.splits} == {
        "train": 100, "validation": 100, "test": 50,
    }  # fmt: skip
    assert "note" not in builder.info.metadata
    data = sources.load("frappe", str(tmp_path / "tfds"))
    assert {name: len(split) for name, split in data.extra.items()} == {"test_validation": 100}


def test_without_frappes_training_file_the_public_one_is_taken_and_that_is_said(tmp_path):
    builder = prepared("frappe", tmp_path)
    assert set(builder.info.splits) == {"train", "test"}
    assert clicks.FRAPPE_NOTE in command_prepare.told_of_table(builder)


def test_movielens_fields_come_from_the_movie_and_never_from_other_ratings(tmp_path):
    builder = prepared("movielens", tmp_path)
    rows = both(builder)
    of_movie = {int(row[1]): row[2:].tolist() for row in rows}
    bit = {genre: 1 << index for index, genre in enumerate(clicks.GENRES)}
    assert of_movie[2] == [1994, bit["Comedy"] | bit["Drama"], clicks.GENRES.index("Comedy")]
    assert of_movie[30] == [1994, bit["Comedy"] | bit["Drama"], clicks.GENRES.index("Drama")]
    assert of_movie[7] == [layouts.MISSING, bit["Sci-Fi"], clicks.GENRES.index("Sci-Fi")]
    assert of_movie[9][0] == 2006
    _, labels = tables.rows_and_labels(builder, "train")
    assert labels.mean() == 0.5  # 4.0 and 5.0 of 4.0, 3.5, 5.0, 0.5


@pytest.mark.parametrize(
    ("name", "folder", "rows"),
    [
        ("frappe", "frappe", {"train": 57_722, "test": 28_860}),
        ("movielens", "movielens_small", {"train": 80_668, "test": 20_168}),
    ],
)
def test_the_real_logs_have_all_their_rows(name, folder, rows, tmp_path):
    source = SHARED / folder
    if not source.is_dir():
        pytest.skip(f"needs the files of {name} in {source}; or set TGEO_SHARED_DATA")
    builder = prepared(name, tmp_path, source)
    assert {s: builder.info.splits[s].num_examples for s in builder.info.splits} == rows
    assert builder.info.metadata["malformed"] == 0
    data = sources.load(name, str(tmp_path / "tfds"))
    for split in (data.train, data.test):
        assert (split.images.max(0) < data.vocabulary).all()
    assert data.train.images.min() == 1  # every training value has an id
    if name == "movielens":
        with (source / "ratings.csv").open() as file:
            liked = sum(float(row["rating"]) >= 4 for row in csv.DictReader(file))
        _, labels = zip(*(tables.rows_and_labels(builder, s) for s in rows), strict=True)
        assert sum(int(part.sum()) for part in labels) == liked
