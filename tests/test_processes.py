"""Several processes over loopback: the numbers of one, and what happens when one is gone."""

from __future__ import annotations

import json
import pathlib
import re
import shlex
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from tests import several
from tests.conftest import ROOT, command_environment
from tgeo_jax import checkpoint

pytestmark = pytest.mark.xdist_group("processes")  # each takes both cores


@pytest.fixture(scope="module")
def undisturbed(digits_dir, tmp_path_factory):
    """The same run in one process with two devices."""
    return _ran_by_one(digits_dir, tmp_path_factory.mktemp("one"))


def _ran_by_one(digits_dir, folder, *extra, devices=2) -> pathlib.Path:
    arguments = (*several.SMALL, f"--workdir={folder / 'run'}", *extra)
    (done,) = several.finish(several.start(1, digits_dir, *arguments, devices=devices))
    assert done[0] == 0, done[1]
    return folder / "run"


def _records(folder) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if not k.startswith("time/")} for line in lines
    ]


def _check_records(found, expected, **tolerance):
    for a, b in zip(found, expected, strict=True):
        assert a.keys() == b.keys()
        lists = [k for k, v in a.items() if isinstance(v, list)]
        for k in lists:  # counts by bin: a ratio may fall into the one beside
            assert np.cumsum(a.pop(k)) == pytest.approx(np.cumsum(b.pop(k)), abs=3)
        assert a == pytest.approx(b, **tolerance)


def _check_same(found, expected, tolerance=1e-5):
    """Records, and parameters of the last step."""
    _check_records(_records(found), _records(expected), rel=1e-3)
    networks = (checkpoint.load_network(f / "checkpoints", "last") for f in (found, expected))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance), *networks)


@pytest.mark.parametrize(("processes", "devices"), [(2, 1), (4, 2)])
def test_several_processes_train_what_one_does(
    digits_dir, undisturbed, tmp_path, processes, devices
):
    arguments = (*several.SMALL, f"--workdir={tmp_path / 'run'}")
    done = several.finish(several.start(processes, digits_dir, *arguments, devices=devices))
    assert [code for code, _ in done] == [0] * processes, done
    assert ["Report: " in said for _, said in done] == [True] + [False] * (processes - 1)
    _check_same(tmp_path / "run", undisturbed)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["device"] == f"{processes * devices} x cpu"


def test_processes_stop_early_together(digits_dir, tmp_path):
    """At the epoch that the records say, which only the first of them writes."""
    run = tmp_path / "run"
    arguments = (
        *several.SMALL, f"--workdir={run}", "--config.train.epochs=60", "--config.train.patience=2",
        "--config.train.select_by=cross_entropy", "--config.optimizer.learning_rate=0.5",
    )  # fmt: skip
    done = several.finish(several.start(2, digits_dir, *arguments))
    assert [code for code, _ in done] == [0, 0], done
    best: dict[int, float] = {}
    last_new = 0.0
    for record in _records(run):
        if record["validation/cross_entropy"] < best.get(record["seed"], np.inf):
            best[record["seed"]] = record["validation/cross_entropy"]
            last_new = record["epoch"]
    result = json.loads((run / "result.json").read_text())
    assert result["stopped_early"]
    assert result["epochs"] == _records(run)[-1]["epoch"] == last_new + 2
    assert "Stopped after epoch" in done[0][1]


_NORMALISATION = ("--config.data.mean=(0.3,)", "--config.data.std=(0.37,)")  # streams need it
_KINDS = {
    "a teacher in parts": ("tgeo", "--config.mesh.model=2", "--config.teacher.which=best"),
    "stored logits": ("tgeo", "--config.role.name=cached"),
    "seeds on other processes": ("plain", "--config.seeds=4", "--config.mesh.seed=2"),
    "a chain": ("trikd", "--config.role.trikd.generations=1", "--config.seeds=1"),
    "a stream": (
        "tgeo", "--config.data.pipeline=stream", "--config.data.image_size=8",
        "--config.data.workers=0", "--config.seeds=1", "--config.role.name=dml",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def teacher_dir(digits_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    arguments = (
        "-m", "experiments.main", "--config=configs/digits/teacher.py",
        f"--workdir={folder / 'run'}", "--config.train.epochs=1", *_NORMALISATION,
    )  # fmt: skip
    (done,) = several.finish(several.start(1, digits_dir, *arguments))
    assert done[0] == 0, done[1]
    return folder / "run"


@pytest.mark.parametrize("kind", _KINDS)
def test_every_kind_of_run_is_that_of_one_process(digits_dir, teacher_dir, tmp_path, kind):
    name, *changes = _KINDS[kind]
    arguments = (
        "-m", "experiments.main", f"--config=configs/digits/{name}.py", *changes,
        f"--config.teacher.workdir={teacher_dir}", "--config.student.name=mlp",
        "--config.train.epochs=1", "--config.train.steps_per_dispatch=5", *_NORMALISATION,
    )  # fmt: skip
    for folder, processes, devices in (("two", 2, 2), ("one", 1, 4)):
        where = f"--workdir={tmp_path / folder}"
        done = several.finish(
            several.start(processes, digits_dir, *arguments, where, devices=devices)
        )
        assert [code for code, _ in done] == [0] * processes, done
    last = "generation_1" if kind == "a chain" else "."
    found, expected = (_records(tmp_path / folder / last) for folder in ("two", "one"))
    _check_records(found, expected, rel=2e-3, abs=1e-6)


def test_the_documented_commands_of_two_processes_run(digits_dir, tmp_path):
    text = (ROOT / "docs" / "pods.md").read_text()
    (block,) = re.findall(r"```sh\n(.*?--process_id=1.*?)```", text, re.DOTALL)
    port, commands = several.free_port(), []
    for line in block.replace("\\\n", " ").splitlines():
        line = line.replace("runs/pod", str(tmp_path / "run")).replace("9911", str(port))
        commands.append([*shlex.split(line.rstrip("&"))[1:], "--config.train.epochs=1"])
    assert len(commands) == 2
    done = several.finish(
        [
            subprocess.Popen(
                [sys.executable, *arguments], cwd=ROOT, env=command_environment(digits_dir),
                text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )
            for arguments in commands
        ]
    )  # fmt: skip
    assert [code for code, _ in done] == [0, 0], done
    assert json.loads((tmp_path / "run" / "result.json").read_text())["epochs"] == 1


def test_sigterm_for_one_process_stops_all_and_another_number_of_them_goes_on(
    digits_dir, undisturbed, tmp_path
):
    run = tmp_path / "run"
    slow = (*several.SMALL, f"--workdir={run}")
    processes = several.start(2, digits_dir, *slow)
    several.wait_for(run / "metrics.jsonl", '"epoch": 1.0', processes)
    processes[1].send_signal(signal.SIGTERM)
    done = several.finish(processes)
    if [code for code, _ in done] == [0, 0]:
        pytest.skip("the run was faster than the signal")
    assert [code for code, _ in done] == [75, 75], done
    assert "which is saved; the same command goes on from there" in done[0][1]
    assert not (run / "result.json").exists()
    _ran_by_one(digits_dir, tmp_path, devices=4)
    _check_same(run, undisturbed)


@pytest.mark.parametrize("victim", [0, 1])
def test_the_other_stops_and_names_the_process_that_was_killed(digits_dir, tmp_path, victim):
    run = tmp_path / "run"
    arguments = (*several.SMALL, f"--workdir={run}", "--config.train.epochs=1000")
    processes = several.start(2, digits_dir, *arguments)
    several.wait_for(run / "metrics.jsonl", '"epoch": 1.0', processes)
    processes[victim].kill()
    done = several.finish(processes, timeout=60)
    code, said = done[1 - victim]
    assert (done[victim][0], code) == (-9, 75), done
    if victim == 0:  # at once, if JAX notices first
        assert "process 0 of 2 is gone" in said or "of 2 has been silent for 8 s" in said, done
    else:
        assert "process 1 (" in said, done
        assert "of 2 has been silent for 8 s" in said, done


def test_a_damaged_checkpoint_is_put_aside_by_all_of_them(digits_dir, undisturbed, tmp_path):
    run = tmp_path / "run"
    arguments = (*several.SMALL, f"--workdir={run}", "--config.train.checkpoint_every=1")
    first = several.finish(several.start(2, digits_dir, *arguments))
    assert [code for code, _ in first] == [0, 0], first
    (run / "result.json").unlink()
    damaged = max((run / "checkpoints" / "60" / "state").rglob("d/*"))
    damaged.write_bytes(b"damage")
    done = several.finish(several.start(2, digits_dir, *arguments))
    assert [code for code, _ in done] == [0, 0], done
    assert f"{run / 'checkpoints' / '60'}: this checkpoint cannot be read" in done[0][1]
    assert (run / "checkpoints_damaged" / "60").is_dir()
    _check_same(run, undisturbed)


def test_a_process_that_never_comes_is_named(digits_dir, tmp_path):
    arguments = (*several.SMALL, f"--workdir={tmp_path / 'run'}", "--start_timeout=8")
    (done,) = several.finish(several.start(2, digits_dir, *arguments, only=range(1)), timeout=60)
    assert done[0] == 2, done
    assert "--num_processes=2: not all were there within 8 s: process 1 did not come" in done[1]
    (done,) = several.finish(several.start(2, digits_dir, *arguments, only=range(1, 2)), timeout=60)
    assert done[0] == 2, done
    assert "process 1 of 2 found no process 0 there within 8 s" in done[1]


def test_what_stops_one_process_is_told_by_all(digits_dir, tmp_path):
    run = tmp_path / "run"
    _ran_by_one(digits_dir, tmp_path, "--config.train.epochs=1")
    (run / "result.json").unlink()
    arguments = (*several.SMALL, f"--workdir={run}")
    done = several.finish(several.start(2, digits_dir, *arguments), timeout=60)
    assert all("train.epochs: 1 -> 3" in said for _, said in done), done
