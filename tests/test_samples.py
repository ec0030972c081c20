"""The ratio of every sample after training, and the pictures of the extremes."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from tests import methods
from tgeo_jax import geometry, ratios, samples

COUNT = 40


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    method, teacher = methods.method(), methods.teacher()
    train = methods.examples(COUNT)
    random = np.random.RandomState(0)
    student, taught = random.randn(2, COUNT, 4), random.randn(COUNT, 4)
    student, taught = student.astype(np.float32), taught.astype(np.float32)
    states = [methods.start(method, seed) for seed in (0, 1)]
    both = jax.tree.map(lambda a, b: np.stack([a, b]), *states).replace(step=np.int32(5))
    labels = np.asarray(train.labels_B)
    ratio = samples.ratios_of_samples(method, teacher, both, student, taught, labels)
    path = tmp_path_factory.mktemp("samples") / "samples.npz"
    samples.save(path, ratio, taught, train)
    return states, student, taught, train, dict(np.load(path))


def test_ratios_are_the_fusion_networks_answers_for_each_seed(saved):
    states, student, taught, train, arrays = saved
    network = ratios.FusionNetwork(hidden=(4,))
    for seed, state in enumerate(states):
        features = geometry.trilateral_features(
            jax.nn.softmax(student[seed]), jax.nn.softmax(taught), train.labels_B,
            methods.teacher().class_means_KxK,
        )  # fmt: skip
        expected = network.apply(state.fusion.params, features)
        np.testing.assert_allclose(arrays["ratio"][seed], expected, rtol=1e-5)


def test_extremes_are_the_ends_of_the_first_seeds_order(saved):
    *_, train, arrays = saved
    ratio = arrays["ratio"][0]
    assert list(ratio[arrays["lowest"]]) == sorted(ratio)[: samples.EXTREMES]
    assert list(ratio[arrays["highest"]]) == sorted(ratio)[::-1][: samples.EXTREMES]
    images = np.asarray(train.images_BxHxWxC)
    np.testing.assert_array_equal(arrays["lowest_images"], images[arrays["lowest"]])


def test_teachers_answers_are_kept(saved):
    _, _, taught, train, arrays = saved
    np.testing.assert_array_equal(arrays["teacher_class"], taught.argmax(1))
    right = taught.argmax(1) == np.asarray(train.labels_B)
    np.testing.assert_array_equal(arrays["teacher_right"], right)
