"""Where a run's files are: a folder of a file system, or a bucket (gs://, s3://) through etils.

A bucket has no folders, no locks, no appending and no renaming: what needs them asks here. Its
clients (gcsfs, s3fs, TensorStore) repeat a request that failed in passing by themselves.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import pathlib
import re
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import fsspec
import numpy as np
from etils import epath

from tgeo_jax.errors import CheckpointError, ConfigError, DataError, TgeoError

Path = Any  # pathlib.Path, or epath.Path of a bucket: the same methods, no common class
# By scheme: the client's package, and this package's extra that installs it.
_CLIENTS = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}
_ADDRESS = re.compile(r"([A-Za-z0-9+.-]+):/")
_KNOWN = " and ".join(f"{scheme}://" for scheme in _CLIENTS)


def path(text: str | os.PathLike, field: str = "--workdir") -> Path:
    """The path that a user named.

    Args:
        text: of a folder or file, or an address in a bucket.
        field: what named it, for messages.

    Returns:
        A `pathlib.Path`, of a bucket an `epath.Path`.

    Raises:
        ConfigError: an address of an unknown kind, or one whose client is not installed.

    Examples:
        >>> path("runs/a") == pathlib.Path("runs/a")
        True
        >>> path("hdfs://cluster/runs")
        Traceback (most recent call last):
        ...
        tgeo_jax.errors.ConfigError: --workdir=hdfs://cluster/runs: unknown kind of storage; known \
are folders, gs:// and s3://; mount others and name the folder there
    """
    found = _ADDRESS.match(os.fspath(text))
    if found is None:
        return pathlib.Path(text)
    scheme = found[1]
    if scheme not in _CLIENTS:
        raise ConfigError(
            f"{field}={text}: unknown kind of storage; known are folders, {_KNOWN}; mount others "
            "and name the folder there"
        )
    package, extra = _CLIENTS[scheme]
    if importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"{field}={text}: needs the package {package}; pip install 'tgeo_jax[{extra}]', or "
            "mount the bucket and name the folder there"
        )
    # Clients remember listings, and other processes write there too.
    fsspec.config.conf.setdefault(package.removesuffix("fs"), {})["use_listings_cache"] = False
    # A path from pathlib has lost a slash.
    rest = os.fspath(text).partition(":")[2].lstrip("/")
    if not rest.strip("/"):
        raise ConfigError(f"{field}={text}: names no bucket; use {scheme}://BUCKET/FOLDER")
    return epath.Path(f"{scheme}://{rest}")


def is_bucket(where: Path) -> bool:
    """Whether a path is in a bucket.

    Examples:
        >>> is_bucket(pathlib.Path("runs"))
        False
    """
    return not isinstance(where, pathlib.Path)


def check_folder(text: str | os.PathLike, field: str) -> None:
    """Checks that what must be in a file system is not an address in a bucket.

    Raises:
        ConfigError: it is, naming the field.

    Examples:
        >>> check_folder("gs://bucket/data", "data.dir")
        Traceback (most recent call last):
        ...
        tgeo_jax.errors.ConfigError: data.dir=gs://bucket/data: must be a folder; mount the bucket \
and name the folder there
    """
    if _ADDRESS.match(os.fspath(text)):
        raise ConfigError(
            f"{field}={text}: must be a folder; mount the bucket and name the folder there"
        )


def absolute(where: Path) -> Path:
    """A path that does not depend on the working directory.

    Examples:
        >>> absolute(pathlib.Path("/runs"))
        PosixPath('/runs')
    """
    return where if is_bucket(where) else where.absolute()


def write_atomically(where: Path, content: str | bytes) -> None:
    """Writes a whole file or nothing: a reader never sees half of it, a crash loses no old one.

    Raises:
        CheckpointError: a bucket that does not take it.

    Examples:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     note = pathlib.Path(folder) / "note.txt"
        ...     write_atomically(note, "whole")
        ...     note.read_text()
        'whole'
    """
    data = content.encode() if isinstance(content, str) else content
    if is_bucket(where):  # an object appears when all of it is there
        with told_plainly(where, "written"):
            where.write_bytes(data)
        return
    handle, temporary = tempfile.mkstemp(dir=where.parent, prefix=f".{where.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, where)
    except BaseException:
        os.unlink(temporary)
        raise


def write_arrays(where: Path, arrays: Mapping[str, Any]) -> None:
    """Writes arrays as one .npz file, whole or not at all.

    Examples:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_arrays(pathlib.Path(folder) / "a.npz", {"w": np.ones(2)})
        ...     read_arrays(pathlib.Path(folder) / "a.npz")
        {'w': array([1., 1.])}
    """
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    write_atomically(where, content.getvalue())


def read_arrays(where: Path) -> dict[str, np.ndarray]:
    """What `write_arrays` wrote.

    Raises:
        DataError: it is damaged.
    """
    try:
        with np.load(io.BytesIO(read_bytes(where)), allow_pickle=False) as stored:
            return dict(stored)
    except Exception as error:  # damage shows as any of zipfile's, numpy's or zlib's errors
        raise DataError(
            f"{where}: damaged ({error}); restore it, or delete it for a report without it"
        ) from error


class Appended:
    """A text file that grows; of a bucket, where nothing appends, an object written anew.

    Args:
        where: of the file.
        held: what it holds already.
    """

    def __init__(self, where: Path, held: str):
        self._where = where
        self._text = held if is_bucket(where) else ""
        self._file = None if is_bucket(where) else where.open("a")

    def append(self, text: str) -> None:
        """Adds text and waits until it is kept."""
        if self._file is None:
            self._text += text
            write_atomically(self._where, self._text)
            return
        self._file.write(text)
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()


def exists(where: Path) -> bool:
    """Whether something is there; False also where that cannot be known.

    Raises:
        CheckpointError: a bucket that does not answer, or not to this user.

    Examples:
        >>> exists(pathlib.Path("/nowhere"))
        False
    """
    if not is_bucket(where):
        return os.path.exists(where)
    with told_plainly(where, "read"):
        return where.exists()


def is_dir(where: Path) -> bool:
    """Whether a folder is there; of a bucket, whether anything is below that name.

    Raises:
        CheckpointError: a bucket that does not answer, or not to this user.

    Examples:
        >>> is_dir(pathlib.Path("/nowhere"))
        False
    """
    with told_plainly(where, "read"):
        return where.is_dir()


def read_bytes(where: Path) -> bytes:
    """What a file holds.

    Raises:
        FileNotFoundError: there is none.
        CheckpointError: a bucket that does not answer, or not to this user.

    Examples:
        >>> read_bytes(pathlib.Path("/dev/null"))
        b''
    """
    with told_plainly(where, "read"):
        return where.read_bytes()


def make_folder(where: Path) -> None:
    """Makes a folder and those that it lies in; a bucket needs none.

    Examples:
        >>> make_folder(pathlib.Path("/"))
    """
    # Some clients would make a bucket whose name was mistyped.
    if not is_bucket(where):
        where.mkdir(parents=True, exist_ok=True)


def move(where: Path, target: Path) -> None:
    """Gives a file, or a folder with all that is in it, another name.

    Examples:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     move(pathlib.Path(folder), pathlib.Path(f"{folder}.moved"))
        ...     pathlib.Path(f"{folder}.moved").rename(folder).is_dir()
        True
    """
    if not is_bucket(where):
        where.rename(target)
        return
    with told_plainly(where, "moved"):
        system, own = fsspec.core.url_to_fs(os.fspath(where))
        # Not `mv`: not every server that speaks the protocol can.
        system.copy(own, system._strip_protocol(os.fspath(target)), recursive=True)
        system.rm(own, recursive=True)


@contextlib.contextmanager
def told_plainly(where: Path, done: str) -> Iterator[None]:
    """Errors of a bucket's client as one line; those of a file system pass.

    So does that nothing is there to be read.

    Args:
        where: the path.
        done: what could not be done with it.

    Raises:
        CheckpointError: whatever else the client of a bucket raises.

    Examples:
        >>> with told_plainly(epath.Path("s3://bucket/run"), "written"):
        ...     raise OSError("no route to host")
        Traceback (most recent call last):
        tgeo_jax.errors.CheckpointError: s3://bucket/run: cannot be written (no route to host); \
check the bucket's name, this machine's credentials and the network; the same command goes on from \
the newest checkpoint
    """
    if not is_bucket(where):
        yield
        return
    try:
        yield
    except TgeoError:
        raise
    except FileNotFoundError as error:
        if done == "read":
            raise
        raise _error(where, done, error) from error
    except Exception as error:  # whatever gcsfs, s3fs, aiohttp or botocore say
        raise _error(where, done, error) from error


def _error(where: Path, done: str, error: Exception) -> CheckpointError:
    said = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    return CheckpointError(
        f"{where}: cannot be {done} ({said[:300]}); check the bucket's name, this machine's "
        "credentials and the network; the same command goes on from the newest checkpoint"
    )
