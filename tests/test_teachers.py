"""The trained networks that a run needs, and what a run with each frozen kind of them leaves."""

from __future__ import annotations

import pathlib
import re
import shutil
import types

import jax
import numpy as np
import pytest
import scipy.special
from ml_collections import ConfigDict

from tgeo_jax import checkpoint, objective, randomness, teachers, train, writers
from tgeo_jax import config as configs
from tgeo_jax.assemble import assemble
from tgeo_jax.data import sources
from tgeo_jax.errors import CheckpointError, DataError
from tgeo_jax.models import convolution
from tgeo_jax.state import Batch, Teacher
from tgeo_jax.workdir import Workdir


def small(digits_dir: str, **changes) -> ConfigDict:
    """A small MLP, 5 steps in an epoch; `section__field=value` changes a field."""
    config = configs.default()
    config.data.update(dir=digits_dir, batch_size=256)
    config.role.name = "alone"
    for section in (config.student, config.teacher):
        section.name, section.mlp.hidden = "mlp", (8,)
    config.train.epochs = 2
    return _changed(config, changes)


def _changed(config: ConfigDict, changes: dict) -> ConfigDict:
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return config


@pytest.fixture(scope="module")
def make(digits_dir, tmp_path_factory):
    """Trains a small configuration in a folder of its own."""

    def trained(**changes) -> pathlib.Path:
        folder = tmp_path_factory.mktemp("run")
        train.run(small(digits_dir, **changes), folder, progress=False)
        return folder

    return trained


@pytest.fixture(scope="module")
def teacher_dir(make) -> pathlib.Path:
    """Hardly moves in its second epoch: its best parameters are those after the first."""
    return make(
        seeds=2, optimizer__learning_rate=0.2, optimizer__schedule="step",
        optimizer__drop_epochs=(1,), optimizer__drop_factor=1e-5,
    )  # fmt: skip


@pytest.fixture(scope="module")
def other_dir(make) -> pathlib.Path:
    """The same architecture, other parameters."""
    return make(seed=5, train__epochs=1)


@pytest.fixture(scope="module")
def cnn_dir(make) -> pathlib.Path:
    return make(student__name="cnn", student__cnn__widths=(3,), train__epochs=1)


def _network(folder, seed=0, which="last") -> dict:
    return checkpoint.load_network(folder / "checkpoints", which, seed)


def _mlp(variables, images, dataset) -> np.ndarray:
    """The teacher's logits on images as they are stored."""
    return _mlp_on_inputs(variables, (images / np.float64(255) - dataset.mean) / dataset.std)


def _mlp_on_inputs(variables, inputs) -> np.ndarray:
    first, last = (variables["params"][name] for name in ("Dense_0", "Dense_1"))
    flat = np.asarray(inputs).reshape(len(inputs), -1)
    return np.maximum(flat @ first["kernel"] + first["bias"], 0) @ last["kernel"] + last["bias"]


FLOAT16 = {"rtol": 1e-3, "atol": 1e-3}  # its steps are 2**-11 of a value


# Stored logits.


def _cached(digits_dir, folder, **changes) -> ConfigDict:
    return small(digits_dir, role__name="cached", teacher__workdir=str(folder), **changes)


def _stored(config):
    run = assemble(config)
    return run, teachers.with_logits(config, run.method, run.teacher, run.dataset)


def _files(digits_dir) -> set[pathlib.Path]:
    return set(pathlib.Path(digits_dir).glob("digits/*/teacher_logits/*.array_record"))


def test_stored_logits_are_the_teachers_on_the_clean_image_of_that_example(digits_dir, teacher_dir):
    run, found = _stored(_cached(digits_dir, teacher_dir))
    for split, logits in zip((run.dataset.train, run.dataset.validation), found, strict=True):
        assert (logits.shape, logits.dtype) == ((len(split), 1, 10), np.float16)
        expected = _mlp(_network(teacher_dir), split.images, run.dataset)
        np.testing.assert_allclose(logits[:, 0], expected, **FLOAT16)


def test_stored_views_are_the_teachers_on_what_the_student_sees(digits_dir, teacher_dir, tmp_path):
    config = _cached(digits_dir, teacher_dir, data__crop_padding=1, data__flip=True)
    config.role.cached.update(views=3, augmentation_seed=11)
    run, (train_logits, _) = _stored(config)
    variables, split = _network(teacher_dir), run.dataset.train
    assert train_logits.shape == (1293, 3, 10)
    rows = np.array([1200, 3, 400, 77, 5])  # another order and company than they were stored in
    for view in range(3):
        keys = randomness.example_keys(11, view, split.ids[rows])
        expected = _mlp_on_inputs(variables, run.method.training_view(keys, split.images[rows]))
        np.testing.assert_allclose(train_logits[rows, view], expected, **FLOAT16)
        for other in range(view):
            same = (train_logits[:, view] == train_logits[:, other]).all(axis=1)
            assert same.mean() < 0.2  # 9 shifts, mirrored or not: one pair in 18
    # A step hands the student the very view that its logits are of.
    trainer = train._Trainer(run, Workdir(tmp_path), False, None)
    trainer.close()
    batch = jax.tree.map(lambda leaf: leaf[rows], trainer.train_split)
    state = types.SimpleNamespace(seed=0, anchor=None)
    for step, view in ((4, 0), (5, 1), (14, 2), (16, 0)):  # 5 steps in an epoch
        seen = objective.look(run.method, Teacher(None, None), state, step, batch)
        np.testing.assert_array_equal(seen.teacher_logits, train_logits[rows, view])
        expected = _mlp_on_inputs(variables, seen.inputs)
        np.testing.assert_allclose(seen.teacher_logits, expected, **FLOAT16)
    # The outer loss looks at clean images, whatever is stored for training.
    expected = _mlp(variables, run.dataset.validation.images, run.dataset)
    (held_out,) = trainer.validation.teacher_logits_BxVxK.swapaxes(0, 1)
    np.testing.assert_allclose(held_out, expected, **FLOAT16)


def test_stored_logits_lie_beside_the_dataset_and_are_not_computed_again(
    digits_dir, teacher_dir, tmp_path, monkeypatch
):
    shutil.copytree(teacher_dir, tmp_path / "mine")
    before = _files(digits_dir)
    config = _cached(digits_dir, tmp_path / "mine")
    _, first = _stored(config)
    (path,) = _files(digits_dir) - before
    assert "mine" in path.name
    monkeypatch.setattr(teachers, "_all_views", None)
    _, again = _stored(config)
    jax.tree.map(np.testing.assert_array_equal, first, again)


def test_other_views_another_choice_and_another_name_have_files_of_their_own(
    digits_dir, teacher_dir, tmp_path
):
    shutil.copytree(teacher_dir, tmp_path / "mine")
    before = _files(digits_dir)
    flipped = {"data__flip": True}
    one_view = flipped | {"role__cached__views": 1}
    for changes in (
        {},
        {"teacher__which": "best"},
        {"role__cached__name": "kept"},
        flipped,  # nothing to a clean image: the first file again
        one_view,
        one_view | {"role__cached__augmentation_seed": 1},
        one_view | {"data__crop_padding": 1},
        one_view | {"role__cached__views": 2},
    ):
        _stored(_cached(digits_dir, tmp_path / "mine", **changes))
    found = _files(digits_dir) - before
    assert len(found) == 7
    assert any(path.name == "kept.array_record" for path in found)


def test_logits_of_a_teacher_trained_anew_are_stale(digits_dir, teacher_dir, other_dir, tmp_path):
    folder = tmp_path / "mine"
    shutil.copytree(teacher_dir, folder)
    config = _cached(digits_dir, folder)
    _stored(config)
    shutil.rmtree(folder)
    shutil.copytree(other_dir, folder)
    said = r"array_record: stale: these logits are of another teacher \(\w{12} there, \w{12} here\)"
    with pytest.raises(DataError, match=rf"{said}; delete the file to compute them again"):
        _stored(config)


def test_a_teacher_of_another_split_is_refused_although_its_logits_are_stored(
    digits_dir, teacher_dir
):
    _stored(_cached(digits_dir, teacher_dir))
    said = r"^teacher\.workdir='.*': that network was trained with data\.split_seed=0, .* 1; they"
    with pytest.raises(CheckpointError, match=said):
        assemble(_cached(digits_dir, teacher_dir, data__split_seed=1))


# Class means.


def _context(run):
    batch = Batch(run.dataset.train.images, run.dataset.train.labels)
    return teachers.context(run.method, run.teacher, batch, 10, 500)


def _class_means(logits, labels):
    probs = scipy.special.softmax(np.float64(logits), axis=1)
    return [probs[labels == c].mean(0) for c in range(10)]


@pytest.mark.parametrize("role", ["frozen", "cached"])
def test_class_means_are_those_of_a_clean_pass_with_the_labels_that_the_student_sees(
    digits_dir, teacher_dir, role
):
    config = _cached(digits_dir, teacher_dir, data__label_noise=0.2, data__flip=True)
    config.role.name, config.ratio.name = role, "tgeo"
    run = assemble(config)
    found, split = _context(run), run.dataset.train
    expected = _class_means(_mlp(_network(teacher_dir), split.images, run.dataset), split.labels)
    np.testing.assert_allclose(found.class_means_KxK, expected, rtol=1e-4)
    # The step of a cached teacher must not carry a network that it does not use.
    assert (found.variables is None) == (role == "cached")
    # Nor is the pass made for a ratio that does not look at its result.
    config.ratio.name = "wls"
    found = _context(assemble(config))
    assert found.class_means_KxK is None
    assert (found.variables is None) == (role == "cached")


def test_the_last_or_the_best_parameters_teach(digits_dir, teacher_dir):
    kernels = []
    for which in ("last", "best"):
        found = assemble(_cached(digits_dir, teacher_dir, teacher__which=which)).teacher.variables
        jax.tree.map(np.testing.assert_array_equal, found, _network(teacher_dir, which=which))
        kernels.append(found["params"]["Dense_0"]["kernel"])
    assert (kernels[0] != kernels[1]).any()


@pytest.mark.parametrize(("role", "count"), [("frozen", 2), ("cached", 1)])
def test_a_teacher_in_the_step_decides_about_loops_too(
    digits_dir, teacher_dir, monkeypatch, role, count
):
    asked = []
    monkeypatch.setattr(
        convolution, "has_convolutions", lambda init, *given: asked.append(init) or len(asked) > 1
    )
    config = _cached(digits_dir, teacher_dir)
    config.role.name = role
    assert assemble(config).loop_free == (role == "frozen")
    assert len(asked) == count


# Several teachers.


def _several(digits_dir, *folders, **changes):
    workdirs = tuple(str(folder) for folder in folders)
    return small(digits_dir, role__name="several", role__several__workdirs=workdirs, **changes)


@pytest.mark.parametrize("combine", ["mean", "each"])
def test_several_teachers_are_what_their_own_runs_say(digits_dir, teacher_dir, cnn_dir, combine):
    config = _several(digits_dir, teacher_dir, cnn_dir, role__several__combine=combine)
    config.ratio.name = "tgeo"
    config.teacher.mlp.hidden = (99,)  # says nothing of them
    run = assemble(config)
    images, labels = run.dataset.train.images, run.dataset.train.labels
    inputs = run.method.clean_view(images)
    mlp = _mlp(_network(teacher_dir), images, run.dataset)
    cnn_run = assemble(small(digits_dir, student__name="cnn", student__cnn__widths=(3,)))
    cnn = np.asarray(cnn_run.method.student.apply(_network(cnn_dir), inputs))
    logits = np.asarray(run.method.role.teach(run.teacher.variables, inputs))
    means = _context(run).class_means_KxK
    if combine == "each":
        np.testing.assert_allclose(logits, [mlp, cnn], rtol=1e-3, atol=1e-4)
        expected = [_class_means(one, labels) for one in (mlp, cnn)]
    else:
        probs = (scipy.special.softmax(mlp, axis=1) + scipy.special.softmax(cnn, axis=1)) / 2
        np.testing.assert_allclose(np.exp(logits), probs, rtol=1e-3, atol=1e-6)
        expected = _class_means(np.log(probs), labels)
    np.testing.assert_allclose(means, expected, rtol=1e-3)


def test_one_of_several_teachers_that_is_missing_or_of_another_split_is_named(
    digits_dir, teacher_dir, other_dir, tmp_path
):
    nobody = str(tmp_path / "nobody")
    said = rf"^role\.several\.workdirs='{re.escape(nobody)}': no run there; train one with"
    with pytest.raises(CheckpointError, match=said):
        assemble(_several(digits_dir, teacher_dir, nobody))
    said = r"^role\.several\.workdirs='.*': .* with data\.split_seed=0, this run has 1"
    with pytest.raises(CheckpointError, match=said):
        assemble(_several(digits_dir, teacher_dir, other_dir, data__split_seed=1))


# Anchors.


def _anchored(digits_dir, folder, **changes):
    return small(digits_dir, role__name="trikd", role__trikd__anchor=str(folder), **changes)


@pytest.mark.parametrize(
    ("seeds", "anchored_by"), [((0, 2), (0, 1)), ((0, 3), (0, 0, 0)), ((4, 2), (0, 0))]
)
def test_every_seed_keeps_its_own_anchor_where_there_is_one(
    digits_dir, teacher_dir, seeds, anchored_by
):
    first, count = seeds
    run = assemble(_anchored(digits_dir, teacher_dir, seed=first, seeds=count))
    expected = [_network(teacher_dir, index) for index in anchored_by]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *expected)
    jax.tree.map(np.testing.assert_array_equal, run.anchor, stacked)


def test_an_anchor_of_another_architecture_is_named_with_both_shapes(digits_dir, teacher_dir):
    field = re.escape(f"role.trikd.anchor={str(teacher_dir)!r}")
    config = _anchored(digits_dir, teacher_dir, student__mlp__hidden=(9,))
    said = (
        rf"^{field}: another architecture: parameter params/Dense_0/bias has shape \(8,\).*\(9,\)"
    )
    with pytest.raises(CheckpointError, match=said):
        assemble(config)


@pytest.mark.parametrize("start", ["fresh", "trained"])
def test_a_teacher_that_trains_along_starts_as_the_configuration_says(
    digits_dir, teacher_dir, other_dir, tmp_path, start
):
    config = _anchored(digits_dir, other_dir, role__trikd__start=start, seeds=2)
    config.teacher.workdir = str(teacher_dir)
    trainer = train._Trainer(assemble(config), Workdir(tmp_path), False, None)
    trainer.close()
    state = jax.device_get(trainer.state)
    jax.tree.map(lambda leaf: np.testing.assert_array_equal(*leaf), state.anchor["params"])
    kernels = state.teacher.learner.params["Dense_0"]["kernel"]
    given = _network(teacher_dir)["params"]["Dense_0"]["kernel"]
    if start == "trained":
        np.testing.assert_array_equal(kernels, [given, given])
    else:
        assert np.abs(kernels[0] - kernels[1]).min() > 0
        assert np.abs(kernels - given).min() > 0


# Whole runs.


@pytest.fixture(scope="module")
def frozen_dir(make, teacher_dir) -> pathlib.Path:
    """A ratio that looks at teacher and student of every sample, and learns nothing."""
    return make(role__name="frozen", teacher__workdir=str(teacher_dir), ratio__name="wls", seeds=2)


def _like(frozen_dir, **changes) -> ConfigDict:
    return _changed(ConfigDict(Workdir(frozen_dir).config()), changes)


def _assert_same_run(folder, expected, **tolerance) -> None:
    found, wanted = (writers.read_records(path / "metrics.jsonl") for path in (folder, expected))
    for a, b in zip(found, wanted, strict=True):
        assert set(a) == set(b)
        shared = [n for n, v in a.items() if not (n.startswith("time/") or isinstance(v, list))]
        assert {n: a[n] for n in shared} == pytest.approx({n: b[n] for n in shared}, **tolerance)
    arrays, others = (np.load(path / "samples.npz") for path in (folder, expected))
    np.testing.assert_allclose(arrays["ratio"], others["ratio"], rtol=2e-3, atol=1e-3)
    np.testing.assert_array_equal(arrays["teacher_class"], others["teacher_class"])
    taught, wanted = (Workdir(path).result()["teacher"] for path in (folder, expected))
    for split in ("train", "test"):
        name = f"{split}_accuracy"
        assert taught[name] == pytest.approx(wanted[name])


def test_a_frozen_teacher_is_described_once_for_all_seeds(frozen_dir, teacher_dir, digits_dir):
    arrays = np.load(frozen_dir / "samples.npz")
    assert arrays["ratio"].shape == (2, 1293)
    dataset = sources.load("digits", digits_dir)
    says = _mlp(_network(teacher_dir), dataset.train.images, dataset).argmax(1)
    np.testing.assert_array_equal(arrays["teacher_class"], [says])
    np.testing.assert_array_equal(arrays["teacher_right"], [says == dataset.train.labels])
    right = (says == dataset.train.labels).mean()
    assert Workdir(frozen_dir).result()["teacher"]["train_accuracy"] == pytest.approx(right)
    record = writers.read_records(frozen_dir / "metrics.jsonl")[-1]
    assert "test_teacher/accuracy" not in record  # it does not change


def test_a_run_on_stored_logits_is_that_with_the_network_and_resumes_from_the_file(
    frozen_dir, tmp_path, monkeypatch
):
    config = _like(frozen_dir, role__name="cached")
    result = train.run(config, tmp_path / "run", progress=False)
    _assert_same_run(tmp_path / "run", frozen_dir, rel=2e-3, abs=3e-3)
    monkeypatch.setattr(teachers, "_all_views", None)
    (tmp_path / "run" / "result.json").unlink()
    assert train.run(config, tmp_path / "run", progress=False)["per_seed"] == result["per_seed"]


@pytest.mark.parametrize("combine", ["mean", "each"])
def test_several_teachers_that_all_say_the_same_teach_like_one(
    frozen_dir, teacher_dir, tmp_path, combine
):
    shutil.copytree(teacher_dir, tmp_path / "twin")
    config = _like(frozen_dir, role__name="several", role__several__combine=combine)
    config.role.several.workdirs = (str(teacher_dir), str(tmp_path / "twin"))
    config.teacher.workdir = ""
    train.run(config, tmp_path / "run", progress=False)
    _assert_same_run(tmp_path / "run", frozen_dir, rel=1e-4, abs=1e-3)


def test_weights_that_live_for_one_batch_leave_nothing_to_say_of_samples(frozen_dir, tmp_path):
    config = _like(frozen_dir, ratio__name="rw", train__epochs=1, seeds=1)
    result = train.run(config, tmp_path / "run", progress=False)
    assert result["steps"] == 5
    assert not (tmp_path / "run" / "samples.npz").exists()
    (record,) = writers.read_records(tmp_path / "run" / "metrics.jsonl")
    assert record["train/outer_loss"] > 0
    assert 0 < record["train/ratio"] < 1
