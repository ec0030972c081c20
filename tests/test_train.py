"""Whole runs on real digits: learning, resuming after kill -9, and refusing what cannot work."""

from __future__ import annotations

import json
import pathlib
import signal
import struct
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from tensorboardX.proto import event_pb2

from configs.digits import teacher as teacher_config
from configs.digits import tgeo as tgeo_config
from tests.conftest import ROOT, command_environment
from tgeo_jax import checkpoint, metrics, train, writers
from tgeo_jax import config as configs
from tgeo_jax import workdir as workdirs
from tgeo_jax.errors import CheckpointError, ConfigError, DataError, TrainingError
from tgeo_jax.workdir import Workdir


def _small(digits_dir: str, **changes) -> ConfigDict:
    """An MLP without a teacher, two epochs."""
    config = configs.default()
    config.data.dir = digits_dir
    config.role.name = "alone"
    config.student.name = "mlp"
    config.student.mlp.hidden = (8,)
    config.train.epochs = 2
    for path, value in changes.items():
        section, _, field = path.rpartition("__")
        target = config
        for part in section.split("__") if section else ():
            target = target[part]
        target[field] = value
    return config


@pytest.fixture(scope="module")
def teacher_dir(digits_dir, tmp_path_factory) -> pathlib.Path:
    """The demo's own teacher: 40 % of its training labels are wrong."""
    workdir = tmp_path_factory.mktemp("teacher")
    config = teacher_config.get_config()
    config.data.dir = digits_dir
    train.run(config, workdir, progress=False)
    return workdir


@pytest.fixture(scope="module")
def tgeo_dir(digits_dir, teacher_dir, tmp_path_factory) -> pathlib.Path:
    """TGeo-KD with that teacher over 3 seeds; an MLP student, which is quicker here than a CNN."""
    workdir = tmp_path_factory.mktemp("tgeo")
    config = tgeo_config.get_config()
    config.data.dir = digits_dir
    config.teacher.workdir = str(teacher_dir)
    config.student.name = "mlp"
    config.student.mlp.hidden = (32,)
    train.run(config, workdir, progress=False)
    return workdir


@pytest.mark.xdist_group("teacher")
def test_the_teacher_learned_its_wrong_labels(teacher_dir):
    record = writers.read_records(teacher_dir / "metrics.jsonl")[-1]
    assert record["train/accuracy"] > 0.95
    assert 0.5 < record["test/accuracy"] < 0.85


@pytest.mark.xdist_group("teacher")
def test_the_ratio_ends_lower_where_the_teacher_is_wrong_for_every_seed(tgeo_dir):
    last = {r["seed"]: r for r in writers.read_records(tgeo_dir / "metrics.jsonl")}
    assert sorted(last) == [0, 1, 2]
    for record in last.values():
        right, wrong = record["train/ratio_teacher_right"], record["train/ratio_teacher_wrong"]
        assert wrong < right - 0.2
    arrays = np.load(tgeo_dir / "samples.npz")
    (right,) = arrays["teacher_right"]  # one teacher for all seeds
    for ratio in arrays["ratio"]:
        assert ratio[~right].mean() < ratio[right].mean() - 0.2


@pytest.mark.xdist_group("teacher")
def test_everything_promised_is_logged(tgeo_dir):
    record = writers.read_records(tgeo_dir / "metrics.jsonl")[0]
    assert {
        "step", "epoch", "seed", "train/hard_loss", "train/soft_loss", "train/teacher_loss",
        "train/outer_loss", "train/accuracy", "train/ratio", "train/ratio_std", "train/ratio_q05",
        "train/ratio_q50", "train/ratio_q95", "train/ratio_teacher_right",
        "train/ratio_teacher_wrong", "train/ratio_right_large_edge",
        "train/ratio_wrong_large_edge", "validation/accuracy", "test/accuracy",
        "time/samples_per_second",
    } <= set(record)  # fmt: skip
    assert len(record["train/ratio_histogram"]) == metrics.RATIO_BINS
    batch = json.loads((tgeo_dir / "config.json").read_text())["data"]["batch_size"]
    assert sum(record["train/ratio_histogram"]) == record["step"] * batch
    events = list((tgeo_dir / "tensorboard").glob("seed_*/events*"))
    assert len(events) == 3
    assert all(event.stat().st_size > 1000 for event in events)


@pytest.mark.xdist_group("teacher")
def test_the_result_agrees_with_the_records(tgeo_dir):
    result = Workdir(tgeo_dir).result()
    records = writers.read_records(tgeo_dir / "metrics.jsonl")
    last = [r["test/accuracy"] for r in records if r["step"] == result["steps"]]
    assert result["test_accuracy"]["last"]["mean"] == pytest.approx(np.mean(last))
    assert result["test_accuracy"]["last"]["std"] == pytest.approx(np.std(last, ddof=1))
    for seed in result["per_seed"]:
        own = [r for r in records if r["seed"] == seed["seed"]]
        best = max(r["validation/accuracy"] for r in own)
        assert seed["best_by_validation"]["validation/accuracy"] == best
    # Right on the true labels of about the 60 % that were not corrupted.
    assert result["teacher"]["train_accuracy"] == pytest.approx(0.6, abs=0.02)


@pytest.mark.xdist_group("teacher")
def test_the_best_parameters_are_those_of_the_best_step(tgeo_dir, digits_dir):
    """Saved with the checkpoint, and giving the accuracy that was logged at that step."""
    from tgeo_jax import evaluate, models
    from tgeo_jax.data import sources, views
    from tgeo_jax.state import Batch

    variables = checkpoint.load_network(tgeo_dir / "checkpoints", "best", seed_index=1)
    data = sources.load("digits", digits_dir)
    predict = evaluate.predictor(
        models.build("mlp", 10, hidden=(32,)), views.normalise(data.mean, data.std)
    )
    found = evaluate.Evaluator(predict, 100, seeds=False).metrics(
        variables, Batch(data.test.images, data.test.labels)
    )["accuracy"]
    seed = Workdir(tgeo_dir).result()["per_seed"][1]
    assert float(found.total / found.count) == pytest.approx(
        seed["best_by_validation"]["test/accuracy"]
    )


def _final_state(workdir: pathlib.Path):
    return [
        checkpoint.load_network(workdir / "checkpoints", which, seed)
        for which in ("last", "best")
        for seed in (0, 1)
    ]


def _tensorboard_steps(workdir: pathlib.Path) -> set[tuple[str, int]]:
    """(tag, step) of all events; records are length, checksum, event, checksum."""
    found = set()
    for path in workdir.glob("tensorboard/seed_0/events*"):
        data = path.read_bytes()
        while len(data) >= 12:
            (length,) = struct.unpack("<Q", data[:8])
            event = event_pb2.Event.FromString(data[12 : 12 + length])
            found |= {(value.tag, event.step) for value in event.summary.value}
            data = data[16 + length :]
    return found


def _timeless(workdir: pathlib.Path) -> list[dict]:
    return [
        {name: value for name, value in record.items() if not name.startswith("time/")}
        for record in writers.read_records(workdir / "metrics.jsonl")
    ]


@pytest.mark.xdist_group("teacher")
def test_kill_9_at_any_moment_and_the_same_command_again_give_the_same_bits(
    digits_dir, teacher_dir, tmp_path
):
    def start(workdir: pathlib.Path) -> subprocess.Popen:
        return subprocess.Popen(
            [
                sys.executable, "-m", "experiments.main", "--config=configs/digits/tgeo.py",
                f"--workdir={workdir}", f"--config.teacher.workdir={teacher_dir}",
                "--config.student.cnn.widths=(4,)", "--config.seeds=2",
                "--config.train.epochs=12", "--config.train.checkpoint_every=2",
                "--config.train.steps_per_dispatch=7", "--config.data.crop_padding=1",
            ],
            cwd=ROOT,
            env=command_environment(digits_dir),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )  # fmt: skip

    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    process = start(undisturbed)
    assert process.wait(timeout=300) == 0, process.stderr.read().decode()

    # After an evaluation that saved nothing, right after a save began, and in between.
    for records_before_kill, pause in ((2, 0.0), (8, 0.0), (14, 0.15)):
        process = start(disturbed)
        while process.poll() is None:
            if len(writers.read_records(disturbed / "metrics.jsonl")) >= records_before_kill:
                time.sleep(pause)
                break
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait(timeout=60) == -signal.SIGKILL, "the run ended before it was killed"
    process = start(disturbed)
    assert process.wait(timeout=300) == 0, process.stderr.read().decode()

    jax.tree.map(np.testing.assert_array_equal, _final_state(undisturbed), _final_state(disturbed))
    assert _timeless(undisturbed) == _timeless(disturbed)
    assert _tensorboard_steps(disturbed) >= _tensorboard_steps(undisturbed) != set()


def test_a_finished_run_is_not_trained_again(digits_dir, tmp_path):
    config = _small(digits_dir)
    first = train.run(config, tmp_path / "run", progress=False)
    before = (tmp_path / "run" / "metrics.jsonl").stat().st_mtime_ns
    assert train.run(config, tmp_path / "run", progress=False) == first
    assert (tmp_path / "run" / "metrics.jsonl").stat().st_mtime_ns == before


def test_another_configuration_in_the_same_workdir_is_refused_with_the_difference(
    digits_dir, tmp_path
):
    train.run(_small(digits_dir), tmp_path / "run", progress=False)
    with pytest.raises(ConfigError, match=r"optimizer\.learning_rate: 0\.05 -> 0\.2"):
        train.run(
            _small(digits_dir, optimizer__learning_rate=0.2), tmp_path / "run", progress=False
        )


def test_a_loss_that_is_not_finite_stops_the_run_after_saving_and_says_where(digits_dir, tmp_path):
    config = _small(digits_dir, optimizer__learning_rate=1e30)
    for _ in range(2):  # run again, it says the same again
        with pytest.raises(TrainingError, match=r"step \d+ \(epoch 1\): not finite: .*seed 0"):
            train.run(config, tmp_path / "run", progress=False)
    saved = checkpoint.load_network(tmp_path / "run" / "checkpoints", "last")
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(saved))


def test_a_dataset_that_is_not_prepared_names_the_command(tmp_path):
    config = _small(str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"python -m experiments\.prepare --dataset=digits"):
        train.run(config, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_a_missing_teacher_says_how_to_train_one(digits_dir, tmp_path):
    config = _small(digits_dir)
    config.role.name = "frozen"
    config.teacher.update(name="mlp", workdir=str(tmp_path / "nobody"))
    with pytest.raises(CheckpointError, match=r"nobody.*no run there; train one with"):
        train.run(config, tmp_path / "run", progress=False)


def test_a_teacher_of_another_architecture_names_the_parameter_and_both_shapes(
    digits_dir, tmp_path
):
    train.run(_small(digits_dir), tmp_path / "teacher", progress=False)
    config = _small(digits_dir)
    config.role.name = "frozen"
    config.teacher.update(name="mlp", workdir=str(tmp_path / "teacher"))
    config.teacher.mlp.hidden = (9,)
    with pytest.raises(CheckpointError, match=r"params/Dense_0/bias has shape \(8,\).*\(9,\)"):
        train.run(config, tmp_path / "run", progress=False)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("data__batch_size", 5000, r"data\.batch_size=5000: larger than its split of 1293"),
        ("data__validation_fraction", 0.001, r"data\.validation_fraction=0\.001"),
    ],
)
def test_sizes_that_the_data_cannot_give_are_refused(digits_dir, tmp_path, field, value, message):
    with pytest.raises((ConfigError, DataError), match=message):
        train.run(_small(digits_dir, **{field: value}), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.xdist_group("teacher")
@pytest.mark.parametrize(
    ("path", "value", "error", "message"),
    [
        ("meta.batch_size", 5000, ConfigError, r"meta\.batch_size=5000: larger than its split"),
        ("data.split_seed", 1, CheckpointError, r"with data\.split_seed=0, this run has 1"),
        ("data.validation_fraction", 0.2, CheckpointError, r"fraction=0\.1, this run has 0\.2"),
    ],
)  # fmt: skip
def test_what_does_not_go_with_this_teacher_is_refused(
    digits_dir, teacher_dir, tmp_path, path, value, error, message
):
    config = tgeo_config.get_config()
    config.data.dir, config.teacher.workdir = digits_dir, str(teacher_dir)
    section, field = path.split(".")
    config[section][field] = value
    with pytest.raises(error, match=message):
        train.run(config, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_a_small_validation_split_is_enough_where_nothing_is_learned_from_it(digits_dir, tmp_path):
    config = _small(digits_dir, data__validation_fraction=0.03, train__epochs=1)
    result = train.run(config, tmp_path / "run", progress=False)  # 44 examples < meta.batch_size
    assert result["steps"] == 21


def test_a_second_process_is_kept_out(digits_dir, tmp_path):
    config = _small(digits_dir)
    folder = Workdir(tmp_path / "run")
    folder.claim(config)
    with workdirs.only_one(folder), pytest.raises(ConfigError, match="another process is training"):
        train.run(config, folder.path, progress=False)
    assert train.run(config, folder.path, progress=False)["steps"] == 40


def test_a_damaged_checkpoint_is_named_and_the_one_before_goes_on(digits_dir, tmp_path, caplog):
    config = _small(digits_dir)
    expected = train.run(config, tmp_path / "run", progress=False)
    (tmp_path / "run" / "result.json").unlink()
    newest = tmp_path / "run" / "checkpoints" / "40"
    for path in newest.glob("state/**/*"):
        if path.is_file() and path.stat().st_size > 100:
            path.write_bytes(path.read_bytes()[:50])
    found = train.run(config, tmp_path / "run", progress=False)
    assert found["per_seed"] == expected["per_seed"]
    (said,) = [record.getMessage() for record in caplog.records if "damaged" in record.getMessage()]
    kept = tmp_path / "run" / "checkpoints_damaged" / "40"
    assert said.startswith(f"{newest}: this checkpoint cannot be read")
    assert "of step 20" in said
    assert said.endswith(f"kept as {kept}")
    assert kept.is_dir()
    for path in (tmp_path / "run" / "checkpoints").glob("*/state/**/*"):
        if path.is_file() and path.stat().st_size > 100:
            path.write_bytes(b"")
    (tmp_path / "run" / "result.json").unlink()
    with pytest.raises(CheckpointError, match=r"checkpoints/40, .*/20: no checkpoint can be read"):
        train.run(config, tmp_path / "run", progress=False)


def test_a_run_goes_on_with_another_configuration_if_told_to(command, digits_dir, tmp_path):
    run = tmp_path / "run"
    arguments = (
        "-m", "experiments.main", "--config=configs/digits/plain.py", f"--workdir={run}",
        "--config.student.name=mlp",
    )  # fmt: skip
    command(*arguments, "--config.train.epochs=1")
    refused = command(*arguments, "--config.train.epochs=2", check=False)
    assert refused.returncode == 2
    assert "train.epochs: 1 -> 2" in refused.stderr
    assert "--accept_changes to go on" in refused.stderr
    command(*arguments, "--config.train.epochs=2", "--accept_changes")
    assert {r["epoch"] for r in writers.read_records(run / "metrics.jsonl")} == {1.0, 2.0}
    assert json.loads((run / "config.1.json").read_text())["train"]["epochs"] == 1
    assert json.loads((run / "config.json").read_text())["train"]["epochs"] == 2
    assert json.loads((run / "result.1.json").read_text())["epochs"] == 1
    # What does not fit what was trained is another network, not damage.
    arguments += ("--config.train.epochs=3", "--config.student.mlp.hidden=(5,)", "--accept_changes")
    refused = command(*arguments, check=False)
    assert refused.returncode == 2
    assert "another architecture" in refused.stderr
    assert not (run / "checkpoints_damaged").exists()


def test_lost_records_are_noticed_instead_of_written_into_a_result(digits_dir, tmp_path):
    config = _small(digits_dir)
    train.run(config, tmp_path / "run", progress=False)
    (tmp_path / "run" / "result.json").unlink()
    (tmp_path / "run" / "metrics.jsonl").unlink()
    with pytest.raises(
        CheckpointError, match=r"metrics\.jsonl: lacks the records of the last step"
    ):
        train.run(config, tmp_path / "run", progress=False)


def test_a_whole_run_on_eight_devices_gives_the_numbers_of_one(command, tmp_path):
    """Training, evaluation, checkpoints and a resumed end, seeds and batches cut over devices."""
    arguments = (
        "-m", "experiments.main", "--config=configs/digits/plain.py", "--config.seeds=2",
        "--config.student.name=mlp", "--config.train.epochs=2",
        "--config.train.steps_per_dispatch=5", "--config.train.checkpoint_every=1",
    )  # fmt: skip
    command(*arguments, f"--workdir={tmp_path / 'one'}")
    eight = (*arguments, "--config.mesh.seed=2", f"--workdir={tmp_path / 'eight'}")
    devices = {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0",
        "NPROC": "32",  # see several.on_eight_devices
    }
    result = tmp_path / "eight" / "result.json"
    command(*eight, **devices)
    result.unlink()
    command(*eight, **devices)
    assert "8 x cpu" in result.read_text()
    one, many = _timeless(tmp_path / "one"), _timeless(tmp_path / "eight")
    assert len(one) == len(many) == 4
    for a, b in zip(one, many, strict=True):
        assert a == pytest.approx(b, rel=1e-3)


def test_metrics_of_an_interrupted_attempt_are_not_counted_twice(digits_dir, tmp_path):
    """Records after the last checkpoint are dropped when the run goes on."""
    config = _small(digits_dir)
    train.run(config, tmp_path / "run", progress=False)
    records = (tmp_path / "run" / "metrics.jsonl").read_text()
    (tmp_path / "run" / "result.json").unlink()
    stale = json.dumps({**json.loads(records.splitlines()[-1]), "step": 10**6})
    (tmp_path / "run" / "metrics.jsonl").write_text(records + stale + "\n" + '{"step": 1, "torn')
    result = train.run(config, tmp_path / "run", progress=False)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == records
    assert result["steps"] == 40
