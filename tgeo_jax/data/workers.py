"""Worker processes that decode: how they start, hand over and end."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from typing import Any

import grain
from absl import flags

from tgeo_jax.errors import ConfigError, DataError

BUFFERED = 2  # batches that a worker decodes ahead


def read(batches: grain.MapDataset, workers: int) -> grain.IterDataset:
    """Batches in their order, made by worker processes that end with this one.

    Args:
        batches: picklable.
        workers: how many processes.
    """
    if not flags.FLAGS.is_parsed():  # outside of a command, Grain's own are not, and it asks
        flags.FLAGS.mark_as_parsed()
    read = batches.to_iter_dataset(grain.ReadOptions(num_threads=0))
    options = grain.MultiprocessingOptions(workers, per_worker_buffer_size=BUFFERED)
    return read.mp_prefetch(options, _end_with_parent)


def following(iterator: Any, workers: int) -> Any:
    """The next batch.

    Args:
        iterator: of `read`, or of threads.
        workers: how many processes; 0: threads.

    Raises:
        DataError: a worker ended by itself.
    """
    try:
        return next(iterator)
    except RuntimeError as error:
        if not workers:
            raise
        raise DataError(
            f"data.workers={workers}: a worker process ended ({error}); where memory or "
            "/dev/shm is short (docs/data.md), use fewer workers, or 0 for threads"
        ) from error


def check_shared_memory(workers: int, batch_bytes: int, free: int | None = None) -> None:
    """Checks that the batches which workers keep ahead fit where they hand them over.

    Args:
        workers: processes, of all streams together.
        batch_bytes: of the larger batch.
        free: bytes; by default those of /dev/shm, where there is one.

    Raises:
        ConfigError: they do not.

    Examples:
        >>> check_shared_memory(1, 10, free=20)
        Traceback (most recent call last):
        ...
        tgeo_jax.errors.ConfigError: data.workers: 1 worker processes keep batches of 30 bytes in \
/dev/shm, which has 20 free; use fewer, or 0 for threads, or enlarge it (docker run --shm-size)
    """
    if free is None:
        if not os.path.isdir("/dev/shm"):
            return
        found = os.statvfs("/dev/shm")
        free = found.f_bavail * found.f_frsize
    needed = workers * (BUFFERED + 1) * batch_bytes
    if needed > free:
        raise ConfigError(
            f"data.workers: {workers} worker processes keep batches of {needed:,} bytes in "
            f"/dev/shm, which has {free:,} free; use fewer, or 0 for threads, or enlarge it "
            "(docker run --shm-size)"
        )


def _end_with_parent(worker: int, workers: int) -> None:
    """Nobody else ends a worker whose parent was killed; Ctrl-C is for the parent to handle."""
    del worker, workers
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def wait() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
