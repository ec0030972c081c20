"""A split's decoded arrays, kept beside the records they were decoded from.

Decoding 60,000 PNGs takes longer than compiling a step; reading their pixels as one file does not.
The file is a cache: it is used only if it is whole and of these very records, and no run fails
because it cannot be read or written.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from tgeo_jax.data import fingerprints

FORMAT = 1  # another number whenever decoding gives other arrays
_HEADER = "header"

Arrays = dict[str, np.ndarray]


def load_or_decode(
    path: pathlib.Path, records: Iterable[pathlib.Path], decode: Callable[[], Arrays]
) -> Arrays:
    """The arrays of a file, or those decoded from records and written to it.

    Args:
        path: of the file, an uncompressed .npz.
        records: the files that are decoded; one of another name, size or time makes the file stale.
        decode: makes the arrays, by name; called where there is no file of these records.

    Returns:
        What decode() returns, bit for bit.

    Examples:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     record, path = pathlib.Path(folder) / "record", pathlib.Path(folder) / "decoded.npz"
        ...     _ = record.write_text("7")
        ...     for decode in (lambda: {"labels": np.int32([7])}, dict):
        ...         print(load_or_decode(path, [record], decode))
        {'labels': array([7], dtype=int32)}
        {'labels': array([7], dtype=int32)}
    """
    # Before decoding: records replaced meanwhile make what is written stale, not wrong.
    origin = _origin(records)
    arrays = _read(path, origin)
    if arrays is None:
        arrays = decode()
        with contextlib.suppress(OSError):  # a dataset of somebody else's, or a full disk
            _write(path, origin, arrays)
    return arrays


def _origin(records: Iterable[pathlib.Path]) -> dict[str, Any]:
    """What tells these records from others, as JSON gives it back."""
    found = [(record.name, record.stat()) for record in records]
    return {
        "format": FORMAT,
        "records": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in found],
    }


def _read(path: pathlib.Path, origin: dict[str, Any]) -> Arrays | None:
    """The arrays of a whole file of these records, else None."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            header = json.loads(stored[_HEADER].tobytes())
            if {**header, "sha256": ""} != {**origin, "sha256": ""}:
                return None  # before reading all of it
            arrays = {name: stored[name] for name in stored.files if name != _HEADER}
        return arrays if fingerprints.of(arrays) == header["sha256"] else None
    except Exception:  # damage shows as any of zipfile's, numpy's, zlib's or JSON's errors
        return None


def _write(path: pathlib.Path, origin: dict[str, Any], arrays: Arrays) -> None:
    header = json.dumps({**origin, "sha256": fingerprints.of(arrays)}).encode()
    # A name of its own for each process: of several that write at once the last one's file stays.
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        # Not synchronised to disk: what a power cut leaves of it does not have its SHA-256.
        with os.fdopen(handle, "wb") as file:
            np.savez(file, **{_HEADER: np.frombuffer(header, np.uint8)}, **arrays)  # type: ignore[arg-type]
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
