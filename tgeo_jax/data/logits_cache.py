"""Teacher logits computed once and stored beside the dataset, as float16 in array_record.

Record 0 is a JSON header that says what the logits are of; record 1 + i holds those of example i of
the training split, of its clean image and of each augmented view, [1 + V, K].
"""

from __future__ import annotations

import json
import os
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from tgeo_jax.errors import DataError


def load_or_compute(
    path: pathlib.Path, header: dict[str, Any], compute: Callable[[], np.ndarray]
) -> np.ndarray:
    """The logits of a file, or those computed and written to it where there is none.

    Args:
        path: of the array_record file.
        header: what the logits are of: teacher, dataset, views; JSON values.
        compute: makes logits [N, 1 + V, K]; called where there is no file.

    Returns:
        logits, float16 [N, 1 + V, K].

    Raises:
        DataError: the file holds logits of something else, cannot be read, or float16 cannot hold
            the logits.
    """
    if path.exists():
        return _read(path, header)
    logits_NxVxK = compute()
    stored = logits_NxVxK.astype(np.float16)
    if not np.isfinite(stored).all():
        example = int(np.argmin(np.isfinite(stored).reshape(len(stored), -1).all(axis=1)))
        raise DataError(
            f"role.name='cached': the teacher's logits of training example {example} reach "
            f"{np.abs(logits_NxVxK[example]).max():.4g}, more than float16 holds (65504); use "
            "role.name='frozen'"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    # Under another name until it is whole: an interrupted run must leave nothing half-made.
    # Of its own: processes in several containers may have one number.
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = pathlib.Path(name)
    temporary.chmod(0o644)
    writer = ArrayRecordWriter(name, "group_size:64")
    try:
        writer.write(json.dumps(_described(header, stored)).encode())
        for example in stored:
            writer.write(example.tobytes())
    finally:
        writer.close()
    temporary.replace(path)
    return stored


def _described(header: dict[str, Any], logits: np.ndarray) -> dict[str, Any]:
    return {"format": 1, **header, "shape": list(logits.shape)}


def _read(path: pathlib.Path, header: dict[str, Any]) -> np.ndarray:
    try:
        reader = ArrayRecordReader(str(path))
        found = json.loads(reader.read([0])[0])
        wanted = {"format": 1, **header}
        different = [name for name in wanted if found.get(name) != wanted[name]]
        if different:
            raise DataError(
                f"{path}: stale: these logits are of another {', '.join(different)} "
                f"({_told(found, different)} there, {_told(wanted, different)} here); delete the "
                "file to compute them again, or set role.cached.name to keep both"
            )
        records = reader.read_all()[1:]
        reader.close()
        logits = np.frombuffer(b"".join(records), np.float16)
        return logits.reshape(found["shape"])
    except (AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise DataError(
            f"{path}: cannot be read ({error}); delete the file to compute it again"
        ) from error


def _told(header: dict[str, Any], fields: list[str]) -> str:
    """Values for a message; of a fingerprint its beginning is enough."""
    values = [header.get(field) for field in fields]
    return ", ".join(json.dumps(v) if isinstance(v, dict) else str(v)[:12] for v in values)
