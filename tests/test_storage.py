"""Paths of folders and of buckets, and files that are whole or not there."""

from __future__ import annotations

import importlib.util
import os
import pathlib
import threading
import time

import pytest
from etils import epath

from tgeo_jax import lease, storage
from tgeo_jax.errors import CheckpointError, ConfigError


@pytest.mark.parametrize("text", ["gs://b/run", "s3://b/run", pathlib.Path("gs://b/run")])
def test_an_address_in_a_bucket_stays_one(text):
    found = storage.path(text)
    assert storage.is_bucket(found)
    assert str(found / "x") == str(text).replace(":/b", "://b") + "/x"
    assert storage.absolute(found) == found


@pytest.mark.parametrize("text", ["runs/a", "/runs/a", "runs/a:b", "C", "gs/b"])
def test_other_names_are_of_folders(text):
    assert storage.path(text) == pathlib.Path(text)
    assert not storage.is_bucket(storage.path(text))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("http://b/run", "--workdir=http://b/run: unknown kind of storage"),
        ("gs://", "--workdir=gs://: names no bucket; use gs://BUCKET/FOLDER"),
        ("s3:///", "--workdir=s3:///: names no bucket; use s3://BUCKET/FOLDER"),
    ],
)
def test_other_addresses_are_refused(text, said):
    with pytest.raises(ConfigError) as caught:
        storage.path(text)
    assert str(caught.value).startswith(said)


def test_a_client_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs the package s3fs; pip install 'tgeo_jax\[s3\]'"):
        storage.path("s3://b/run")


def test_errors_of_a_bucket_are_one_line(monkeypatch):
    def refuse(self):
        raise RuntimeError("403, no permission\nand much more")

    monkeypatch.setattr(type(epath.Path("gs://b/run")), "read_bytes", refuse)
    with pytest.raises(CheckpointError) as caught:
        storage.read_bytes(storage.path("gs://b/run"))
    assert str(caught.value).startswith("gs://b/run: cannot be read (403, no permission); check")


def test_what_is_appended_is_there_at_once(tmp_path):
    file = storage.Appended(tmp_path / "lines", "")
    for text in ("a\n", "b\n"):
        file.append(text)
        assert (tmp_path / "lines").read_text().endswith(text)
    file.close()
    again = storage.Appended(tmp_path / "lines", "a\nb\n")
    again.append("c\n")
    again.close()
    assert (tmp_path / "lines").read_text() == "a\nb\nc\n"


def test_one_of_two_runs_holds_the_lease_and_gives_it_back(tmp_path):
    where = tmp_path / ".lock"
    with lease.held(where, 0.1):
        assert where.exists()
        with (
            pytest.raises(ConfigError, match="another process is training there"),
            lease.held(where, 0.1),
        ):
            pass
        assert where.exists()
    assert not where.exists()
    with lease.held(where, 0.1):
        pass


def test_the_lease_of_a_run_that_was_killed_is_taken_over(tmp_path, caplog):
    where = tmp_path / ".lock"
    where.write_text('{"owner": "gone:1:x", "beat": 3}')
    with lease.held(where, 0.05):
        assert "gone:1:x" not in where.read_text()
    assert "left by gone:1:x; waiting 0.15 s" in caplog.text


def test_of_two_that_come_at_once_one_trains(tmp_path, monkeypatch):
    """Both find nothing, both write; the second to write stays."""
    where, held, refused = tmp_path / ".lock", [], []
    both_looked, look, looks = threading.Barrier(2), lease._found, []

    def found(path):
        seen = look(path)
        looks.append(seen)
        if len(looks) <= 2:  # neither writes before both have looked
            assert seen is None
            both_looked.wait()
        return seen

    monkeypatch.setattr(lease, "_found", found)

    def come():
        try:
            with lease.held(where, 5.0):  # it looks again after a second
                held.append(1)
                time.sleep(1.5)
        except ConfigError:
            refused.append(1)

    both = [threading.Thread(target=come) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert (held, refused) == ([1], [1])


def test_writing_replaces_the_whole_file_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("a much longer old text")
    storage.write_atomically(path, "new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_written_file_can_be_read_by_others(tmp_path):
    # Temporary files are private by default; results on a shared disk must not be.
    storage.write_atomically(tmp_path / "result.json", "{}")
    assert (tmp_path / "result.json").stat().st_mode & 0o777 == 0o644


def test_a_crash_while_writing_loses_no_old_text(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    path.write_text("old")

    def full_disk(descriptor):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space left"):
        storage.write_atomically(path, "new")
    assert path.read_text() == "old"


def test_the_new_text_is_complete_and_on_disk_before_it_takes_the_name(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    synced, replaced = [], []
    fsync, replace = os.fsync, os.replace

    def recording_fsync(descriptor):
        fsync(descriptor)
        synced.append(os.fstat(descriptor).st_ino)

    def recording_replace(source, target):
        with open(source) as file:
            replaced.append((file.read(), os.stat(source).st_ino in synced, os.fspath(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(os, "replace", recording_replace)
    storage.write_atomically(path, "new")
    assert replaced == [("new", True, str(path))]
