"""From the folders that a user names to the finished runs that a report shows."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tgeo_jax import storage
from tgeo_jax.errors import ConfigError, DataError
from tgeo_jax.workdir import Workdir

_DEEP = 4  # folders between the one that is named and a run
_OF_A_RUN = {"checkpoints", "figures", "report", "tensorboard", "trace"}


class Found(NamedTuple):
    """Runs by the names they are told apart by, and folders of runs that are not finished."""

    runs: dict[str, Workdir]
    unfinished: list[storage.Path]


def find(named: Sequence[str]) -> Found:
    """The finished runs in some folders.

    A folder of a chain stands for all of its generations, one that holds runs somewhere below for
    all that are finished.

    Args:
        named: workdirs, or folders above them; of a file system or of a bucket.

    Returns:
        The runs, in the order in which they are named and, within a folder, of their names. A name
        is as much of the end of a run's path as tells it from the others.

    Raises:
        ConfigError: no folder is named, or one run twice.
        DataError: there is no run, or one that is named has not finished.

    Examples:
        >>> find(["/nowhere"])
        Traceback (most recent call last):
        ...
        tgeo_jax.errors.DataError: WORKDIR=/nowhere: no run there, nor below; name the workdir of \
a finished run, or a folder of such
    """
    if not named:
        raise ConfigError("no WORKDIR: name the folder of one or more finished runs")
    folders, unfinished = list[storage.Path](), list[storage.Path]()
    for text in named:
        own = storage.absolute(storage.path(text, "WORKDIR"))
        whole = [own] if _holds_run(own) else list(_below(own, _DEEP))
        for folder in whole:
            done = Workdir(folder).result() is not None
            if not done and folder == own:
                raise DataError(f"WORKDIR={text}: not finished; run its command again, it resumes")
            (folders if done else unfinished).append(folder)
        if not any(folder in folders for folder in whole):
            said = "no finished run there" if whole else "no run there, nor below"
            raise DataError(
                f"WORKDIR={text}: {said}; name the workdir of a finished run, or a folder of such"
            )
    runs = [run for folder in folders for run in _generations(Workdir(folder))]
    _check_different([run.path for run in runs])
    names = _told_apart([os.fspath(run.path) for run in runs])
    return Found(dict(zip(names, runs, strict=True)), unfinished)


def _holds_run(folder: storage.Path) -> bool:
    return storage.exists(folder / "config.json")


def _below(folder: storage.Path, deep: int) -> Iterator[storage.Path]:
    """Folders of runs, not looking into those."""
    if not deep or not storage.is_dir(folder):
        return
    with storage.told_plainly(folder, "read"):
        inside = sorted(folder.iterdir(), key=lambda path: path.name)
    for path in inside:
        if path.name.startswith(".") or path.name in _OF_A_RUN or not storage.is_dir(path):
            continue
        if _holds_run(path):
            yield path
        else:
            yield from _below(path, deep - 1)


def _generations(folder: Workdir) -> list[Workdir]:
    return [run for run in folder.generations() if run.result() is not None] or [folder]


def _check_different(paths: Sequence[storage.Path]) -> None:
    for index, path in enumerate(paths):
        if path in paths[:index]:
            raise ConfigError(
                f"WORKDIR={path}: named twice, by itself or by a folder above it; name it once"
            )


def _told_apart(paths: Sequence[str]) -> list[str]:
    """The shortest ends of paths that differ; a generation keeps the name of its chain.

    Examples:
        >>> _told_apart(["/a/x/kd", "/a/y/kd", "/a/y/tgeo"])
        ['x/kd', 'y/kd', 'tgeo']
        >>> _told_apart(["/a/trikd/generation_0", "/a/kd"])
        ['trikd/generation_0', 'kd']
    """
    split = [path.strip("/").split("/") for path in paths]
    names = []
    for own in split:
        length = 2 if own[-1].startswith("generation_") else 1
        while sum(other[-length:] == own[-length:] for other in split) > 1 and length < len(own):
            length += 1
        names.append("/".join(own[-length:]))
    return names
