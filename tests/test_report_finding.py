"""From folders that a user names to runs with names."""

from __future__ import annotations

import os

import pytest

from tests import finished_runs
from tgeo_jax.errors import ConfigError, DataError
from tgeo_jax.reporting import finding


@pytest.fixture
def folders(tmp_path):
    """Two comparisons, each with a kd; a chain; a run that has not finished."""
    for name in ("noisy/kd", "noisy/plain", "good/kd", "good/trikd", "good/half"):
        finished_runs.write(tmp_path / name)
    for number in (0, 1):
        finished_runs.write(tmp_path / "good" / "trikd" / f"generation_{number}")
    (tmp_path / "good" / "half" / "result.json").unlink()
    for inside in ("checkpoints", "report", ".hidden"):  # not looked into
        finished_runs.write(tmp_path / "good" / inside / "run")
    return tmp_path


def _names(*named):
    return list(finding.find([os.fspath(path) for path in named]).runs)


def test_a_run_stands_for_itself(folders):
    found = finding.find([str(folders / "noisy" / "kd")])
    assert {name: run.path for name, run in found.runs.items()} == {"kd": folders / "noisy" / "kd"}


def test_a_folder_stands_for_the_finished_runs_in_it_and_a_chain_for_its_generations(folders):
    found = finding.find([str(folders / "good")])
    assert list(found.runs) == ["kd", "trikd/generation_0", "trikd/generation_1"]
    assert found.unfinished == [folders / "good" / "half"]


def test_runs_of_the_same_name_are_told_apart_by_their_folders(folders):
    assert _names(folders / "noisy" / "kd", folders / "good" / "kd") == ["noisy/kd", "good/kd"]
    assert _names(folders) == [
        "good/kd", "trikd/generation_0", "trikd/generation_1", "noisy/kd", "plain"
    ]  # fmt: skip


def test_the_order_is_that_of_the_command_line(folders):
    assert _names(folders / "noisy" / "plain", folders / "noisy" / "kd") == ["plain", "kd"]


def test_a_relative_folder_has_a_name(folders, monkeypatch):
    monkeypatch.chdir(folders / "noisy" / "kd")
    assert _names(".") == ["kd"]


@pytest.mark.parametrize(
    ("named", "error", "said"),
    [
        ([], ConfigError, "no WORKDIR: name the folder"),
        (["good/half"], DataError, "good/half: not finished; run its command again, it resumes"),
        (["nobody"], DataError, "nobody: no run there, nor below; name the workdir"),
        (["noisy/kd", "noisy/kd"], ConfigError, "noisy/kd: named twice"),
        (["noisy", "noisy/kd"], ConfigError, "noisy/kd: named twice, by itself or by a folder"),
    ],
)
def test_what_cannot_be_shown_is_named(folders, named, error, said):
    with pytest.raises(error, match=said):
        finding.find([str(folders / name) for name in named])


def test_a_folder_whose_runs_have_all_not_finished_has_nothing_to_show(folders):
    (folders / "noisy" / "kd" / "result.json").unlink()
    (folders / "noisy" / "plain" / "result.json").unlink()
    with pytest.raises(DataError, match="noisy: no finished run there"):
        finding.find([str(folders / "noisy")])


def test_an_unknown_kind_of_storage_is_named():
    with pytest.raises(ConfigError, match=r"WORKDIR=hdfs://cluster/runs: unknown kind of storage"):
        finding.find(["hdfs://cluster/runs"])
