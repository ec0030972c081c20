"""SIGTERM and Ctrl-C: what was trained is saved, and the end is that of an undisturbed run."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from tests import several
from tests.conftest import ROOT, command_environment
from tgeo_jax import checkpoint, interruption, partial, train
from tgeo_jax import config as configs
from tgeo_jax.errors import Interrupted
from tgeo_jax.interruption import Interruption
from tgeo_jax.metrics import Mean


def _config(digits_dir, **changes):
    """A small MLP, 10 steps in an epoch, evaluated every second one, in dispatches of 3 steps."""
    config = configs.default()
    config.data.update(dir=digits_dir, batch_size=128)
    config.role.name, config.student.name = "alone", "mlp"
    config.student.mlp.hidden = (8,)
    config.train.update(epochs=5, eval_every=2, steps_per_dispatch=3, checkpoint_every=2)
    config.update(changes)
    return config


def _records(folder) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if not k.startswith("time/")} for line in lines
    ]


def _networks(folder):
    return [
        checkpoint.load_network(folder / "checkpoints", which, index)
        for which in ("last", "best")
        for index in (0, 1)
    ]


@pytest.fixture(scope="module")
def undisturbed(digits_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    train.run(_config(digits_dir, seeds=2), folder, progress=False)
    return folder


@pytest.mark.parametrize("stops", [(1,), (3,), (8,), (9, 2, 4)])
def test_a_run_that_was_told_to_stop_ends_as_if_it_had_not_been(
    digits_dir, undisturbed, tmp_path, monkeypatch, stops
):
    reached = Interruption.reached
    for stop in stops:
        checks = itertools.count(1)
        monkeypatch.setattr(
            Interruption, "reached", lambda self, c=checks, stop=stop: next(c) == stop
        )
        with pytest.raises(Interrupted, match="is saved; the same command goes on"):
            train.run(_config(digits_dir, seeds=2), tmp_path / "run", progress=False)
    monkeypatch.setattr(Interruption, "reached", reached)
    train.run(_config(digits_dir, seeds=2), tmp_path / "run", progress=False)
    # Bit for bit, the sums of the interval that was interrupted too.
    assert _records(tmp_path / "run") == _records(undisturbed)
    for found, expected in zip(_networks(tmp_path / "run"), _networks(undisturbed), strict=True):
        jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_ends_the_command_with_a_status_that_schedulers_know(
    digits_dir, tmp_path, number, status
):
    run = tmp_path / "run"
    arguments = (*several.SMALL, "--config.train.epochs=5000", f"--workdir={run}")
    running = subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, env=command_environment(digits_dir),
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    try:
        several.wait_for(run / "metrics.jsonl", '"epoch": 2.0', [running])
        running.send_signal(number)
        _, said = running.communicate(timeout=60)
    finally:
        running.kill()
    assert running.returncode == status, said
    assert "Traceback" not in said
    assert "stopped after step" in said
    steps = [int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit()]
    assert f"stopped after step {max(steps)} of" in said


def test_signals_are_given_back():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    watched = Interruption()
    assert not watched.reached()
    os.kill(os.getpid(), signal.SIGTERM)
    assert watched.reached()
    os.kill(os.getpid(), signal.SIGTERM)  # again: still no harm
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    watched.close()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert watched.signal == interruption.signal.SIGTERM


def test_sums_survive_their_file_exactly(tmp_path):
    sums = {"loss": Mean(np.array([1 / 3, 1e-300]), np.array([7.0, 0.0]))}
    partial.write(tmp_path / "partial.json", partial.Partial(12, 3.5, sums))
    found = partial.read(tmp_path / "partial.json", 12)
    assert (found.step, found.seconds) == (12, 3.5)
    np.testing.assert_array_equal(found.sums["loss"].total, sums["loss"].total)
    np.testing.assert_array_equal(found.sums["loss"].count, sums["loss"].count)
    assert partial.read(tmp_path / "partial.json", 13) == partial.NOTHING
    (tmp_path / "partial.json").write_text('{"step": 12, "sums": {"lo')
    assert partial.read(tmp_path / "partial.json", 12) == partial.NOTHING
