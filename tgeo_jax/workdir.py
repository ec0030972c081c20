"""The folder of a run: what lies where, and whether a command may go on in it."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import re
from collections.abc import Iterator
from typing import Any

import jax
from absl import logging
from ml_collections import ConfigDict

from tgeo_jax import config as configs
from tgeo_jax import lease, peers, storage
from tgeo_jax.errors import CheckpointError, ConfigError

# A run may go on with other values of these.
_NO_NUMBER_DEPENDS_ON = (
    "data.dir",
    "data.workers",
    "data.max_corrupt",
    "train.checkpoint_every",
    "profile",
)


@dataclasses.dataclass(frozen=True)
class Workdir:
    """A run's folder, from `storage.path`: of a file system or of a bucket.

    It holds config.json, commits.json, checkpoints/, metrics.jsonl, tensorboard/, samples.npz,
    verification.npz (of faces), result.json and report/; partial.json after an interruption, and
    .lock while a run trains there.
    """

    path: storage.Path

    @property
    def checkpoints(self) -> storage.Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> storage.Path:
        return self.path / "metrics.jsonl"

    @property
    def partial(self) -> storage.Path:
        return self.path / "partial.json"

    @property
    def samples(self) -> storage.Path:
        return self.path / "samples.npz"

    @property
    def verification(self) -> storage.Path:
        return self.path / "verification.npz"

    @property
    def report(self) -> storage.Path:
        return self.path / "report"

    def generation(self, number: int) -> Workdir:
        """The folder of one run of a chain; 0 is the first anchor."""
        return Workdir(self.path / f"generation_{number}")

    def generations(self) -> list[Workdir]:
        """The runs of the chain in this folder, oldest first; none where it holds a single run."""
        with storage.told_plainly(self.path, "read"):
            names = [path.name for path in self.path.glob("*")]
        found = (re.fullmatch(r"generation_(\d+)", name) for name in names)
        numbers = sorted(int(match[1]) for match in found if match)
        return [self.generation(number) for number in numbers]

    def config(self) -> dict[str, Any]:
        """The configuration of the run in this folder, as plain data."""
        return _loaded(self.path / "config.json", dict)

    def result(self) -> dict[str, Any] | None:
        """The result of a finished run, None if there is none."""
        path = self.path / "result.json"
        return _loaded(path, dict) if storage.exists(path) else None

    def note_commit(self, commit: str) -> None:
        """Keeps which code trains here; a resumed run may have seen several commits."""
        known = self.commits()
        if _writes() and (not known or known[-1] != commit):
            storage.write_atomically(self.path / "commits.json", json.dumps([*known, commit]))

    def commits(self) -> list[str]:
        """The commits whose code trained here, in their order."""
        path = self.path / "commits.json"
        return _loaded(path, list) if storage.exists(path) else []

    def write_result(self, result: dict[str, Any]) -> None:
        """Marks the run as finished."""
        if _writes():
            text = json.dumps(result, indent=2) + "\n"
            storage.write_atomically(self.path / "result.json", text)

    def changes(self, config: ConfigDict) -> list[str]:
        """How a configuration differs from that of the run in this folder, if there is one."""
        if not storage.exists(self.path / "config.json"):
            return []
        now = json.loads(configs.to_json(config))
        default = json.loads(configs.to_json(configs.default()))
        before = _completed(self.config(), default)
        for field in _NO_NUMBER_DEPENDS_ON:
            *sections, name = field.split(".")
            old, new = before, now
            for section in sections:
                old, new = old[section], new[section]
            if isinstance(old, dict):  # else it differs
                old[name] = new[name]
        return configs.differences(before, now)

    def check_same(self, config: ConfigDict) -> None:
        """Checks that a run in this folder, if there is one, has this configuration.

        Raises:
            ConfigError: it has another, with the differences.
        """
        changed = self.changes(config)
        if changed:
            raise ConfigError(
                f"{self.path} holds a run with another configuration:\n  "
                + "\n  ".join(changed)
                + "\nUse another --workdir, or the configuration it was started with, or "
                "--accept_changes to go on with this one."
            )

    def accept(self, config: ConfigDict) -> None:
        """Lets the run in this folder go on with another configuration.

        The one before and the result of a finished run are kept as config.1.json and so on.
        """
        if not self.changes(config) or not _writes():
            return
        number = 1
        while storage.exists(self.path / f"config.{number}.json"):
            number += 1
        if self.result() is not None:
            storage.move(self.path / "result.json", self.path / f"result.{number}.json")
        before = storage.read_bytes(self.path / "config.json")
        storage.write_atomically(self.path / f"config.{number}.json", before)
        storage.write_atomically(self.path / "config.json", configs.to_json(config))

    def claim(self, config: ConfigDict) -> None:
        """Makes the folder that of this configuration.

        Raises:
            ConfigError: it holds a run with another one.
        """
        self.check_same(config)
        if _writes() and not storage.exists(self.path / "config.json"):
            storage.make_folder(self.path)
            storage.write_atomically(self.path / "config.json", configs.to_json(config))


def _loaded(path: storage.Path, kind: type) -> Any:
    try:
        found = json.loads(storage.read_bytes(path))
    except (RecursionError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged ({error}); restore it from a copy") from error
    if not isinstance(found, kind):
        raise CheckpointError(f"{path}: damaged (no {kind.__name__}); restore it from a copy")
    return found


def _writes() -> bool:
    """Of several processes with one workdir, the first alone writes what is not a checkpoint."""
    return jax.process_index() == 0


def _completed(old: dict[str, Any], default: dict[str, Any]) -> dict[str, Any]:
    """An older version's configuration; fields that came later have what was done before."""
    found = dict(old)
    for name, value in default.items():
        if isinstance(value, dict) and isinstance(old.get(name), dict):
            found[name] = _completed(old[name], value)
        elif name not in old:
            found[name] = value
    return found


@contextlib.contextmanager
def only_one(folder: Workdir) -> Iterator[None]:
    """Keeps a second process out of a run's folder while the first one trains in it.

    The lock is the kernel's: it ends with its process, however that ends. That of a bucket is a
    `lease`. Of a run of several processes, the first one has it.

    Raises:
        ConfigError: another process is training there.
    """
    if storage.is_bucket(folder.path):
        # Not by a collective: process 0 may have to watch a lease for longer than those wait.
        with lease.held(folder.path / ".lock") if _writes() else contextlib.nullcontext():
            peers.meet("only_one")
            yield
        return
    if not _writes():
        yield
        return
    with (folder.path / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"--workdir={folder.path}: another process is training there; wait for it, stop "
                "it, or use another folder"
            ) from error
        except OSError as error:  # Lustre, NFS and mounted buckets may have no locks
            logging.warning(
                "%s: cannot be locked (%s); start no second run there", file.name, error
            )
        yield


def trained(path: str, role: str, how_to_get: str = "train it first") -> Workdir:
    """The folder of a finished run whose student will be used, as a teacher for instance.

    Args:
        path: its workdir.
        role: the configuration field that names it, for messages.
        how_to_get: what to do where there is none, for messages.

    Raises:
        CheckpointError: no run there, or one that has not finished, with the way to get one.

    Examples:
        >>> trained("/nowhere", "teacher.workdir", "train one")
        Traceback (most recent call last):
        ...
        tgeo_jax.errors.CheckpointError: teacher.workdir='/nowhere': no run there; train one
        or name the workdir of a run that exists
    """
    folder = Workdir(storage.path(path, role))
    if not storage.exists(folder.path / "config.json"):
        raise CheckpointError(
            f"{role}={path!r}: no run there; {how_to_get}\nor name the workdir of a run that exists"
        )
    if folder.result() is None:
        raise CheckpointError(
            f"{role}={path!r}: that run has not finished; run its command again, it resumes"
        )
    return [folder, *folder.generations()][-1]  # of a chain, its last student
