"""Attack detection: the real NSL-KDD, and stand-ins of the power-system files."""

import csv
import gzip
import os
import pathlib

import numpy as np
import pytest
from sklearn.preprocessing import MinMaxScaler, OneHotEncoder

from experiments import prepare as command_prepare
from tests import tiny_tables
from tests.tiny_tables import prepared, refused
from tgeo_jax.data import attacks, sources, tables

ROOT = pathlib.Path(__file__).resolve().parent.parent
SHARED = pathlib.Path(os.environ.get("TGEO_SHARED_DATA", ROOT.parent / "shared" / "data"))


def test_every_published_attack_has_one_class():
    names = [attack for kind in attacks.ATTACKS.values() for attack in kind]
    assert len(names) == len(set(names)) == 1 + 39


@pytest.fixture(scope="module")
def real_nsl_kdd(tmp_path_factory):
    """The real files, prepared; and their lines by split."""
    folder = SHARED / "nsl_kdd"
    if not folder.is_dir():
        pytest.skip(f"needs NSL-KDD's files in {folder}; TGEO_SHARED_DATA names another folder")
    data_dir = str(tmp_path_factory.mktemp("real"))
    tables.prepare("nsl_kdd", folder, data_dir)
    files = {"train": "KDDTrain+_20Percent", "test": "KDDTest+", "test_hard": "KDDTest-21"}
    lines = {}
    for split, file in files.items():
        with gzip.open(folder / f"{file}.txt.gz", "rt") as opened:
            lines[split] = [line.rstrip().split(",") for line in opened]
    return data_dir, lines


def test_the_real_rows_are_those_of_the_files(real_nsl_kdd):
    data_dir, lines = real_nsl_kdd
    builder = tables.builder("nsl_kdd", data_dir)
    values = builder.info.metadata["values"]
    assert builder.info.metadata["malformed"] == 0
    for split, expected in lines.items():
        rows, _ = tables.rows_and_labels(builder, split)
        assert len(rows) == len(expected)
        for index in (0, 7, len(rows) - 1):
            found = [str(value) for value in rows[index]]
            for column in (1, 2, 3):
                name = tables.LAYOUTS["nsl_kdd"].columns[column]
                found[column] = values[name][int(rows[index, column])]
            assert len(found) == 41
            for value, text in zip(found, expected[index], strict=False):
                assert value == text or float(value) == float(text)


def test_the_real_classes_are_as_often_as_published(real_nsl_kdd):
    data_dir, _ = real_nsl_kdd
    builder = tables.builder("nsl_kdd", data_dir)
    counts = {
        split: np.bincount(tables.rows_and_labels(builder, split)[1], minlength=5).tolist()
        for split in ("test", "test_hard")
    }
    # Of KDDTest+ in the tables of most papers: normal, dos, probe, r2l, u2r.
    assert counts["test"] == [9711, 7458, 2421, 2754, 200]
    assert counts["test_hard"][0] == 2152


def test_attack_names_of_the_data_itself_agree_with_its_list_of_kinds(real_nsl_kdd):
    _, lines = real_nsl_kdd
    with (SHARED / "nsl_kdd" / "attack_types.csv").open() as file:
        kinds = dict(row for row in csv.reader(file) if len(row) == 2)
    of = {attack: kind for kind, names in attacks.ATTACKS.items() for attack in names}
    assert {name: of[name] for name in kinds if name != "unknown"} == {
        name: kind for name, kind in kinds.items() if name != "unknown"
    }
    assert {row[41] for rows in lines.values() for row in rows} <= set(of)


def test_one_hot_columns_are_those_of_training_rows_and_scaling_is_scikit_learns(real_nsl_kdd):
    data_dir, lines = real_nsl_kdd
    data = sources.load("nsl_kdd", data_dir)
    table = {split: np.array([row[:41] for row in rows]) for split, rows in lines.items()}
    kept = table["train"][data.train.ids]
    symbolic = [1, 2, 3]
    encoder = OneHotEncoder(handle_unknown="ignore", sparse_output=False).fit(kept[:, symbolic])
    rest = [column for column in range(41) if column not in symbolic]
    scaler = MinMaxScaler().fit(kept[:, rest].astype(float))

    def expected(rows):
        hot = np.split(encoder.transform(rows[:, symbolic]), np.cumsum([
            len(c) for c in encoder.categories_
        ])[:-1], axis=1)  # fmt: skip
        scaled = scaler.transform(rows[:, rest].astype(float))
        return np.concatenate([scaled[:, :1], *hot, scaled[:, 1:]], axis=1)

    splits = {"train": data.train, "test": data.test, "test_hard": data.extra["test_hard"]}
    for name, split in splits.items():
        rows = kept if name == "train" else table[name]
        found = (split.images.astype(np.float64) - data.mean) / data.std
        np.testing.assert_allclose(found, expected(rows), rtol=1e-5, atol=1e-6)


def test_the_hard_test_rows_belong_to_the_digest(tmp_path):
    prepared("nsl_kdd", tmp_path)
    data = sources.load("nsl_kdd", str(tmp_path / "tfds"))
    before = data.digest()
    data.extra["test_hard"].images[0, 0] += 1
    assert data.digest() != before


def test_a_value_that_only_test_rows_have_is_zero_in_all_columns_of_its_feature(tmp_path):
    prepared("nsl_kdd", tmp_path)
    data = sources.load("nsl_kdd", str(tmp_path / "tfds"))
    columns = [i for i, name in enumerate(data.feature_names) if name.startswith("service=")]
    assert [data.feature_names[i] for i in columns] == ["service=http"]
    hot = data.test.images[:, columns].sum(1)
    assert hot[0] == 0  # gopher
    assert hot[1] == 1


# Power systems.


def test_what_is_not_finite_is_counted_by_column_and_told(tmp_path):
    builder = prepared("power_attack_binary", tmp_path)
    assert builder.info.metadata["not_finite"] == {"R1-PA:Z": {"inf": 15, "-inf": 15, "nan": 15}}
    told = command_prepare.told_of_table(builder)
    assert "not finite in R1-PA:Z: 15 inf, 15 -inf, 15 nan" in told
    assert "train: 480 rows (Natural 240, Attack 240)" in told


def test_thirty_seven_scenarios_have_the_published_numbers():
    names = tables.LAYOUTS["power_attack_37class"].class_names
    assert len(names) == 37
    assert set(names) == {str(n) for n in range(1, 42)} - {"31", "32", "33", "34"}


def test_another_header_is_refused(tmp_path):
    folder = tiny_tables.power_attack(tmp_path / "source", "binary")
    path = folder / "data4.csv"
    path.write_text(path.read_text().replace("R1:F", "F1", 1))
    refused("power_attack_binary", folder, tmp_path, r"data4\.csv: its header is not that of data1")
    path = folder / "data1.csv"
    path.write_text(path.read_text().replace("marker", "class", 1))
    refused("power_attack_binary", folder, tmp_path, r"data1\.csv: its first line must name 128")
