"""What is checked once the data are there, before anything is compiled."""

from __future__ import annotations

import dataclasses
import types

import jax
import numpy as np
import pytest

from tests import methods
from tgeo_jax import assemble, evaluate, parallel
from tgeo_jax import config as configs
from tgeo_jax.data import sources
from tgeo_jax.errors import ConfigError, DataError
from tgeo_jax.state import Batch


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
        return dataclasses.replace(data, validation=sources.Split(images, data.validation.labels))

    monkeypatch.setattr(sources, "load", load_damaged)
    with pytest.raises(DataError, match=r"example 7 of the validation split holds NaN"):
        assemble.assemble(_config(digits_dir))


def test_a_batch_that_devices_cannot_share_is_refused(digits_dir, monkeypatch):
    class EightDevices:
        shape = types.MappingProxyType({"seed": 1, "data": 8})

    monkeypatch.setattr(parallel, "make_mesh", lambda seed_devices: EightDevices())
    config = _config(digits_dir)
    config.data.batch_size = 60
    with pytest.raises(ConfigError, match=r"data\.batch_size=60: .*8 devices.*use 56 or 64"):
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


def test_class_means_are_those_of_a_clean_pass_over_the_training_split(digits_dir):
    """Against a loop over classes in NumPy; noisy labels would put samples in other classes."""
    run = assemble.assemble(_config(digits_dir))
    state_variables = jax.jit(run.method.student.init)(
        jax.random.key(0), np.zeros((1, 8, 8, 1), np.float32)
    )
    run = dataclasses.replace(
        run, teacher_module=run.method.student, teacher_variables=state_variables
    )
    predict = evaluate.predictor(run.teacher_module, run.method.clean_view)
    train = Batch(run.dataset.train.images, run.dataset.train.labels)
    teacher = assemble.teacher_context(run, evaluate.Evaluator(predict, 500, seeds=False), train)
    logits = np.asarray(jax.jit(predict)(state_variables, train.images_BxHxWxC), np.float64)
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    for c in range(10):
        expected = probs[train.labels_B == c].mean(0)
        np.testing.assert_allclose(teacher.class_means_KxK[c], expected, rtol=1e-4)


def test_alone_has_no_teacher_context(digits_dir):
    run = assemble.assemble(_config(digits_dir))
    found = assemble.teacher_context(run, None, methods.examples(4))
    assert found.variables is None
    assert found.class_means_KxK is None
