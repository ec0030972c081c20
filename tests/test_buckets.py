"""Runs whose folder is a bucket, over a network that is slow, fails, or ends in the middle."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import urllib.parse

import jax
import numpy as np
import pytest

from tests import buckets, several
from tests.buckets import BUCKET, Answer
from tests.conftest import ROOT, command_environment
from tgeo_jax import checkpoint

pytestmark = pytest.mark.xdist_group("processes")

_SAVES = (*several.SMALL, "--config.train.checkpoint_every=1")
# What is in a bucket, as files of this machine.
_COPY = """
import sys, fsspec
system, path = fsspec.core.url_to_fs(sys.argv[1])
system.get(path, sys.argv[2], recursive=True)
"""


@pytest.fixture(scope="module", params=["gs", "s3"])
def bucket(request):
    with buckets.emulated(request.param) as (network, environment):
        yield request.param, network, environment


@pytest.fixture
def run(command, bucket):
    scheme, network, environment = bucket

    def started(name, *arguments, **options):
        where = f"--workdir={scheme}://{BUCKET}/{name}"
        return command(*arguments, where, **environment, **options)

    yield started
    network.policy = buckets.well


@pytest.fixture(scope="module")
def undisturbed(command, tmp_path_factory):
    """The same run in a folder."""
    folder = tmp_path_factory.mktemp("folder") / "run"
    command(*_SAVES, f"--workdir={folder}")
    return folder


def _copied(command, bucket, name, folder):
    scheme, _, environment = bucket
    command("-c", _COPY, f"{scheme}://{BUCKET}/{name}", str(folder), **environment)
    return folder


def _check_same(found, expected):
    for a, b in zip(_records(found), _records(expected), strict=True):
        assert a == b
    networks = (checkpoint.load_newest(f / "checkpoints") for f in (found, expected))
    jax.tree.map(np.testing.assert_array_equal, *networks)


def _records(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if not k.startswith("time/")} for line in lines
    ]


def test_a_run_in_a_bucket_over_a_shaky_network_is_that_of_a_folder(
    command, bucket, run, undisturbed, tmp_path
):
    scheme, network, _ = bucket
    network.policy = buckets.shaky(0)
    done = run("shaky", *_SAVES)
    assert network.refused > 2
    network.policy = buckets.well
    assert f"Report: {scheme}://{BUCKET}/shaky/report/index.html" in done.stdout
    found = _copied(command, bucket, "shaky", tmp_path / "found")
    _check_same(found, undisturbed)

    def names(folder, pattern):
        return sorted(path.relative_to(folder).as_posix() for path in folder.glob(pattern))

    renamed = [name.replace("shaky", "run") for name in names(found, "report/**/*")]
    assert renamed == names(undisturbed, "report/**/*")
    asked = ("-m", "experiments.report", f"{scheme}://{BUCKET}", f"--output={tmp_path / 'page'}")
    assert "index.html" in command(*asked, **bucket[2]).stdout
    assert "<td>shaky</td>" in (tmp_path / "page" / "index.html").read_text()
    assert names(found, "checkpoints/*") == names(undisturbed, "checkpoints/*")
    assert len(list(found.glob("tensorboard/seed_*/events.*"))) == 3
    assert "shaky is finished; nothing to do." in run("shaky", *_SAVES).stdout


def test_killed_in_the_middle_of_a_save_it_goes_on_and_ends_as_undisturbed(
    command, bucket, run, undisturbed, digits_dir, tmp_path
):
    """The signal comes when the second checkpoint's first array arrives."""
    scheme, network, environment = bucket
    running = subprocess.Popen(
        [sys.executable, *_SAVES, f"--workdir={scheme}://{BUCKET}/killed"],
        cwd=ROOT, env=command_environment(digits_dir, **environment),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip

    def kill(method, path):
        written = method in ("PUT", "POST") and urllib.parse.unquote(path)
        if written and re.search(r"/40[/.].*ocdbt\.process_0/d/", written):
            running.send_signal(signal.SIGKILL)
            return Answer(0.0, 503)
        return Answer()

    network.policy = kill
    said, _ = running.communicate(timeout=200)
    assert running.returncode == -signal.SIGKILL, said
    network.policy = buckets.well
    done = run("killed", *_SAVES)
    assert "waiting 45 s to see whether that run lives" in done.stderr
    _check_same(_copied(command, bucket, "killed", tmp_path / "found"), undisturbed)


_DAMAGE = """
import sys, fsspec
system, path = fsspec.core.url_to_fs(sys.argv[1])
system.rm(f"{path}/result.json")
if sys.argv[2:]:
    found = [name for name in system.find(f"{path}/checkpoints/60/state") if "/d/" in name]
    system.pipe(sorted(found)[0], b"damage")
"""


def test_a_damaged_checkpoint_in_a_bucket_is_put_aside(command, bucket, run, undisturbed, tmp_path):
    scheme, _, environment = bucket
    run("damaged", *_SAVES)
    where = f"{scheme}://{BUCKET}/damaged"
    command("-c", _DAMAGE, where, "damage", **environment)
    done = run("damaged", *_SAVES)
    assert f"{where}/checkpoints/60: this checkpoint cannot be read" in done.stderr
    found = _copied(command, bucket, "damaged", tmp_path / "found")
    assert (found / "checkpoints_damaged" / "60").is_dir()
    _check_same(found, undisturbed)


def test_two_processes_write_one_bucket_and_go_on_there(
    command, bucket, undisturbed, digits_dir, tmp_path
):
    scheme, _, environment = bucket
    where = f"{scheme}://{BUCKET}/two"
    for attempt in range(2):
        if attempt:  # as if they had been killed just before the end
            command("-c", _DAMAGE, where, **environment)
        started = several.start(2, digits_dir, *_SAVES, f"--workdir={where}", **environment)
        done = several.finish(started)
        assert [code for code, _ in done] == [0, 0], done
    found = _copied(command, bucket, "two", tmp_path / "found")
    for a, b in zip(_records(found), _records(undisturbed), strict=True):
        assert a == pytest.approx(b, rel=1e-3)  # sums over two devices


def test_a_teacher_in_a_bucket_teaches(command, bucket, run, tmp_path):
    scheme, _, environment = bucket
    short = ("--config.train.epochs=1", "--config.seeds=1")
    run("teacher", "-m", "experiments.main", "--config=configs/digits/teacher.py", *short)
    where = f"{scheme}://{BUCKET}/teacher"
    command(
        "-m", "experiments.main", "--config=configs/digits/tgeo.py", *short,
        f"--config.teacher.workdir={where}", f"--workdir={tmp_path}", **environment,
    )  # fmt: skip
    assert json.loads((tmp_path / "result.json").read_text())["epochs"] == 1


def test_a_bucket_that_refuses_is_named_with_what_to_check(run, bucket):
    scheme, network, _ = bucket
    network.policy = lambda method, path: Answer(0.0, 403)
    done = run("refused", *_SAVES, check=False)
    assert done.returncode == 2, done.stderr
    assert f"error: {scheme}://{BUCKET}/refused/" in done.stderr
    assert "check the bucket's name, this machine's credentials and the network" in done.stderr
    assert "Traceback" not in done.stderr
