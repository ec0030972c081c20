"""The examples run as documented, and what they print is true."""

from __future__ import annotations

import importlib.util
import re
import shlex

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon

from tests.conftest import ROOT
from tgeo_jax import config as configs
from tgeo_jax import losses, models, ratios, roles
from tgeo_jax.errors import ConfigError

AXES = {"own_loss": losses.SOFT_LOSSES, "own_ratio": ratios.RATIOS, "own_role": roles.ROLES}
NAMES = {"own_loss": "jensen_shannon", "own_ratio": "margin", "own_role": "shifted"}


@pytest.fixture
def example(monkeypatch):
    """Imports an example; what it registers is forgotten again."""

    def load(name: str):
        for table in AXES.values():
            for key, function in table.items():  # which makes monkeypatch remember the table
                monkeypatch.setitem(table, key, function)
        for axis, key in NAMES.items():
            monkeypatch.setitem(AXES[axis], key, None)
            monkeypatch.delitem(AXES[axis], key)
        spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def ran(command, tmp_path_factory):
    """What each of the examples prints, and the folder of its runs."""
    folder, printed = tmp_path_factory.mktemp("examples"), {}

    def run(name: str) -> tuple[str, object]:
        if name not in printed:
            options = [] if name == "own_meta_objective" else [f"--workdir={folder / name}"]
            options += [f"--data_dir={folder / 'tfds'}"] if name == "own_data" else []
            printed[name] = command(f"examples/{name}.py", *options).stdout
        return printed[name], folder / name

    return run


def _numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"\d\.\d{3}", text)]


@pytest.mark.xdist_group("examples")
@pytest.mark.parametrize("name", ["own_loss", "own_role"])
def test_student_of_an_own_loss_or_role_learns(ran, name):
    teacher, student = _numbers(ran(name)[0])
    assert teacher > 0.9
    assert student > 0.85


@pytest.mark.xdist_group("examples")
def test_a_student_learns_from_own_data(ran):
    (student,) = _numbers(ran("own_data")[0])
    assert student > 0.8  # one in three by chance


@pytest.mark.xdist_group("examples")
def test_the_own_ratio_learns_whom_to_trust(ran):
    teacher, student, where_right, where_wrong = _numbers(ran("own_ratio")[0])
    assert teacher < 0.8  # it was taught wrong labels
    assert student > 0.93
    assert where_right > 0.6 > 0.3 > where_wrong


@pytest.mark.xdist_group("examples")
def test_the_own_meta_objective_helps_the_worst_class(ran):
    mean_ratio, mean_worst, _, own_ratio, own_worst, _ = _numbers(ran("own_meta_objective")[0])
    assert own_ratio < mean_ratio  # the teacher is wrong on one class
    assert own_worst > mean_worst + 0.2


@pytest.mark.xdist_group("examples")
@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_a_configuration_file_as_its_docstring_says(command, ran, example, name):
    _, folder = ran(name)
    text = example(name).__doc__.replace("\\\n", "")
    (line,) = re.findall(r"python (-m experiments\.main .*)", text)
    arguments = [a.replace("student", "student_by_main") for a in shlex.split(line)]
    arguments = [a.replace(f"runs/{name}", str(folder)) for a in arguments]
    done = command(
        *arguments, f"--config.teacher.workdir={folder / 'teacher'}", "--config.train.epochs=1"
    )
    assert "Report: " in done.stdout


@pytest.mark.parametrize("name", NAMES)
def test_a_registered_name_has_its_options_and_is_known_to_messages(example, name):
    axis, added = name.removeprefix("own_"), NAMES[name]
    assert added not in configs.default()[axis]
    config = example(name).get_config()
    configs.check(config)
    (option,) = config[axis][added]
    misspelt = added[:-1]
    config[axis].name = misspelt
    with pytest.raises(ConfigError, match=f"{misspelt}': unknown; did you mean '{added}'"):
        configs.check(config)
    config[axis].name = added
    config[axis][added][option] = -1
    with pytest.raises(ConfigError, match=rf"{axis}\.{added}\.{option}=-1.*: must "):
        configs.check(config)


def test_jensen_shannon_is_that_of_scipy(example):
    loss = example("own_loss").jensen_shannon
    student, teacher = np.random.RandomState(0).randn(2, 5, 4).astype(np.float32) * 3

    def softmax(z):
        return np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)

    want = 3.0**2 * jensenshannon(softmax(student / 3), softmax(teacher / 3), axis=1) ** 2
    np.testing.assert_allclose(loss(student, teacher, temperature=3.0), want, rtol=1e-4)
    saturated = loss(jnp.array([[500.0, 0.0]]), jnp.array([[0.0, 500.0]]), temperature=1.0)
    np.testing.assert_allclose(saturated, np.log(2), rtol=1e-6)


def test_the_margin_is_counted_by_hand(example):
    ratio = example("own_ratio").margin(initial_ratio=0.5)
    teacher = jnp.log(jnp.array([[0.7, 0.2, 0.1], [0.1, 0.2, 0.7]]))
    zeros = jnp.zeros(2)
    situation = ratios.Situation(
        teacher, teacher, jnp.array([0, 1]), zeros, zeros, None, epoch=1, num_epochs=1
    )
    start = ratio.init(None, 3)
    np.testing.assert_allclose(ratio.weights(start, situation), 0.5)
    hard_B, soft_B = ratio.weights({"bias": jnp.float32(0), "slope": jnp.float32(2)}, situation)
    np.testing.assert_allclose(soft_B, 1 / (1 + np.exp([-1.0, 1.0])), rtol=1e-6)  # margins +-0.5
    np.testing.assert_allclose(hard_B + soft_B, 1)


def test_the_shifted_teacher_is_the_mean_over_shifts_and_without_reach_the_frozen_one(example):
    shifted = example("own_role").shifted
    network = models.build("mlp", 3, hidden=())
    images = jnp.asarray(np.random.RandomState(1).rand(2, 4, 4, 1), jnp.float32)
    weights = jnp.asarray(np.random.RandomState(2).randn(16, 3), jnp.float32)
    variables = {"params": {"Dense_0": {"kernel": weights, "bias": jnp.zeros(3)}}}
    teach = shifted(network, reach=1).teach
    total = 0
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            moved = np.roll(images, (down, right), axis=(1, 2)).reshape(2, -1)
            raised = np.exp(moved @ np.asarray(weights))
            total += raised / raised.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(np.exp(teach(variables, images)), total / 9, rtol=1e-4)
    want = roles.frozen(network).teach(variables, images)
    got = shifted(network, reach=0).teach(variables, images)
    np.testing.assert_allclose(got - got[:, :1], want - want[:, :1], atol=1e-5)


def test_the_worst_class_is_a_smooth_maximum_over_classes_present(example):
    objective = example("own_meta_objective").worst_class
    logits = np.zeros((3, 10), np.float32)
    logits[0, 0], logits[1, 0], logits[2, 5] = 2.0, 4.0, 1.0
    labels = jnp.array([0, 0, 7])
    losses_of = -np.log(np.exp(logits) / np.exp(logits).sum(1, keepdims=True))
    means = [(losses_of[0, 0] + losses_of[1, 0]) / 2, losses_of[2, 7]]
    want = 0.2 * np.log(np.exp(np.array(means) / 0.2).sum())
    np.testing.assert_allclose(objective(jnp.asarray(logits), labels), want, rtol=1e-5)
