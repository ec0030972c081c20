"""A few rounds of the harness that kills trainings, and that it notices what it is there for."""

from __future__ import annotations

import itertools
import json
import random
import signal
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import fault_checks
from benchmarks.fault_checks import (
    MOMENTS,
    SIGNALS,
    Contents,
    Fault,
    contents,
    differences,
    summary,
    told,
    wrong,
)
from tgeo_jax import checkpoint, train
from tgeo_jax import config as configs
from tgeo_jax.errors import Interrupted
from tgeo_jax.interruption import Interruption


@pytest.mark.xdist_group("processes")
def test_disturbed_trainings_end_as_the_undisturbed_one(command, tmp_path):
    output = tmp_path / "faults.jsonl"
    done = command(
        "-m", "benchmarks.faults", "--rounds=3", "--faults=1", "--epochs=6",
        f"--workdir={tmp_path / 'runs'}", f"--output={output}",
    )  # fmt: skip
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["round"] for row in rows] == [0, 1, 2]
    assert all(row["identical"] and not row["problems"] for row in rows)
    assert "3 rounds, " in done.stdout
    assert "3 ended bit for bit as undisturbed, 0 did not; 0 other problems" in done.stdout
    sent = [fault for row in rows for fault in row["faults"]]
    assert sent  # some came before the run had finished
    assert all(fault["statuses"] in ([-9], [-15], [75], [0]) for fault in sent)
    assert not list((tmp_path / "runs").glob("round_*"))


class Killed(BaseException):
    """As kill -9: nothing is done after it."""


def test_a_run_killed_between_its_sums_and_its_checkpoint_ends_as_if_it_had_not_been(
    digits_dir, tmp_path, monkeypatch
):
    config = configs.default()
    config.data.update(dir=digits_dir, batch_size=128)  # 10 steps in an epoch
    config.role.name, config.student.name, config.student.mlp.hidden = "alone", "mlp", (8,)
    config.train.update(epochs=3, steps_per_dispatch=2)
    train.run(config, tmp_path / "undisturbed", progress=False)

    def die(*_):
        raise Killed

    for stop, kills in ((2, False), (2, True), (3, False)):
        checks = itertools.count(1)
        with monkeypatch.context() as patched:
            patched.setattr(Interruption, "reached", lambda _, c=checks, s=stop: next(c) == s)
            if kills:
                patched.setattr(checkpoint.Checkpoints, "save", die)
            with pytest.raises(Killed if kills else Interrupted):
                train.run(config, tmp_path / "run", progress=False)
    train.run(config, tmp_path / "run", progress=False)
    assert differences(*map(contents, (tmp_path / "run", tmp_path / "undisturbed"))) == []


def arrays(**changes) -> dict[str, np.ndarray]:
    kept = {"w": np.float32([[1, 2], [3, 4]]), "step": np.int32(7), "nan": np.float32([np.nan])}
    return {**kept, **changes}


RECORDS = [{"step": 5, "seed": 0, "loss": 0.5}, {"step": 9, "seed": 0, "loss": float("nan")}]


def test_what_is_the_same_does_not_differ():
    assert differences(Contents(arrays(), RECORDS), Contents(arrays(), list(RECORDS))) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"w": np.nextafter(arrays()["w"], np.float32(9))}, "w: 4 of 4 values differ"),
        ({"w": np.float32([[1, 2], [3, 5]])}, "w: 1 of 4 values differ"),
        ({"step": np.int32(8)}, "step: 1 of 1 values differ"),
        ({"w": np.float64([[1, 2], [3, 4]])}, "w: float64(2, 2), expected float32(2, 2)"),
        ({"w": np.float32([1, 2, 3, 4])}, "w: float32(4,), expected float32(2, 2)"),
        ({"more": np.ones(1)}, "more: only in one of them"),
    ],
)
def test_one_changed_bit_is_told(changes, said):
    found = Contents(arrays(**changes), RECORDS)
    assert differences(found, Contents(arrays(), RECORDS)) == [said]


@pytest.mark.parametrize(
    ("records", "said"),
    [
        (RECORDS[:1], "metrics: 1 records, expected 2"),
        ([RECORDS[0], {**RECORDS[1], "loss": 0.25}], "metrics: step 9, seed 0: loss"),
        ([{**RECORDS[0], "more": 1}, RECORDS[1]], "metrics: step 5, seed 0: more"),
    ],
)
def test_a_changed_record_is_told(records, said):
    assert differences(Contents({}, records), Contents({}, RECORDS)) == [said]


def fault(name: str, victim: int = 0) -> Fault:
    return Fault(name, "moment", 0.5, 0.0, victim)


@pytest.mark.parametrize(
    ("name", "caught", "statuses"),
    [
        ("TERM", True, [75]),
        ("TERM", True, [0]),
        ("TERM", False, [-15]),
        ("KILL", True, [-9]),
        ("KILL", True, [0]),
        ("TERM, KILL", True, [75]),
        ("TERM, KILL", True, [-9]),
        ("TERM", True, [75, 75]),
        ("KILL", True, [-9, 75]),
        ("KILL", False, [-9, 2]),
    ],
)
def test_statuses_that_are_as_they_should_be(name, caught, statuses):
    assert wrong(fault(name), caught, statuses) == []


@pytest.mark.parametrize(
    ("name", "statuses"),
    [
        ("TERM", [-15]),
        ("TERM", [1]),
        ("TERM", [2]),
        ("KILL", [75]),
        ("KILL", [1]),
        ("KILL", [-9, 1]),
        ("TERM, KILL", [1]),
        ("TERM", [None]),
        ("KILL", [-9, None]),
    ],
)
def test_statuses_that_are_problems(name, statuses):
    (said,) = wrong(fault(name), True, statuses)
    assert said.startswith(f"{name} to process 0: ")
    assert ("hung" in said) == (None in statuses)


def row(**changes):
    sent = {"signal": "KILL", "at": "save", "seconds": 1.0, "resumes_at": 20, "caught": True}
    plain = {"round": 4, "faults": [sent], "attempts": 2}
    return {**plain, "identical": True, "differences": [], "problems": [], **changes}


@pytest.mark.parametrize(
    ("changes", "well"),
    [
        ({}, True),
        ({"identical": False, "differences": ["w: 1 of 4 values differ"]}, False),
        ({"problems": ["KILL to process 0: hung"]}, False),
    ],
)
def test_one_bad_round_is_a_failure(changes, well):
    text, found = summary([row(), row(**changes)])
    assert found == well
    assert text.startswith("2 rounds, 2 faults (2 KILL; 0 TERM; 0 TERM, KILL; 2 aimed at a save, ")
    assert ("DIFFERS" in told(row(**changes)) or "PROBLEM" in told(row(**changes))) != well


def test_the_seed_fixes_a_round():
    plans = [fault_checks.plan(random.Random(f"0 {number}"), 3, 2) for number in range(200)]
    assert plans[7] == fault_checks.plan(random.Random("0 7"), 3, 2)
    every = [one for plan in plans for one in plan]
    assert {one.signal for one in every} == set(SIGNALS)
    assert {one.at for one in every} == set(MOMENTS)
    assert {one.victim for one in every} == {0, 1}
    assert {len(plan) for plan in plans} == {1, 2, 3}


def test_whether_a_process_catches_a_signal():
    code = "import signal, sys; {}; print('ready', flush=True); sys.stdin.read()"
    for line, expected in (("pass", False), ("signal.signal(15, lambda *_: None)", True)):
        with subprocess.Popen(
            [sys.executable, "-c", code.format(line)], stdin=-1, stdout=-1, text=True
        ) as running:
            assert running.stdout.readline() == "ready\n"
            assert fault_checks.catches(running.pid, signal.SIGTERM) == expected
            running.kill()


def test_a_process_that_hangs_is_told_and_ended(monkeypatch):
    monkeypatch.setattr(fault_checks, "_LIMIT", 0.2)
    running = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    assert fault_checks.finish([running]) == [None]
    assert running.poll() is not None
