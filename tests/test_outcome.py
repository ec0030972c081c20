"""What result.json says: of a tiny run, of made-up records, and of the code's commit."""

from __future__ import annotations

import math
import pathlib
import re
import statistics
import subprocess
import types

import jax
import pytest

import tgeo_jax
from tgeo_jax import config as configs
from tgeo_jax import outcome, train, writers
from tgeo_jax.data import sources
from tgeo_jax.workdir import Workdir

# Commits.


class Checkout:
    """A git repository with a package in a folder, both committed."""

    def __init__(self, root: pathlib.Path):
        self.root, self.package = root, root / "package"
        self.package.mkdir(parents=True)
        self.git("init", "--quiet")
        (self.package / "code.py").write_text("x = 1\n")
        (root / "notes.md").write_text("Notes.\n")
        (root / ".gitignore").write_text("__pycache__/\nlib/\n")

    def git(self, *arguments: str) -> str:
        identity = ("-c", "user.name=T", "-c", "user.email=t@example.org")
        command = ["git", "-C", str(self.root), *identity, "-c", "commit.gpgsign=false"]
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    def commit(self) -> str:
        self.git("add", "--all")
        self.git("commit", "--quiet", "--message=All", "--no-verify")
        return self.git("rev-parse", "HEAD")


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Checkout:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))  # whatever lies around it
    return Checkout(tmp_path / "checkout")


def test_the_commit_of_a_clean_checkout_is_its_hash(checkout):
    head = checkout.commit()
    assert re.fullmatch(r"[0-9a-f]{40}", head)
    assert outcome.commit(checkout.package) == head


@pytest.mark.parametrize("staged", [False, True])
def test_a_changed_file_makes_the_code_dirty(checkout, staged):
    head = checkout.commit()
    (checkout.package / "code.py").write_text("x = 2\n")
    if staged:
        checkout.git("add", "--all")
    assert outcome.commit(checkout.package) == f"{head}-dirty"


def test_a_removed_file_makes_the_code_dirty(checkout):
    (checkout.package / "more.py").write_text("")
    head = checkout.commit()
    (checkout.package / "more.py").unlink()
    assert outcome.commit(checkout.package) == f"{head}-dirty"


@pytest.mark.parametrize("where", ["new.py", "deeper/new.py"])
def test_an_untracked_file_in_the_folder_makes_the_code_dirty(checkout, where):
    head = checkout.commit()
    (checkout.package / where).parent.mkdir(exist_ok=True)
    (checkout.package / where).write_text("y = 1\n")
    assert outcome.commit(checkout.package) == f"{head}-dirty"


def test_what_git_ignores_or_lies_beside_the_folder_changes_nothing(checkout):
    head = checkout.commit()
    (checkout.package / "__pycache__").mkdir()
    (checkout.package / "__pycache__" / "code.pyc").write_text("")
    (checkout.root / "notes.md").write_text("Other notes.\n")
    (checkout.root / "results.json").write_text("{}")
    assert outcome.commit(checkout.package) == head


def test_outside_of_a_repository_the_commit_is_unknown(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert outcome.commit(tmp_path) == "unknown"


def test_a_repository_without_a_commit_is_unknown(checkout):
    assert outcome.commit(checkout.package) == "unknown"


def test_a_package_installed_inside_another_repository_is_unknown(checkout):
    """As in the environment of somebody's project: his commit is not that of our code."""
    checkout.commit()
    installed = checkout.root / "lib" / "package"
    installed.mkdir(parents=True)
    (installed / "code.py").write_text("x = 1\n")
    assert outcome.commit(installed) == "unknown"


def test_without_git_the_commit_is_unknown(checkout, monkeypatch):
    checkout.commit()
    monkeypatch.setenv("PATH", "")
    assert outcome.commit(checkout.package) == "unknown"


# Means over seeds.


@pytest.mark.parametrize("values", [[0.5, 0.25], [0.961, 0.972, 0.955], [1.0, 1.0, 1.0, 1.0]])
def test_mean_and_standard_deviation_are_those_of_the_standard_library(values):
    found = outcome.mean_and_std(values)
    assert found["mean"] == pytest.approx(statistics.mean(values))
    assert found["std"] == pytest.approx(statistics.stdev(values))


def test_a_single_seed_has_no_deviation():
    assert outcome.mean_and_std([0.9]) == {"mean": 0.9, "std": None}


# Made-up records.


def record(epoch, validation, test, seed=0, seconds=6.0, **others) -> dict:
    return {
        "step": 10 * epoch, "epoch": epoch, "seed": seed, "validation/accuracy": validation,
        "test/accuracy": test, "time/train_seconds": seconds, "time/seconds": 7.0 * epoch, **others,
    }  # fmt: skip


def result(records, *, seeds=(0,), eval_every=1, teacher=None) -> dict:
    """Of a run that left these records."""
    data = types.SimpleNamespace(
        digest=lambda: "0" * 64, corrupt=(), mean=(0.3,), std=(0.4,),
        train=range(5), validation=range(3), test=range(2), extra={},
    )  # fmt: skip
    config = configs.default()
    config.train.update(epochs=records[-1]["epoch"], eval_every=eval_every)
    method = types.SimpleNamespace(total_steps=records[-1]["step"])
    run = types.SimpleNamespace(config=config, dataset=data, method=method)
    return outcome.result(run, records, seeds, teacher, ["a", "b"])


def test_the_best_epoch_is_chosen_by_validation_for_each_seed_the_first_of_equals():
    records = [
        record(1, 0.50, 0.60, seed=4), record(1, 0.90, 0.50, seed=5),
        record(2, 0.80, 0.70, seed=4), record(2, 0.70, 0.95, seed=5),
        record(3, 0.80, 0.90, seed=4), record(3, 0.60, 0.80, seed=5),
    ]  # fmt: skip
    found = result(records, seeds=(4, 5))
    assert [seed["seed"] for seed in found["per_seed"]] == [4, 5]
    assert [seed["best_by_validation"]["epoch"] for seed in found["per_seed"]] == [2, 1]
    assert [seed["last"]["epoch"] for seed in found["per_seed"]] == [3, 3]
    assert found["test_accuracy"]["best_by_validation"]["mean"] == pytest.approx(0.6)
    assert found["test_accuracy"]["last"]["mean"] == pytest.approx(0.85)
    assert found["test_accuracy"]["last"]["std"] == pytest.approx(statistics.stdev([0.9, 0.8]))


def test_what_was_not_measured_is_left_out():
    found = result([record(1, 0.5, 0.6, **{"test/ece": 0.1, "train/accuracy": 0.7})])
    assert found["per_seed"][0]["last"] == {
        "step": 10, "epoch": 1, "validation/accuracy": 0.5, "test/accuracy": 0.6, "test/ece": 0.1
    }  # fmt: skip


def test_seconds_of_an_epoch_are_counted_once_whatever_the_number_of_seeds():
    records = [record(e, 0.5, 0.6, seed, seconds=float(e)) for e in (1, 2) for seed in (0, 1)]
    assert result(records, seeds=(0, 1))["epoch_seconds"] == [1.0, 2.0]


def test_seconds_between_evaluations_are_shared_by_their_epochs():
    records = [record(2, 0.5, 0.6, seconds=6.0), record(4, 0.5, 0.6, seconds=8.0)]
    assert result(records, eval_every=2)["epoch_seconds"] == [3.0, 4.0]


def test_the_last_evaluation_may_come_after_fewer_epochs():
    records = [record(2, 0.5, 0.6, seconds=6.0), record(3, 0.5, 0.6, seconds=3.0)]
    assert result(records, eval_every=2)["epoch_seconds"] == [3.0, 3.0]


# A tiny run on the digits, two seeds, with a teacher that a tiny run left.


def tiny(digits_dir: str):
    config = configs.default()
    config.data.update(dir=digits_dir, batch_size=256)
    for section in (config.student, config.teacher):
        section.name, section.mlp.hidden = "mlp", (8,)
    config.train.epochs = 2
    return config


@pytest.fixture(scope="module")
def alone(digits_dir, tmp_path_factory) -> Workdir:
    config = tiny(digits_dir)
    config.role.name = "alone"
    folder = tmp_path_factory.mktemp("alone")
    train.run(config, folder, progress=False)
    return Workdir(folder)


@pytest.fixture(scope="module")
def taught(digits_dir, alone, tmp_path_factory) -> Workdir:
    config = tiny(digits_dir)
    config.seeds = 2
    config.ratio.name = "constant"
    config.teacher.workdir = str(alone.path)
    folder = tmp_path_factory.mktemp("taught")
    train.run(config, folder, progress=False)
    return Workdir(folder)


def test_a_result_names_its_dataset_code_and_device(alone, digits_dir):
    found = alone.result()
    assert re.fullmatch(r"[0-9a-f]{64}", found["dataset"]["digest"])
    assert found["dataset"] == {
        "name": "digits", "train": 1293, "validation": 144, "test": 360,
        "digest": sources.load("digits", digits_dir).digest(),
        "corrupt": [],
        "mean": list(sources.load("digits", digits_dir).mean),
        "std": list(sources.load("digits", digits_dir).std),
    }  # fmt: skip
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?|unknown", found["commit"])
    assert found["versions"]["tgeo_jax"] == tgeo_jax.__version__
    assert found["device"] == f"{jax.device_count()} x {jax.devices()[0].device_kind}"


def test_a_result_has_the_seconds_of_every_epoch(taught):
    records = writers.read_records(taught.metrics)
    expected = [r["time/train_seconds"] for r in records if r["seed"] == 0]
    assert taught.result()["epoch_seconds"] == expected
    assert len(expected) == taught.result()["epochs"] == 2
    assert all(seconds > 0 for seconds in expected)


@pytest.mark.parametrize("which", ["last", "best_by_validation"])
def test_each_seed_has_what_was_measured_of_it(taught, which):
    records = writers.read_records(taught.metrics)
    for seed, own in enumerate(taught.result()["per_seed"]):
        assert own["seed"] == seed
        assert set(own[which]) == {
            "step", "epoch", "validation/accuracy", "test/accuracy", "test/top5_accuracy",
            "test/macro_f1", "test/cross_entropy", "test/ece", "test/teacher_agreement",
            "test/teacher_kl",
        }  # fmt: skip
        step = own[which]["step"]
        (logged,) = [r for r in records if r["seed"] == seed and r["step"] == step]
        assert own[which] == {name: logged[name] for name in own[which]}
        assert 0 < own[which]["test/accuracy"] <= own[which]["test/top5_accuracy"] <= 1
        assert 0 <= own[which]["test/ece"] <= 1
        assert 0 < own[which]["test/teacher_agreement"] <= 1
        assert own[which]["test/teacher_kl"] > 0


def test_without_a_teacher_a_result_says_nothing_of_one(alone, taught):
    assert alone.result()["teacher"] is None
    (own,) = alone.result()["per_seed"]
    assert not [name for name in own["last"] if "teacher" in name]
    about = {"train_accuracy", "test_accuracy", "fingerprint", "converted"}
    assert set(taught.result()["teacher"]) == about
    # The teacher is the other run's last network.
    assert math.isclose(
        taught.result()["teacher"]["test_accuracy"], own["last"]["test/accuracy"], rel_tol=1e-6
    )


def test_a_container_without_a_checkout_is_told_its_commit(monkeypatch, tmp_path):
    monkeypatch.setenv("TGEO_JAX_COMMIT", "0123abc")
    assert outcome.commit(tmp_path) == "0123abc"
    monkeypatch.setenv("TGEO_JAX_COMMIT", "")
    assert outcome.commit(tmp_path) == "unknown"
