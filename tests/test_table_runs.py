"""Runs on tables from end to end: a teacher, and students with every way to listen to it."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from tests import tiny_tables
from tests.tiny_tables import prepared
from tgeo_jax import assemble, networks, origins, teachers, train
from tgeo_jax import config as configs
from tgeo_jax.data import sources, tables, views
from tgeo_jax.errors import CheckpointError, ConfigError, DataError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for name in ("nsl_kdd", "frappe"):
        tables.prepare(name, tiny_tables.write(name, folder / name), str(folder / "tfds"))
    return folder


def config(folder, **changes):
    """A run of small networks on the stand-in of NSL-KDD."""
    found = configs.default()
    found.data.update(name="nsl_kdd", dir=str(folder / "tfds"), batch_size=20, oversample=True)
    found.meta.batch_size = 10
    for network in (found.student, found.teacher):
        network.name = "mlp"
        network.mlp.hidden = (16,)
    found.optimizer.update(name="adam", learning_rate=0.01)
    found.train.epochs = 3
    for path, value in changes.items():
        section, field = found, path.split("__")
        for part in field[:-1]:
            section = section[part]
        section[field[-1]] = value
    return found


@pytest.fixture(scope="module")
def teacher(folder):
    """The workdir of a teacher that learned from its part."""
    workdir = folder / "teacher"
    own = config(folder, role__name="alone", data__part="teacher", train__epochs=20)
    train.run(own, workdir, progress=False)
    return workdir


def student(folder, teacher, **changes):
    return config(folder, teacher__workdir=str(teacher), **{"data__part": "student", **changes})


def test_a_table_is_learned(teacher):
    result = json.loads((teacher / "result.json").read_text())
    assert result["test_accuracy"]["last"]["mean"] > 0.5  # of five classes, as often each


@pytest.mark.parametrize("role", ["frozen", "cached"])
def test_a_teacher_of_the_one_part_teaches_a_student_of_the_other(folder, teacher, role):
    own = student(folder, teacher, role__name=role, ratio__name="tgeo")
    result = train.run(own, folder / f"tgeo_{role}", progress=False)
    assert 0 <= result["test_accuracy"]["last"]["mean"] <= 1
    assert (folder / f"tgeo_{role}" / "samples.npz").exists()


def test_stored_logits_of_repeated_rows_are_those_of_the_row(folder, teacher):
    run = assemble.assemble(student(folder, teacher, role__name="cached"))
    found, _ = teachers.with_logits(run.config, run.method, run.teacher, run.dataset)
    assert len(np.unique(run.dataset.train.ids)) < len(run.dataset.train)
    images = run.dataset.train.images
    expected = run.teacher.predict(run.method.clean_view)(run.teacher.variables, images)
    np.testing.assert_allclose(found[:, 0], expected, rtol=1e-3, atol=1e-3)  # stored as float16


def test_a_teacher_that_saw_what_is_held_out_is_refused(folder, teacher):
    for field, value in (("split_seed", 1), ("validation_fraction", 0.2)):
        with pytest.raises(
            CheckpointError, match=rf"data\.{field}=.*held-out examples are the same"
        ):
            assemble.assemble(student(folder, teacher, **{f"data__{field}": value}))


def test_a_teacher_whose_ids_mean_something_else_is_refused(folder, teacher):
    own = student(folder, teacher)
    other = json.loads((teacher / "config.json").read_text())
    other["data"]["min_count"] = 3
    strange = folder / "strange"
    strange.mkdir()
    for name in ("result.json", "checkpoints"):
        (strange / name).symlink_to(teacher / name)
    (strange / "config.json").write_text(json.dumps(other))
    own.teacher.workdir = str(strange)
    with pytest.raises(CheckpointError, match=r"data\.min_count=3, .* so that ids mean the same"):
        assemble.assemble(own)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("nsl_kdd", "configs/attack/nsl_kdd.py:teacher"),
        ("power_attack_3class", "configs/attack/power_attack.py:3class,teacher"),
        ("frappe", "configs/ctr/clicks.py:frappe,teacher"),
    ],
)
def test_the_way_to_a_teacher_of_a_table_names_its_part(folder, name, file):
    own = config(folder, data__name=name, data__part="student", data__teacher_fraction=0.6)
    said = origins.how_to_get(own, "teacher.workdir", "runs/t")
    assert f"--config={file} " in said
    assert "--config.data.part=teacher --config.data.teacher_fraction=0.6" in said
    assert "convert" not in said


def test_a_wrong_number_of_features_for_scaling_is_a_config_error(folder):
    own = config(folder, role__name="alone", data__mean=(0.0, 1.0))
    with pytest.raises(ConfigError, match=r"data\.mean=\(0\.0, 1\.0\): must .* each feature, 4"):
        assemble.assemble(own)


# What networks see.


def test_training_rows_of_a_numeric_table_fill_the_unit_interval(folder):
    data = sources.load("nsl_kdd", str(folder / "tfds"))
    seen = np.asarray(views.clean(data)(data.train.images))
    np.testing.assert_allclose(seen.min(0), 0, atol=1e-6)
    constant = np.ptp(data.train.images, axis=0) == 0
    np.testing.assert_allclose(seen.max(0), np.where(constant, 0, 1), atol=1e-6)
    assert networks.example(data).dtype == np.float32


def test_ids_of_a_categorical_table_are_seen_as_they_are(folder):
    data = sources.load("frappe", str(folder / "tfds"))
    seen = views.clean(data)(jax.numpy.asarray(data.train.images))
    assert seen.dtype == np.int32
    np.testing.assert_array_equal(seen, data.train.images)
    assert networks.example(data).dtype == np.int32
    augmented = views.augment(views.clean(data), crop_padding=0, flip=False)
    keys = jax.random.split(jax.random.key(0), len(data.train))
    np.testing.assert_array_equal(augmented(keys, data.train.images), data.train.images)


def test_the_clean_view_of_images_is_their_normalisation(digits_dir):
    data = sources.load("digits", digits_dir)
    images = data.train.images[:3]
    expected = views.normalise(data.mean, data.std)(images)
    np.testing.assert_array_equal(views.clean(data)(images), expected)


def test_a_table_of_a_huge_number_is_refused_with_its_row(tmp_path):
    folder = tiny_tables.nsl_kdd(tmp_path / "source", zipped=False)
    path = folder / "KDDTest-21.txt"
    lines = path.read_text().splitlines()
    lines[6] = "1e300" + lines[6][lines[6].index(",") :]
    path.write_text("\n".join(lines) + "\n")
    prepared("nsl_kdd", tmp_path, folder)
    own = config(tmp_path, role__name="alone")
    with pytest.raises(DataError, match="example 6 of the test_hard split holds NaN or infinite"):
        assemble.assemble(own)
