"""Writing TFDS datasets without TensorFlow: what all our builders share."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds
from tensorflow_datasets.core.utils import tqdm_utils

from tgeo_jax.errors import DataError

INFO = "dataset_info.json"  # TFDS writes it last


def opened(builder_class: Any, data_dir: str) -> Any:
    """A builder of array_record files, prepared or not.

    Raises:
        DataError: prepared in a format that only TensorFlow reads.

    Examples:
        >>> from tgeo_jax.data import digits
        >>> opened(digits.Digits, "/nowhere").data_dir
        '/nowhere/digits/1.0.0'
    """
    try:
        return builder_class(data_dir=data_dir or None, file_format="array_record")
    except ValueError:  # prepared in another format, or in several
        dataset = builder_class(data_dir=data_dir or None)
    formats = sorted(known.value for known in dataset.info.available_file_formats())
    if "array_record" not in formats:
        raise DataError(
            f"{dataset.data_dir}: prepared as {', '.join(formats)}, which needs TensorFlow; "
            "use another data_dir, or delete the folder and prepare it again"
        )
    return dataset


def is_done(folder: pathlib.Path) -> bool:
    """Whether a dataset's folder is whole.

    Raises:
        DataError: it is there, but not whole.

    Examples:
        >>> is_done(pathlib.Path("/nowhere"))
        False
    """
    if (folder / INFO).exists():
        return True
    if folder.exists():
        raise DataError(f"{folder}: holds no {INFO}, so it is incomplete; delete the folder")
    return False


@contextlib.contextmanager
def alone(folder: pathlib.Path) -> Iterator[bool]:
    """Waits for other processes that prepare the same; gives whether there is still need to.

    Args:
        folder: that is to be prepared; what a killed preparation left beside it is removed.

    Examples:
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     folder = pathlib.Path(parent) / "1.0.0"
        ...     with alone(folder) as first:
        ...         folder.mkdir()
        ...     with alone(folder) as second:
        ...         first, second
        (True, False)
    """
    parent = folder.parent
    parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(parent, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if folder.exists():  # another process was first
            yield False
            return
        for leftover in parent.glob(f"incomplete.*_{folder.name}"):
            shutil.rmtree(leftover)  # of a preparation that was killed
        yield True
    finally:
        os.close(descriptor)


def write(writer: Any) -> None:
    """Lets a builder write its files; they appear when they are whole.

    Args:
        writer: from `opened`, with whatever its class reads from.

    Examples:
        >>> import io
        >>> from tgeo_jax.data import digits
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     dataset = opened(digits.Digits, folder)
        ...     with contextlib.redirect_stdout(io.StringIO()):    # TFDS says where
        ...         write(dataset)
        ...     is_done(pathlib.Path(dataset.data_dir))
        True
    """
    # TFDS makes folders for downloads even if there are none.
    with without_bars_of_tfds(), tempfile.TemporaryDirectory() as downloads:
        writer.download_and_prepare(download_dir=downloads)


@contextlib.contextmanager
def without_bars_of_tfds() -> Iterator[None]:
    """Hides TFDS's progress bars for a while."""
    shown = getattr(tqdm_utils, "_active", True)
    tfds.disable_progress_bar()
    try:
        yield
    finally:
        tfds.display_progress_bar(shown)
