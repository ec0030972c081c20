"""What a run says and checks between its start and its first step, and the trace it can write."""

from __future__ import annotations

import pathlib

import jax
import pytest

from tgeo_jax import config as configs
from tgeo_jax import memory, train
from tgeo_jax.errors import ConfigError


def _alone(digits_dir, **changes):
    config = configs.default()
    config.data.update(dir=digits_dir, batch_size=64)
    config.student.update(name="mlp")
    config.role.name = "alone"
    config.train.update(epochs=2)
    config.update(changes)
    return config


def test_a_run_that_cannot_fit_stops_before_its_first_step(digits_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "free", lambda device: 30_000)
    with pytest.raises(ConfigError, match=r"data\.batch_size: .* 0\.03 MB are free"):
        train.run(_alone(digits_dir), tmp_path / "run", progress=False)
    assert not list((tmp_path / "run/checkpoints").glob("[0-9]*"))
    monkeypatch.undo()
    assert train.run(_alone(digits_dir), tmp_path / "run", progress=False)["finished"]


def test_the_estimate_is_printed_once_before_the_run(digits_dir, tmp_path, capfd):
    train.run(_alone(digits_dir), tmp_path / "run", progress=True)
    said = capfd.readouterr().err
    assert said.count("memory of each device: ") == 1
    assert said.index("memory of each device: ") < said.index("40/40")


def test_a_profile_holds_the_last_dispatches_of_the_first_epoch(digits_dir, tmp_path):
    folder = tmp_path / "trace"
    config = _alone(digits_dir, profile=str(folder))
    config.train.steps_per_dispatch = 1  # 20 dispatches an epoch, of which 10 are traced
    train.run(config, tmp_path / "run", progress=False)
    (found,) = folder.glob("plugins/profile/*/*.xplane.pb")
    trace = jax.profiler.ProfileData.from_file(str(found))
    names = [e.name for plane in trace.planes for line in plane.lines for e in line.events]
    assert names.count("dispatch") == 10
    assert any("dot" in name for name in names)  # and what ran inside


def test_a_profile_may_be_asked_for_when_a_run_goes_on(digits_dir, tmp_path):
    train.run(_alone(digits_dir), tmp_path / "run", progress=False)
    again = _alone(digits_dir, profile=str(tmp_path / "trace"))
    assert train.run(again, tmp_path / "run", progress=False)["finished"]
    assert not pathlib.Path(again.profile).exists()  # nothing was left to train


def test_a_profile_that_cannot_be_written_is_refused_before_training(digits_dir, tmp_path):
    (tmp_path / "file").write_text("in the way")
    config = _alone(digits_dir, profile=str(tmp_path / "file" / "trace"))
    with pytest.raises(ConfigError, match=r"profile='.*trace': cannot be made"):
        train.run(config, tmp_path / "run", progress=False)
