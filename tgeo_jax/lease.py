"""Keeps a second run out of a folder in a bucket, which has no locks: an object that beats.

    {"owner": "host:pid:random", "beat": 7}

Whoever trains there writes it anew every `period` seconds with the next number. Whoever comes and
finds one watches it for three periods: one that changes belongs to a run that lives, one that does
not was left by a run that was killed. No clocks are compared.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator

from absl import logging

from tgeo_jax import storage
from tgeo_jax.errors import CheckpointError, ConfigError

_PERIOD = 15.0  # seconds


@contextlib.contextmanager
def held(where: storage.Path, period: float = _PERIOD) -> Iterator[None]:
    """Holds the lease on a folder, or refuses; it is given back at the end.

    A process that finds, having slept for long, that somebody else has taken it ends at once: both
    would write the same files.

    Args:
        where: of the object.
        period: seconds between two beats.

    Raises:
        ConfigError: another process trains there.
        CheckpointError: the bucket cannot be read or written.

    Examples:
        >>> import pathlib, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     lease = pathlib.Path(folder) / "lease.json"
        ...     with held(lease, period=0.01):
        ...         lease.exists()
        ...     lease.exists()
        True
        False
    """
    owner = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(8)}"
    before = _found(where)
    if before is not None:
        logging.warning(
            "%s: left by %s; waiting %g s to see whether that run lives",
            where, before["owner"], 3 * period,
        )  # fmt: skip
        time.sleep(3 * period)
        now = _found(where)
        if now is not None and now != before:
            raise _refused(where, now["owner"])
    _write(where, owner, 0)
    # Of two that came at once, the second to write has it.
    time.sleep(period / 5)
    now = _found(where)
    if now is None or now["owner"] != owner:
        raise _refused(where, "another process" if now is None else now["owner"])
    closed = threading.Event()
    beating = threading.Thread(target=_beat, args=(where, owner, period, closed), daemon=True)
    beating.start()
    try:
        yield
    finally:
        closed.set()
        beating.join()
        with contextlib.suppress(CheckpointError, FileNotFoundError):
            if (_found(where) or {}).get("owner") == owner:
                with storage.told_plainly(where, "removed"):
                    where.unlink()


def _beat(where: storage.Path, owner: str, period: float, closed: threading.Event) -> None:
    number = 0
    while not closed.wait(period):
        number += 1
        try:
            now = _found(where)
            if now is not None and now["owner"] != owner:
                print(
                    f"error: {where}: {now['owner']} trains here now; this process had been "
                    "silent for too long and stops. Nothing it saved is lost",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(2)
            _write(where, owner, number)
        except CheckpointError:  # the bucket may answer again by the next beat
            continue


def _found(where: storage.Path) -> dict | None:
    try:
        found = json.loads(storage.read_bytes(where))
    except FileNotFoundError:
        return None
    except ValueError:
        found = {}
    return found if isinstance(found, dict) and "owner" in found else {"owner": "an unknown run"}


def _write(where: storage.Path, owner: str, beat: int) -> None:
    storage.write_atomically(where, json.dumps({"owner": owner, "beat": beat}))


def _refused(where: storage.Path, owner: str) -> ConfigError:
    return ConfigError(
        f"--workdir={where.parent}: another process is training there ({owner}); wait for it, stop "
        "it, or use another folder"
    )
