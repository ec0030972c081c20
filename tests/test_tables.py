"""Tables from their published layouts, written here, read back through TFDS."""

import logging
import pathlib
import re

import numpy as np
import pytest
import tensorflow_datasets as tfds

from experiments import prepare as command_prepare
from tests import tiny_tables
from tests.tiny_tables import prepared, refused
from tgeo_jax.data import sources, tables
from tgeo_jax.errors import ConfigError, DataError


def numbers(name, split, builder):
    """Rows and labels as TFDS's own, slower, decoding gives them."""
    source = builder.as_data_source(split)
    return (
        np.stack([record["row"] for record in source]),
        np.array([record["label"] for record in source]),
    )


@pytest.mark.parametrize("name", tables.LAYOUTS)
def test_what_is_read_at_once_is_what_tfds_decodes_one_by_one(name, tmp_path):
    builder = prepared(name, tmp_path)
    for split in builder.info.splits:
        rows, labels = tables.rows_and_labels(builder, split)
        assert rows.dtype == tables.LAYOUTS[name].dtype
        assert labels.dtype == np.int32
        own_rows, own_labels = numbers(name, split, builder)
        np.testing.assert_array_equal(rows, own_rows)
        np.testing.assert_array_equal(labels, own_labels)
    assert builder.info.metadata["malformed"] == 0


@pytest.mark.parametrize("name", tables.LAYOUTS)
def test_every_table_loads_with_finite_input_and_names_for_its_columns(name, tmp_path):
    builder = prepared(name, tmp_path)
    data = sources.load(name, str(tmp_path / "tfds"), validation_fraction=0.4)
    total = builder.info.splits["train"].num_examples
    assert len(data.train) + len(data.validation) == total
    for split in (data.train, data.validation, data.test):
        assert split.images.shape == (len(split), len(data.feature_names))
    if tables.LAYOUTS[name].kind == "numeric":
        assert data.vocabulary == ()
        assert data.train.images.dtype == np.float32
        assert np.isfinite(data.test.images).all()
    else:
        assert (data.mean, data.std) == ((), ())
        assert data.train.images.dtype == np.int32
        assert data.train.images.max(0).tolist() <= [size - 1 for size in data.vocabulary]


def test_a_table_that_is_prepared_needs_no_source(tmp_path):
    folder = pathlib.Path(prepared("frappe", tmp_path).data_dir)
    assert tables.prepare("frappe", "", str(tmp_path / "tfds")) == folder


def test_the_files_may_lie_in_tfdss_manual_folder(tmp_path):
    tiny_tables.frappe(tmp_path / "tfds" / "downloads" / "manual" / "frappe")
    tables.prepare("frappe", "", str(tmp_path / "tfds"))
    assert tables.builder("frappe", str(tmp_path / "tfds")).info.splits["train"].num_examples == 100


def test_without_files_it_is_said_which_to_put_where(tmp_path):
    said = refused("criteo", "", tmp_path, r"^criteo: not prepared yet; put train\.txt ")
    assert "dac_sample.txt" in said
    assert f"--data_dir={tmp_path / 'tfds'}" in said
    refused("criteo", tmp_path / "nothing", tmp_path, "no such file or folder")


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("nsl_kdd", "KDDTest-21.txt"),
        ("power_attack_binary", "data7.csv"),
        ("criteo", "train.txt"),
        ("avazu", "train.csv"),
        ("frappe", "frappe.test.libfm"),
        ("movielens", "movies.csv"),
    ],
)
def test_a_missing_file_is_named(name, file, tmp_path):
    folder = tiny_tables.write(name, tmp_path / "source")
    next(folder.glob(f"{file}*")).unlink()
    refused(name, folder, tmp_path, f"holds no {file}")


def test_a_damaged_archive_is_named_and_leaves_nothing(tmp_path):
    folder = tiny_tables.nsl_kdd(tmp_path / "source")
    path = folder / "KDDTest+.txt.gz"
    path.write_bytes(path.read_bytes()[:-40])
    refused("nsl_kdd", folder, tmp_path, r"KDDTest\+\.txt\.gz: cannot be read")


# Malformed rows.

MALFORMED = {
    "nsl_kdd": ("KDDTest+.txt", [
        ("0,tcp,http", "3 fields, expected 42 or 43"),
        (",".join(["0", "tcp", "http", "SF", *["0"] * 37, "wurm", "21"]), "unknown value 'wurm'"),
        (",".join(["x", "tcp", "http", "SF", *["0"] * 37, "normal", "21"]), "'x'"),
        (",".join(["inf", "tcp", "http", "SF", *["0"] * 37, "normal"]), "duration=inf"),
    ]),
    "power_attack_3class": ("data3.csv", [
        (",".join([*["0"] * 128, "Fire"]), "unknown value 'Fire'"),
        (",".join([*["0"] * 127, "Attack"]), "128 fields, expected 129"),
    ]),
    "criteo": ("train.txt", [
        ("\t".join(["2", *[""] * 39]), "label '2'"),
        ("\t".join(["1", *[""] * 38]), "39 fields, expected 40"),
        ("\t".join(["1", "1.5", *[""] * 38]), "'1.5'"),
        ("\t".join(["1", *[""] * 38, "xyz"]), "'xyz'"),
        ("\t".join(["1", *[""] * 38, "123456789"]), "not 8 hexadecimal digits"),
    ]),
    "frappe": ("frappe.test.libfm", [
        ("1 1:1 2:1", "2 features, expected 10"),
        (" ".join(["0", *[f"{n}:1" for n in range(10)]]), "label '0'"),
        (" ".join(["1", *[f"{n}:2" for n in range(10)]]), "feature '0:2'"),
    ]),
    "movielens": ("ratings.csv", [
        ("1,4000,3.0,1", "movie 4000: not in movies.csv"),
        ("1,1,9.0,1", "rating 9.0"),
        ("1,1,3.0", "3 fields, expected 4"),
    ]),
    "avazu": ("train.csv", [
        ("1,0,14102124,1005,0" + ",0" * 19, "hour '14102124'"),
        ("1,0,14103221,1005,0" + ",0" * 19, "day"),
        ("1,0,14102100", "3 fields, expected 24"),
    ]),
}  # fmt: skip


def _plain(name, tmp_path):
    if name == "nsl_kdd":
        return tiny_tables.nsl_kdd(tmp_path / "source", zipped=False)
    return tiny_tables.write(name, tmp_path / "source")


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_rows_are_named_by_line_counted_and_left_out(name, tmp_path, caplog):
    sound = prepared(name, tmp_path / "sound")
    whole = sum(split.num_examples for split in sound.info.splits.values())
    folder = _plain(name, tmp_path)
    file, bad = MALFORMED[name]
    lines = (folder / file).read_text().splitlines()
    (folder / file).write_text("\n".join([*lines, "", *(line for line, _ in bad)]) + "\n")
    with caplog.at_level(logging.WARNING, "absl"):
        builder = prepared(name, tmp_path, folder)
    assert builder.info.metadata["malformed"] == len(bad)
    assert sum(split.num_examples for split in builder.info.splits.values()) == whole
    for number, (_, said) in enumerate(bad, len(lines) + 2):
        (message,) = [m for m in caplog.messages if f"{file}, line {number}: " in m]
        assert said in message


@pytest.mark.parametrize("name", MALFORMED)
def test_one_more_malformed_row_than_allowed_is_fatal_and_leaves_nothing(name, tmp_path):
    folder = _plain(name, tmp_path)
    file, bad = MALFORMED[name]
    with (folder / file).open("a") as opened:
        opened.writelines(line + "\n" for line, _ in bad)
    limit = len(bad) - 1
    said = rf"{re.escape(file)}, line \d+: .* {len(bad)} malformed rows, .*--max_malformed={limit}"
    refused(name, folder, tmp_path, said, max_malformed=limit)


def test_bytes_that_are_no_text_are_a_malformed_row(tmp_path):
    folder = tiny_tables.frappe(tmp_path / "source")
    path = folder / "frappe.test.libfm"
    path.write_bytes(path.read_bytes() + b"\xff\xfe\x00\n")
    assert prepared("frappe", tmp_path, folder).info.metadata["malformed"] == 1


# The command.


def test_the_command_prepares_and_tells_rows_and_classes(command, tmp_path):
    source = tiny_tables.nsl_kdd(tmp_path / "source")
    done = command(
        "-m", "experiments.prepare", "--dataset=nsl_kdd", f"--source={source}",
        f"--data_dir={tmp_path / 'tfds'}",
    )  # fmt: skip
    assert "train: 200 rows (normal 40, dos 40, probe 40, r2l 40, u2r 40)" in done.stdout
    assert "malformed rows skipped: 0" in done.stdout
    builder = tables.builder("nsl_kdd", str(tmp_path / "tfds"))
    digest = command_prepare.digest(sources.read(builder, "test"))
    assert f"test: SHA-256 of rows and labels {digest}" in done.stdout


def test_a_run_on_a_table_that_is_not_prepared_says_how(tmp_path):
    with pytest.raises(DataError, match=r"^data\.name='avazu': not prepared in .*; put train\.csv"):
        sources.load("avazu", str(tmp_path))
    with pytest.raises(ConfigError, match="did you mean 'frappe'"):
        sources.load("frape", str(tmp_path))


def test_a_table_is_a_tfds_dataset_of_its_own_name(tmp_path):
    builder = prepared("nsl_kdd", tmp_path)
    assert builder.info.full_name == "nsl_kdd/1.0.0"
    again = tfds.builder_from_directory(builder.data_dir)
    record = again.as_data_source("train")[0]
    rows, labels = tables.rows_and_labels(builder, "train")
    np.testing.assert_array_equal(record["row"], rows[0])
    assert record["label"] == labels[0]
