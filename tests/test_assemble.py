"""What is checked once the data are there, before anything is compiled."""

from __future__ import annotations

import dataclasses
import types

import numpy as np
import pytest

from tgeo_jax import assemble, models, parallel, teachers
from tgeo_jax import config as configs
from tgeo_jax.data import sources
from tgeo_jax.errors import ConfigError, DataError
from tgeo_jax.state import Batch, Teacher


def _config(digits_dir):
    config = configs.default()
    config.data.dir = digits_dir
    config.role.name = "alone"
    return config


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_images_that_are_not_finite_are_named_by_split_and_index(digits_dir, monkeypatch, bad):
    load = sources.load

    def load_damaged(*args, **kwargs):
        data = load(*args, **kwargs)
        images = data.validation.images.astype(np.float32)
        images[7, 3, 3, 0] = bad
        damaged = dataclasses.replace(data.validation, images=images)
        return dataclasses.replace(data, validation=damaged)

    monkeypatch.setattr(sources, "load", load_damaged)
    with pytest.raises(DataError, match=r"example 7 of the validation split holds NaN"):
        assemble.assemble(_config(digits_dir))


def test_a_batch_that_devices_cannot_share_is_refused(digits_dir, monkeypatch):
    class EightDevices:
        shape = types.MappingProxyType({"seed": 1, "data": 4, "model": 2})

    monkeypatch.setattr(parallel, "make_mesh", lambda *args, **options: EightDevices())
    config = _config(digits_dir)
    config.data.batch_size = 60
    with pytest.raises(ConfigError, match=r"data\.batch_size=60: .*8 devices.*use 56 or 64"):
        assemble.assemble(config)


def test_replicas_that_do_not_divide_a_batch_are_refused(digits_dir):
    config = _config(digits_dir)
    config.mesh.replicas = 5
    with pytest.raises(ConfigError, match=r"mesh\.replicas=5: must divide data\.batch_size=64"):
        assemble.assemble(config)


def test_names_become_the_values_they_stand_for(digits_dir):
    config = _config(digits_dir)
    config.student.name, config.student.mlp.hidden = "mlp", (3,)
    config.data.batch_size, config.train.epochs = 100, 7
    run = assemble.assemble(config)
    assert run.steps_per_epoch == 12  # 1293 training examples
    assert run.method.total_steps == 84
    assert run.method.student.hidden == (3,)
    assert run.method.role.teach is None
    assert run.teacher is None
    assert run.anchor is None


@pytest.mark.parametrize(
    ("schedule", "drops"), [("constant", ()), ("cosine", ()), ("step", (36, 60))]
)
def test_weights_of_the_role_move_on_where_the_learning_rate_drops(digits_dir, schedule, drops):
    config = _config(digits_dir)
    config.data.batch_size = 100  # 12 steps in an epoch
    config.optimizer.update(schedule=schedule, drop_epochs=(3, 5))
    assert assemble.assemble(config).method.drop_steps == drops


def test_meta_gradients_are_averaged_over_the_steps_of_one_update(digits_dir):
    config = _config(digits_dir)
    config.meta.accumulate = 3
    config.meta.optimizer.update(name="sgd", learning_rate=0.5, momentum=0.0, weight_decay=0.0)
    optimizer = assemble.assemble(config).method.fusion_optimizer
    weight = np.float32(1)
    state, moved = optimizer.init(weight), []
    for gradient in (1, 2, 6, 10, 10, 13):
        update, state = optimizer.update(np.float32(gradient), state, weight)
        moved.append(float(update))
    # -0.5 times the means of (1, 2, 6) and (10, 10, 13).
    np.testing.assert_allclose(moved, [0, 0, -1.5, 0, 0, -5.5], rtol=1e-6)


def _two_classes(monkeypatch):
    load = sources.load

    def load_two(*args, **kwargs):
        data = load(*args, **kwargs)
        parts = {
            name: split.take(np.flatnonzero(split.labels < 2))
            for name, split in (("train", data.train), ("validation", data.validation))
        }
        return dataclasses.replace(data, class_names=("0", "1"), **parts)

    monkeypatch.setattr(sources, "load", load_two)


@pytest.mark.parametrize("name", ["dkd", "kl+dkd"])
def test_a_loss_that_two_classes_are_not_enough_for_is_refused(digits_dir, monkeypatch, name):
    _two_classes(monkeypatch)
    config = _config(digits_dir)
    config.loss.name = name
    with pytest.raises(ConfigError, match=r"^loss 'dkd' with K = 2 classes: .*use 'kl'$"):
        assemble.assemble(config)
    config.loss.name = "kl+dist"
    assert assemble.assemble(config).method.num_classes == 2


def _learning_along(config, role, **meta):
    config.role.name = role
    config.role.trikd.anchor_student = config.role.trikd.anchor_teacher = (0.0,)
    config.meta.update(**meta)
    return config


@pytest.mark.parametrize("role", ["dml", "trikd"])
@pytest.mark.parametrize("ratio", ["tgeo", "bikd"])
def test_prequential_steps_are_refused_beside_a_teacher_that_learns(digits_dir, role, ratio):
    config = _learning_along(_config(digits_dir), role, order="prequential")
    config.ratio.name = ratio
    said = (
        r"^meta\.order='prequential' .*will have changed by then; use meta\.order='student_first'"
    )
    with pytest.raises(ConfigError, match=said):
        assemble.assemble(config)
    # Where nothing is learned from an outer batch there is no order to get wrong.
    config.ratio.name = "constant"
    assert assemble.assemble(config).method.role.peer is not None


@pytest.fixture
def untrained_teacher(monkeypatch):
    """Where a teacher's variables do not matter, none need be trained."""
    found = teachers.Trained(models.build("mlp", 10), None)
    monkeypatch.setattr(teachers, "load", lambda config, dataset: found)


@pytest.mark.usefixtures("untrained_teacher")
@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("every", 2, r"^meta\.every=2: ratio\.name='rw' .*use meta\.every=1$"),
        ("accumulate", 2, r"^meta\.accumulate=2: must be 1 with ratio\.name='rw', which"),
        ("order", "prequential", r"'rw' .* meta\.order='prequential' .*use another order$"),
    ],
)
def test_weights_that_live_for_one_batch_are_refused_what_they_cannot_do(
    digits_dir, field, value, said
):
    config = _config(digits_dir)
    config.role.name, config.teacher.workdir, config.ratio.name = "frozen", "runs/teacher", "rw"
    assert assemble.assemble(config).method.meta_learned
    config.meta[field] = value
    with pytest.raises(ConfigError, match=said):
        assemble.assemble(config)


def test_a_single_run_that_needs_an_anchor_says_how_to_get_one(digits_dir):
    config = _config(digits_dir)
    config.role.name = "trikd"
    said = r"^role\.trikd\.anchor='': a single run needs .*name the workdir .*experiments\.main"
    with pytest.raises(ConfigError, match=said):
        assemble.assemble(config)
    assert assemble.assemble(config, anchor_comes_later=True).anchor is None
    # Nothing is anchored where both weights are zero.
    run = assemble.assemble(_learning_along(config, "trikd"))
    assert (run.anchor, run.method.role.anchored) == (None, False)


@pytest.mark.parametrize("role", ["alone", "dml", "trikd"])
def test_without_a_frozen_teacher_there_is_no_context(digits_dir, role):
    config = _config(digits_dir)
    config.role.name = role
    run = assemble.assemble(config, anchor_comes_later=True)
    train = Batch(run.dataset.train.images, run.dataset.train.labels)
    assert teachers.context(run.method, run.teacher, train, 10, 500) == Teacher(None, None)
    assert (run.teacher is None) == (role == "alone")
    assert role == "alone" or run.teacher.variables is None
