"""Which epoch is best and when to stop: by a second algorithm, and of real runs on the digits."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from sklearn.metrics import confusion_matrix, f1_score, roc_auc_score

from tgeo_jax import checkpoint, evaluate, models, outcome, selection, train, writers
from tgeo_jax import config as configs
from tgeo_jax.assemble import assemble
from tgeo_jax.data import sources, views
from tgeo_jax.errors import CheckpointError, ConfigError, DataError, Interrupted
from tgeo_jax.state import Batch, Best, Fusion, Learner, TrainState

RANDOM = np.random.RandomState(0)


def state_at(step: int, value) -> TrainState:
    """Two seeds whose parameters are `value`."""
    params = {"w": jnp.asarray(value, jnp.float32)[:, None] * jnp.ones((2, 3))}
    student, fusion = Learner(params, {}, ()), Fusion({"v": params["w"]}, ())
    return TrainState(jnp.int32(step), jnp.arange(2), student, fusion)


def nothing_yet() -> Best:
    blank = jnp.full((2, 3), -1.0)
    return Best({"w": blank}, {}, {"v": blank}, jnp.full(2, -np.inf), jnp.zeros(2, jnp.int32))


@pytest.mark.parametrize("select_by", selection.FIGURES)
@pytest.mark.parametrize("lacking", [0.0, 0.5, 1.0])
def test_state_and_records_agree_on_the_best_epoch(select_by, lacking):
    """With ties, and with NaN in some evaluations or in all."""
    values = RANDOM.randint(0, 4, (12, 2)) / 4
    values[RANDOM.rand(12, 2) < lacking] = np.nan
    best, sign = nothing_yet(), -1 if select_by == "cross_entropy" else 1
    for number, pair in enumerate(values, 1):
        found = [selection.score({select_by: value}, select_by) for value in pair]
        scores = jnp.asarray(np.array(found))
        best = selection.update(best, state_at(10 * number, [number, 100 + number]), scores)
    for seed in range(2):
        own = values[:, seed]
        known = np.flatnonzero(~np.isnan(own))
        # By hand: the first of those that none exceeds; without any, the first evaluation.
        expected = next((n for n in known if (sign * own[n] >= sign * own[known]).all()), 0) + 1
        assert int(best.step[seed]) == 10 * expected
        np.testing.assert_array_equal(best.params["w"][seed], [expected + 100 * seed] * 3)
        np.testing.assert_array_equal(best.fusion["v"][seed], [expected + 100 * seed] * 3)
        records = [
            {
                "seed": seed, "step": 10 * n, "epoch": n, f"validation/{select_by}": value,
                "test/accuracy": 0.5,
            }
            for n, value in enumerate(own, 1)
        ]  # fmt: skip
        (told,) = [outcome._of_seed(seed, records, select_by, ("test",))["best_by_validation"]]
        assert told["step"] == 10 * expected


def test_patience_counts_evaluations_in_a_row_without_a_best_of_any_seed():
    """Against lists of scores, at every step between evaluations too."""
    for _ in range(30):
        patience, scores = RANDOM.randint(1, 5), RANDOM.randint(0, 9, (15, 2))
        for step in range(1, 151):
            seen = scores[: step // 10]
            is_new = [any(row[s] > max(seen[:n, s], default=-1) for s in (0, 1))
                      for n, row in enumerate(seen)]  # fmt: skip
            best_steps = [10 * (1 + int(np.argmax(seen[:, s]))) if len(seen) else 0 for s in (0, 1)]
            expected = len(seen) > patience and not any(is_new[-patience:])
            found = selection.has_run_out(patience, np.array(best_steps), step, 10)
            assert found == expected
            assert not selection.has_run_out(0, np.array(best_steps), step, 10)


# Refused before anything is compiled.


@pytest.mark.parametrize(
    ("select_by", "said"),
    [
        ("auc", r"train\.select_by='auc': .* two classes, and this dataset has 10; use 'macro_f1'"),
        ("auroc", r"train\.select_by='auroc': unknown"),
        ("cross_entropi", r"unknown; did you mean 'cross_entropy'\?"),
    ],
)
def test_a_figure_that_the_digits_do_not_have_is_refused(digits_dir, select_by, said):
    config = small(digits_dir)
    config.train.select_by = select_by
    with pytest.raises(ConfigError, match=said):
        assemble(config)


def test_macro_f1_of_many_classes_is_refused():
    selection.check("macro_f1", None, 100)
    with pytest.raises(ConfigError, match=r"'macro_f1': measured of up to 100 classes.* has 101"):
        selection.check("macro_f1", None, 101)


def test_auc_of_a_single_class_is_refused_and_never_invented():
    with pytest.raises(DataError, match=r"train\.select_by='auc'.*one class only"):
        selection.check("auc", np.ones(5, np.int32), 2)
    with pytest.raises(DataError, match=r"train\.select_by='auc'.*one class only"):
        selection.score({"validation/accuracy": 1.0}, "auc", "validation/")


@pytest.mark.parametrize("patience", [-1, 1.5])
def test_patience_is_a_whole_number(digits_dir, patience):
    config = configs.default().to_dict()
    config["train"]["patience"] = patience
    with pytest.raises(ConfigError, match=r"train\.patience=-?1.*must be an integer"):
        configs.check(configs.ConfigDict(config))


# Runs on the digits.


def small(digits_dir: str):
    """Two MLPs without a teacher that stop improving after a few of 40 epochs."""
    config = configs.default()
    config.seeds = 2
    config.data.update(dir=digits_dir, batch_size=256)
    config.role.name = "alone"
    config.student.name, config.student.mlp.hidden = "mlp", (8,)
    config.optimizer.learning_rate = 0.3
    config.train.update(epochs=40, patience=3, checkpoint_every=4, steps_per_dispatch=1)
    return config


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory):
    """What one of these runs compiled, the next ones find."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = [getattr(jax.config, name) for name in names]
    for name, value in zip(names, (str(tmp_path_factory.mktemp("compiled")), 0), strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in zip(names, before, strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def stopped(digits_dir, tmp_path_factory):
    """The folder of an undisturbed run with patience."""
    folder = tmp_path_factory.mktemp("stopped")
    train.run(small(digits_dir), folder, progress=False)
    return folder


def timeless(folder):
    """Records without the figures of the clock."""
    return [
        {name: value for name, value in record.items() if not name.startswith("time/")}
        for record in writers.read_records(folder / "metrics.jsonl")
    ]


def bits(folder):
    """Everything that the newest checkpoint holds."""
    found = checkpoint.load_newest(folder / "checkpoints")
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(found)]


def stop_by_records(records, patience: int, figure="validation/accuracy") -> float:
    """The epoch at which a run ends: patience after the last new best of any seed."""
    best, last_new = {}, 0.0
    for record in records:
        if record[figure] > best.get(record["seed"], -1.0):
            best[record["seed"]], last_new = record[figure], record["epoch"]
        if record["epoch"] >= last_new + patience and record["seed"] == 1:
            return record["epoch"]
    raise AssertionError("patience did not run out")


def test_a_run_stops_where_its_own_records_say(stopped):
    records, result = timeless(stopped), json.loads((stopped / "result.json").read_text())
    epoch = stop_by_records(records, 3)
    assert 5 < epoch < 40
    assert records[-1]["epoch"] == epoch == result["epochs"]
    assert records[-1]["step"] == result["steps"] == 5 * epoch  # 1,293 images in batches of 256
    assert result["stopped_early"] is True
    assert len(result["epoch_seconds"]) == epoch
    # A seed that ran out earlier trained on: its last figures are of the end.
    bests = [own["best_by_validation"]["epoch"] for own in result["per_seed"]]
    assert max(bests) == epoch - 3 > min(bests)
    assert [own["last"]["epoch"] for own in result["per_seed"]] == [epoch] * 2


@pytest.mark.parametrize("after", [1, 43])
def test_a_stopped_and_resumed_run_ends_at_the_same_step(stopped, digits_dir, tmp_path, after):
    """Told to stop in the middle of an epoch."""

    class Told:
        signal, calls = signal.SIGTERM, 0

        def reached(self) -> bool:
            self.calls += 1
            return self.calls > after

    with pytest.raises(Interrupted, match=f"stopped after step {after} of 200"):
        train.run(small(digits_dir), tmp_path, progress=False, interruption=Told())
    train.run(small(digits_dir), tmp_path, progress=False)
    assert timeless(tmp_path) == timeless(stopped)
    assert bits(tmp_path) == bits(stopped)


def test_a_run_killed_after_its_last_checkpoint_trains_no_further(stopped, digits_dir, tmp_path):
    shutil.copytree(stopped, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    result = train.run(small(digits_dir), tmp_path / "run", progress=False)
    expected = json.loads((stopped / "result.json").read_text())
    timed = ("finished", "seconds")
    assert {k: v for k, v in result.items() if k not in timed} == {
        k: v for k, v in expected.items() if k not in timed
    }
    assert bits(tmp_path / "run") == bits(stopped)


def test_a_run_killed_before_its_last_checkpoint_repeats_the_decision(
    stopped, digits_dir, tmp_path
):
    """The records are there, the checkpoint is that of some evaluations before."""
    shutil.copytree(stopped, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    newest = max((tmp_path / "run" / "checkpoints").glob("[0-9]*"), key=lambda p: int(p.name))
    shutil.rmtree(newest)
    train.run(small(digits_dir), tmp_path / "run", progress=False)
    assert timeless(tmp_path / "run") == timeless(stopped)
    assert bits(tmp_path / "run") == bits(stopped)


def test_without_patience_a_run_goes_to_its_end(stopped, digits_dir, tmp_path):
    """Up to where the other stopped, both are the same."""
    config = small(digits_dir)
    config.train.update(patience=0)
    result = train.run(config, tmp_path, progress=False)
    assert (result["epochs"], result["steps"], result["stopped_early"]) == (40, 200, False)
    before = timeless(stopped)
    assert timeless(tmp_path)[: len(before)] == before


def test_lost_records_of_an_early_end_are_noticed(stopped, digits_dir, tmp_path):
    shutil.copytree(stopped, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    (tmp_path / "run" / "metrics.jsonl").unlink()
    step = json.loads((stopped / "result.json").read_text())["steps"]
    with pytest.raises(CheckpointError, match=rf"lacks the records of the last step, {step}"):
        train.run(small(digits_dir), tmp_path / "run", progress=False)


@pytest.mark.parametrize(("select_by", "choose"), [("cross_entropy", min), ("macro_f1", max)])
def test_another_figure_chooses_the_epoch(digits_dir, tmp_path, select_by, choose):
    config = small(digits_dir)
    config.train.update(select_by=select_by, patience=0, epochs=12)
    result = train.run(config, tmp_path, progress=False)
    records, field = timeless(tmp_path), f"validation/{select_by}"
    saved = checkpoint.load_newest(tmp_path / "checkpoints")["best"]
    for own in result["per_seed"]:
        mine = [record for record in records if record["seed"] == own["seed"]]
        best = choose(mine, key=lambda record: record[field])
        assert own["best_by_validation"]["epoch"] == best["epoch"]
        assert own["best_by_validation"][field] == best[field]
        assert saved["step"][own["seed"]] == best["step"]
        sign = -1 if select_by == "cross_entropy" else 1
        assert sign * saved["validation_score"][own["seed"]] == pytest.approx(best[field])


# Two classes, and a further test split.


def binary(*arguments, **options) -> sources.Dataset:
    """The digits, odd against even; of the test split every third image is a second one."""
    found = LOAD(*arguments, **options)
    of_two = lambda split: dataclasses.replace(split, labels=split.labels % 2)  # noqa: E731
    test, third = of_two(found.test), np.arange(0, len(found.test), 3)
    return dataclasses.replace(
        found,
        train=of_two(found.train),
        validation=of_two(found.validation),
        test=test,
        class_names=("even", "odd"),
        extra={"test_hard": test.take(third)},
    )


LOAD = sources.load


@pytest.fixture(scope="module")
def of_two(digits_dir, tmp_path_factory):
    """(result, folder) of a run with a frozen teacher that chooses by AUC."""
    teacher_dir, folder = (tmp_path_factory.mktemp(name) for name in ("teacher", "student"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "load", binary)
        config = small(digits_dir)
        config.train.update(select_by="auc", epochs=6, patience=0, checkpoint_every=6)
        config.teacher.name, config.teacher.mlp.hidden = "mlp", (8,)
        train.run(config, teacher_dir, progress=False)
        config.role.name = "frozen"
        config.teacher.workdir = str(teacher_dir)
        return train.run(config, folder, progress=False), folder


def logits_of(folder, digits_dir, which: str, seed: int, split: str):
    data = binary("digits", digits_dir)
    part = data.extra.get(split) or getattr(data, split)
    predict = evaluate.predictor(
        models.build("mlp", 2, hidden=(8,)), views.normalise(data.mean, data.std)
    )
    variables = checkpoint.load_network(folder / "checkpoints", which, seed)
    asked = evaluate.Evaluator(predict, 100, seeds=False)
    return asked.logits(variables, Batch(part.images, part.labels)), part.labels


@pytest.mark.parametrize("split", ["validation", "test", "test_hard"])
def test_binary_figures_of_a_run_are_those_of_its_saved_networks(of_two, digits_dir, split):
    result, folder = of_two
    records = timeless(folder)
    for which, key in (("last", "last"), ("best", "best_by_validation")):
        for own in result["per_seed"]:
            seed, step = own["seed"], own[key]["step"]
            logits, labels = logits_of(folder, digits_dir, which, seed, split)
            (logged,) = [r for r in records if (r["seed"], r["step"]) == (seed, step)]
            odds = np.float64(logits[:, 1]) - logits[:, 0]
            assert logged[f"{split}/auc"] == pytest.approx(roc_auc_score(labels, odds), abs=1e-4)
            said = logits.argmax(1)
            expected = f1_score(labels, said, average="macro")
            assert logged[f"{split}/macro_f1"] == pytest.approx(expected)
            if split != "validation":
                assert own[key][f"{split}/auc"] == logged[f"{split}/auc"]
                matrix = confusion_matrix(labels, said)
                np.testing.assert_array_equal(result["confusion"][key][split][seed], matrix)


def test_the_best_epoch_is_that_of_the_best_auc(of_two):
    result, folder = of_two
    for own in result["per_seed"]:
        mine = [r for r in timeless(folder) if r["seed"] == own["seed"]]
        best = max(mine, key=lambda record: np.float32(record["validation/auc"]))
        assert own["best_by_validation"]["step"] == best["step"]


def test_a_further_test_split_is_treated_like_the_first(of_two):
    result, folder = of_two
    assert (result["dataset"]["test"], result["dataset"]["test_hard"]) == (360, 120)
    for record in timeless(folder):
        names = {name.partition("/")[2] for name in record if name.startswith("test/")}
        assert {"auc", "accuracy", "recall_1", "teacher_agreement", "teacher_kl"} <= names
        assert names == {n.partition("/")[2] for n in record if n.startswith("test_hard/")}
    figures = result["figures"]["last"]
    values = [own["last"]["test_hard/auc"] for own in result["per_seed"]]
    assert figures["test_hard/auc"]["mean"] == pytest.approx(np.mean(values))
    assert figures["test_hard/auc"]["std"] == pytest.approx(np.std(values, ddof=1))
