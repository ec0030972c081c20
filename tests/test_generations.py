"""Teachers that train along, and chains of runs in which every student anchors the next."""

from __future__ import annotations

import itertools
import json
import pathlib

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict
from orbax.checkpoint import v1 as ocp

from tests.test_teachers import small
from tgeo_jax import checkpoint, generations, models, train, writers
from tgeo_jax import config as configs
from tgeo_jax.assemble import assemble
from tgeo_jax.data import sources, views
from tgeo_jax.errors import CheckpointError, ConfigError
from tgeo_jax.randomness import of_generation
from tgeo_jax.workdir import Workdir


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """What runs again does not compile again."""
    options = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0,
    }
    before = {name: getattr(jax.config, name) for name in options}
    for values in (options, before):
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()  # it looks at its folder only once
        if values is options:
            yield


def _state(folder: pathlib.Path) -> dict:
    """Everything in a run's newest checkpoint, as plain arrays."""
    with ocp.training.Checkpointer(folder.absolute() / "checkpoints") as checkpointer:
        step = checkpointer.latest.step
        saved = checkpointer.checkpointables_metadata(step).metadata
        empty = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), dict(saved))
        return checkpointer.load_checkpointables(step, empty)


def _assert_same_bits(a, b) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def _records(folder: pathlib.Path) -> list[dict]:
    return [
        {name: value for name, value in record.items() if not name.startswith("time/")}
        for record in writers.read_records(folder / "metrics.jsonl")
    ]


class _Stopped(Exception):
    pass


def _watch(monkeypatch, stop_at: int = 0) -> list[int]:
    """The steps that are logged from here on; the one of that number, 1, 2, ..., ends the run."""
    real, steps = writers.Writers.write, []

    def write(self, records):
        steps.append(records[0]["step"])
        if len(steps) == stop_at:
            raise _Stopped
        real(self, records)

    monkeypatch.setattr(writers.Writers, "write", write)
    return steps


# Two networks side by side.


def _mutual(digits_dir: str) -> ConfigDict:
    """A BatchNorm teacher, and a ratio that learns from it; 2 epochs of 5 steps."""
    return small(
        digits_dir, role__name="dml", ratio__name="tgeo", seeds=2, teacher__name="cnn",
        teacher__cnn__widths=(2,),
    )  # fmt: skip


@pytest.fixture(scope="module")
def mutual_dir(digits_dir, tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("mutual")
    train.run(_mutual(digits_dir), folder, progress=False)
    return folder


def _teachers_logits(folder: pathlib.Path, split, dataset) -> np.ndarray:
    """Of every seed's teacher after training, evaluation mode."""
    learner = _state(folder)["state"]["teacher"]["learner"]
    config = Workdir(folder).config()["teacher"]
    module = models.build(config["name"], 10, **config[config["name"]])
    inputs = views.normalise(dataset.mean, dataset.std)(split.images)
    variables = {"params": learner["params"], "batch_stats": learner.get("batch_stats") or {}}
    return np.asarray(jax.vmap(lambda own: module.apply(own, inputs))(variables))


def test_mutual_learning_logs_both_networks(mutual_dir, digits_dir):
    records = _records(mutual_dir)
    assert [(r["step"], r["seed"]) for r in records] == [(5, 0), (5, 1), (10, 0), (10, 1)]
    for record in records:
        assert {
            "train/hard_loss", "train/soft_loss", "train/teacher_loss", "train/outer_loss",
            "train/student_teacher_loss", "train/ratio", "test/accuracy", "test_teacher/accuracy",
            "test_teacher/cross_entropy",
        } <= set(record)  # fmt: skip
        assert not any("anchor" in name for name in record)
    dataset = sources.load("digits", digits_dir)
    right = _teachers_logits(mutual_dir, dataset.test, dataset).argmax(-1) == dataset.test.labels
    logged = [r["test_teacher/accuracy"] for r in records if r["step"] == 10]
    assert logged == pytest.approx(right.mean(axis=1))
    result = Workdir(mutual_dir).result()
    assert result["teacher"]["test_accuracy"] == pytest.approx(right.mean())
    assert "generations" not in result


def test_samples_tell_what_every_seeds_own_teacher_says(mutual_dir, digits_dir):
    arrays = np.load(mutual_dir / "samples.npz")
    dataset = sources.load("digits", digits_dir)
    says = _teachers_logits(mutual_dir, dataset.train, dataset).argmax(-1)
    assert arrays["ratio"].shape == says.shape == (2, 1293)
    assert (says[0] != says[1]).any()
    np.testing.assert_array_equal(arrays["teacher_class"], says)
    np.testing.assert_array_equal(arrays["teacher_right"], says == dataset.train.labels)
    right = Workdir(mutual_dir).result()["teacher"]["train_accuracy"]
    assert right == pytest.approx((says == dataset.train.labels).mean())


def test_an_interrupted_run_of_two_networks_goes_on_with_the_same_bits(
    mutual_dir, digits_dir, tmp_path, monkeypatch
):
    config = _mutual(digits_dir)
    with monkeypatch.context() as patch:
        _watch(patch, stop_at=2)
        with pytest.raises(_Stopped):
            train.run(config, tmp_path, progress=False)
    assert [r["step"] for r in _records(tmp_path)] == [5, 5]
    steps = _watch(monkeypatch)
    train.run(config, tmp_path, progress=False)
    assert steps == [10]  # it did go on, and did not begin again
    _assert_same_bits(_state(tmp_path), _state(mutual_dir))
    assert _records(tmp_path) == _records(mutual_dir)
    ratio, expected = (np.load(path / "samples.npz")["ratio"] for path in (tmp_path, mutual_dir))
    np.testing.assert_array_equal(ratio, expected)


# Chains.


def _chain(digits_dir: str, **changes) -> ConfigDict:
    """Two generations of a BatchNorm student."""
    chosen = {"role__name": "trikd", "student__name": "cnn", "student__cnn__widths": (3,)}
    return small(digits_dir, seeds=2, **chosen, **changes)


@pytest.fixture(scope="module")
def chain(digits_dir, tmp_path_factory) -> tuple[pathlib.Path, dict]:
    folder = tmp_path_factory.mktemp("runs") / "chain"
    return folder, generations.run(_chain(digits_dir), folder, progress=False)


def _folders(whole: pathlib.Path) -> list[pathlib.Path]:
    return [whole / f"generation_{number}" for number in range(3)]


def test_every_generation_is_a_finished_run_of_its_own(chain):
    whole, _ = chain
    assert sorted(path.name for path in whole.iterdir() if path.is_dir()) == [
        "generation_0", "generation_1", "generation_2",
    ]  # fmt: skip
    found = [Workdir(folder) for folder in _folders(whole)]
    assert all(folder.result()["steps"] == 10 for folder in found)
    assert [folder.config()["role"]["name"] for folder in found] == ["alone", "trikd", "trikd"]
    assert [folder.config()["generation"] for folder in found] == [0, 1, 2]
    assert [folder.samples.exists() for folder in found] == [False, True, True]


def test_each_student_anchors_the_next_generation_seed_by_seed(chain):
    states = [_state(folder)["state"] for folder in _folders(chain[0])]
    assert states[0].get("anchor") is None
    for before, after in itertools.pairwise(states):
        _assert_same_bits(after["anchor"]["params"], before["student"]["params"])
        _assert_same_bits(after["anchor"]["batch_stats"], before["student"]["batch_stats"])
    kernel = states[2]["anchor"]["params"]["Conv_0"]["kernel"]
    assert np.abs(kernel[0] - kernel[1]).max() > 0.01  # so "seed by seed" says something


def test_generations_begin_anew(chain, tmp_path):
    """Fresh networks and another order of examples, for every seed."""
    starts = []
    for number, folder in enumerate(_folders(chain[0])):
        config = ConfigDict(Workdir(folder).config())
        trainer = train._Trainer(assemble(config), Workdir(tmp_path / str(number)), False, None)
        trainer.close()
        starts.append(jax.device_get(trainer.state))
        saved = _state(folder)["state"]["seed"]
        assert saved.tolist() == [of_generation(seed, number) for seed in (0, 1)]
        assert starts[-1].seed.tolist() == saved.tolist()
    students = [start.student.params["Conv_0"]["kernel"] for start in starts]
    teachers = [start.teacher.learner.params["Dense_0"]["kernel"] for start in starts[1:]]
    for of_starts in (students, teachers):
        for one, other in itertools.combinations(np.concatenate(of_starts), 2):
            assert np.abs(one - other).min() > 0


def test_a_chains_result_is_its_last_with_the_accuracies_of_all(chain):
    whole, result = chain
    each = [Workdir(folder).result() for folder in _folders(whole)]
    assert result["generations"] == [one["test_accuracy"] for one in each]
    assert len(result["generations"]) == 3
    assert result["seconds"] == pytest.approx(sum(one["seconds"] for one in each))
    shared = [name for name in each[-1] if name != "seconds"]
    assert [result[name] for name in shared] == [each[-1][name] for name in shared]
    assert Workdir(whole).result() == result


def test_a_generation_logs_what_it_learns_from_teacher_and_anchor(chain, digits_dir):
    whole, result = chain
    first, *later = (_records(folder) for folder in _folders(whole))
    assert not any("anchor" in name or "teacher" in name for name in first[-1])
    for records in later:
        assert {
            "train/anchor_student_loss", "train/anchor_teacher_loss", "train/student_teacher_loss",
            "train/soft_loss", "train/teacher_loss", "test_teacher/accuracy",
        } <= set(records[-1])  # fmt: skip
        assert records[-1]["train/anchor_student_loss"] > 0
    dataset = sources.load("digits", digits_dir)
    logits = _teachers_logits(_folders(whole)[2], dataset.test, dataset)
    right = logits.argmax(-1) == dataset.test.labels
    assert result["teacher"]["test_accuracy"] == pytest.approx(right.mean())
    means = _state(_folders(whole)[2])["state"]["teacher"]["class_means_KxK"]
    np.testing.assert_allclose(means.sum(-1), np.ones((2, 10)), rtol=1e-5)


def _times(whole: pathlib.Path) -> dict:
    return {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()}


def test_a_finished_chain_is_not_trained_again(chain, digits_dir):
    whole, result = chain
    before = _times(whole)
    assert generations.run(_chain(digits_dir), whole, progress=False) == result
    assert _times(whole) == before


def test_another_configuration_in_a_chains_folder_is_refused(chain, digits_dir):
    before = _times(chain[0])
    said = r"chain holds a run with another configuration:\n +role\.trikd\.generations: 2 -> 3"
    with pytest.raises(ConfigError, match=said):
        generations.run(_chain(digits_dir, role__trikd__generations=3), chain[0], progress=False)
    assert _times(chain[0]) == before


def test_a_chain_stopped_inside_a_generation_goes_on_with_the_same_bits(
    chain, digits_dir, tmp_path, monkeypatch
):
    whole = tmp_path / "chain"
    with monkeypatch.context() as patch:
        _watch(patch, stop_at=4)  # of generation 1 the second and last
        with pytest.raises(_Stopped):
            generations.run(_chain(digits_dir), whole, progress=False)
    assert Workdir(whole).result() is None
    assert [folder.exists() for folder in _folders(whole)] == [True, True, False]
    first = _times(whole / "generation_0")
    steps = _watch(monkeypatch)
    result = generations.run(_chain(digits_dir), whole, progress=False)
    assert steps == [10, 5, 10]
    assert _times(whole / "generation_0") == first
    for ours, theirs in zip(_folders(whole), _folders(chain[0]), strict=True):
        _assert_same_bits(_state(ours), _state(theirs))
        assert _records(ours) == _records(theirs)
    for name in ("generations", "per_seed", "teacher", "steps"):
        assert result[name] == chain[1][name]


def test_the_last_student_of_a_chain_can_teach_and_anchor(chain, digits_dir, tmp_path):
    whole, _ = chain
    config = _chain(digits_dir, train__epochs=1, teacher__name="cnn", teacher__cnn__widths=(3,))
    config.teacher.workdir = config.role.trikd.anchor = str(whole)
    config.role.trikd.start = "frozen"
    run = assemble(config)
    last = [
        checkpoint.load_network(whole / "generation_2" / "checkpoints", "last", s) for s in (0, 1)
    ]
    _assert_same_bits(run.teacher.variables, last[0])
    _assert_same_bits(run.anchor, jax.tree.map(lambda *leaves: np.stack(leaves), *last))

    # A teacher that is not trained on is one for all seeds, and is not evaluated every epoch.
    train.run(config, tmp_path, progress=False)
    assert np.load(tmp_path / "samples.npz")["teacher_class"].shape == (1, 1293)
    for record in _records(tmp_path):
        assert {"train/anchor_student_loss", "train/soft_loss"} <= set(record)
        assert not {"train/anchor_teacher_loss", "test_teacher/accuracy"} & set(record)


def test_the_report_of_a_chain_shows_all_generations(chain, command, tmp_path):
    whole, result = chain
    path = tmp_path / "mine.py"
    path.write_text(
        "import json\nfrom ml_collections import ConfigDict\n"
        f"def get_config(): return ConfigDict(json.load(open({str(whole / 'config.json')!r})))\n"
    )
    done = command("-m", "experiments.main", f"--config={path}", f"--workdir={whole}")
    assert "is finished; nothing to do." in done.stdout
    page = (whole / "report" / "index.html").read_text()
    for number, accuracy in enumerate(result["generations"]):
        assert f"generation_{number}" in page
        assert f"{100 * accuracy['last']['mean']:.2f} ± " in page
    assert "<h1>generation_0 · generation_1 · generation_2</h1>" in page


# What is checked before the first anchor is trained.


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"role__trikd__start": "trained"}, ConfigError, r"^teacher\.workdir='': "),
        (
            {"role__trikd__start": "trained", "teacher__workdir": "runs/nobody"},
            CheckpointError,
            r"^teacher\.workdir='runs/nobody': no run there",
        ),
        (
            {"ratio__name": "tgeo", "meta__order": "prequential"},
            ConfigError,
            r"^meta\.order='prequential' .*use meta\.order='student_first'",
        ),
        ({"data__batch_size": 2000}, ConfigError, r"^data\.batch_size=2000: larger than"),
        ({"role__trikd__anchor_student": (1, 9)}, ConfigError, r"^role\.trikd\.anchor_student="),
    ],
)
def test_what_is_wrong_with_a_chain_shows_before_its_first_generation(
    digits_dir, tmp_path, changes, error, said
):
    with pytest.raises(error, match=said):
        generations.run(_chain(digits_dir, **changes), tmp_path / "chain", progress=False)
    assert not (tmp_path / "chain").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"role__trikd__anchor_student": (0.0,), "role__trikd__anchor_teacher": (0, 0.0)},
        {"role__trikd__anchor": "runs/anchor"},
        {"role__name": "dml"},
        {"role__name": "alone"},
    ],
)
def test_what_needs_no_anchor_of_its_own_is_a_single_run(
    digits_dir, tmp_path, monkeypatch, changes
):
    config = _chain(digits_dir)
    config.optimizer.update(schedule="step", drop_epochs=(1,))
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    calls = []

    def run(config, folder, *, progress):
        calls.append((json.loads(configs.to_json(config)), folder, progress))
        return {"test_accuracy": 1}

    monkeypatch.setattr(train, "run", run)
    assert generations.run(config, tmp_path, progress=False) == {"test_accuracy": 1}
    assert calls == [(json.loads(configs.to_json(config)), tmp_path, False)]


@pytest.mark.parametrize("weight", ["anchor_student", "anchor_teacher"])
def test_one_weight_is_enough_to_need_an_anchor(digits_dir, weight):
    config = _chain(digits_dir)
    config.role.trikd.anchor_student = config.role.trikd.anchor_teacher = (0.0,)
    assert not generations.is_chain(config)
    config.role.trikd[weight] = (0.0, 2.0)
    assert generations.is_chain(config)


def test_a_chain_goes_on_whether_its_folder_is_named_from_here_or_from_the_root(
    digits_dir, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    seen = []
    monkeypatch.setattr(train, "run", lambda config, *_, **__: seen.append(config) or {})
    for folder in (pathlib.Path("chain"), tmp_path / "chain"):
        with pytest.raises(KeyError):  # those results are empty
            generations.run(_chain(digits_dir), folder, progress=False)
    first, again = seen[:3], seen[3:]
    assert [configs.to_json(one) for one in first] == [configs.to_json(one) for one in again]
