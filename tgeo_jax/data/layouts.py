"""What a table of rows is: its columns, its classes and how its published files are read."""

from __future__ import annotations

import dataclasses
import gzip
import pathlib
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from absl import logging

from tgeo_jax.errors import DataError

MISSING = np.iinfo(np.int64).min  # in a categorical column: an empty field, a value of its own
_NAMED = 20  # malformed rows that are named one by one
Row = tuple[np.ndarray, int]  # values, label
# A line -> (values, label); raises ValueError or LookupError where it is malformed.
Parse = Callable[[str], tuple[Sequence[float] | Sequence[int], int]]


@dataclasses.dataclass
class Content:
    """Rows by TFDS split, and what else is known of them once they are read.

    Attributes:
        splits: each is iterated once, in this order.
        about: JSON values; filled at the latest when the last row is read.
    """

    splits: Mapping[str, Iterable[Row]]
    about: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Tally:
    """Counts rows that cannot be used.

    Attributes:
        limit: how many of them may be skipped.
        count: how many were.

    Examples:
        >>> tally = Tally(limit=0)
        >>> tally.skip("log.csv", 7, "2 fields, expected 3")
        Traceback (most recent call last):
        tgeo_jax.errors.DataError: log.csv, line 7: 2 fields, expected 3; with it 1 malformed \
row, more than --max_malformed=0: damaged or another file
    """

    limit: int = 10
    count: int = 0

    def skip(self, path: str | pathlib.Path, line: int, reason: object) -> None:
        """Notes a malformed row.

        Raises:
            DataError: more of them than the limit.
        """
        self.count += 1
        if self.count > self.limit:
            rows = "row" if self.count == 1 else "rows"
            raise DataError(
                f"{path}, line {line}: {reason}; with it {self.count} malformed {rows}, more than "
                f"--max_malformed={self.limit}: damaged or another file"
            )
        if self.count <= _NAMED:
            logging.warning("Malformed row skipped: %s, line %d: %s", path, line, reason)


@dataclasses.dataclass(frozen=True)
class Layout:
    """A tabular dataset.

    Attributes:
        name: of the dataset.
        kind: `numeric`: rows of float64, scaled when they are loaded; `categorical`: rows of int64
            that only tell values apart.
        columns: their names; the files' own header may replace them (`about["columns"]`).
        class_names: K names.
        read: from the file or folder that a user names, lazily; raises DataError that says what is
            missing there.
        files: which files, for messages.
        description: of the dataset, for TFDS.
        citation: BibTeX.
        homepage: where the files come from.
        symbolic: numeric tables only: columns that hold an index in `about["values"][column]`, and
            are one-hot encoded when loaded.
        buckets: categorical tables only: how many of the first columns are counts, of which
            `fitting.buckets` makes values.
        version: of what is stored.
    """

    name: str
    kind: Literal["numeric", "categorical"]
    columns: tuple[str, ...]
    class_names: tuple[str, ...]
    read: Callable[[pathlib.Path, Tally], Content]
    files: str
    description: str
    citation: str
    homepage: str
    symbolic: tuple[str, ...] = ()
    buckets: int = 0
    version: str = "1.0.0"

    @property
    def dtype(self) -> type[np.float64] | type[np.int64]:
        return np.float64 if self.kind == "numeric" else np.int64


def find(source: pathlib.Path, names: Sequence[str]) -> pathlib.Path | None:
    """The first of some files that is there: in a folder or one below, as it is or gzipped.

    Args:
        source: a folder; a file stands for itself if it has one of the names.
        names: in order of preference.

    Returns:
        Its path, or None.

    Examples:
        >>> find(pathlib.Path("/nowhere"), ["train.txt"]) is None
        True
    """
    if source.is_file():
        return source if source.name.removesuffix(".gz") in names else None
    below = sorted(child for child in source.iterdir() if child.is_dir()) if source.is_dir() else []
    for name in names:
        for folder in (source, *below):
            for path in (folder / name, folder / f"{name}.gz"):
                if path.is_file():
                    return path
    return None


def needed(source: pathlib.Path, *names: str) -> pathlib.Path:
    """As `find`, but the file must be there.

    Raises:
        DataError: none of the names.

    Examples:
        >>> needed(pathlib.Path("/nowhere"), "train.txt", "train.csv")
        Traceback (most recent call last):
        tgeo_jax.errors.DataError: /nowhere: holds no train.txt (or train.csv)
    """
    path = find(source, names)
    if path is None:
        others = f" (or {', '.join(names[1:])})" if names[1:] else ""
        raise DataError(f"{source}: holds no {names[0]}{others}")
    return path


def numbered(path: pathlib.Path) -> Iterator[tuple[int, str]]:
    """The lines of a text file, gzipped or not, counted from 1, without those that are blank.

    Raises:
        DataError: a file that cannot be read to its end.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder) / "log.csv.gz"
        ...     _ = path.write_bytes(gzip.compress(b"a,1\\n\\nb,2\\n"))
        ...     list(numbered(path))
        [(1, 'a,1'), (3, 'b,2')]
    """
    try:
        with gzip.open(path, "rt", **_TEXT) if _is_gzipped(path) else path.open(**_TEXT) as file:
            for number, line in enumerate(file, 1):
                if stripped := line.rstrip("\r\n"):
                    yield number, stripped
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error}); damaged or another file") from error


def _is_gzipped(path: pathlib.Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


# What is not UTF-8 becomes a malformed row, not the end of the reading.
_TEXT: dict[str, Any] = {"encoding": "utf-8", "errors": "replace", "newline": "\n"}


def rows(
    path: pathlib.Path,
    tally: Tally,
    parse: Parse,
    dtype: type,
    *,
    header: bool = False,
    wanted: Callable[[int], bool] = lambda number: True,
) -> Iterator[Row]:
    """Parsed rows of a file; malformed ones are counted and left out.

    Args:
        path: of the file.
        tally: counts.
        parse: of a line.
        dtype: of the values.
        header: whether the first line is none.
        wanted: of which line numbers.

    Examples:
        >>> import tempfile
        >>> tally = Tally()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder) / "log.csv"
        ...     _ = path.write_text("value\\n7\\nseven\\n8\\n")
        ...     found = list(rows(path, tally, lambda line: ([int(line)], 0), int, header=True))
        >>> found, tally.count
        ([(array([7]), 0), (array([8]), 0)], 1)
    """
    for number, line in numbered(path):
        if (header and number == 1) or not wanted(number):
            continue
        try:
            values, label = parse(line)
            row: np.ndarray = np.array(values, dtype)
        except (ValueError, LookupError, OverflowError) as error:
            tally.skip(path, number, _reason(error))
            continue
        yield row, label


def _reason(error: Exception) -> str:
    return f"unknown value {error}" if isinstance(error, KeyError) else str(error)


def fields(line: str, separator: str, count: int | tuple[int, ...]) -> list[str]:
    """A line's fields, of which there must be a known number.

    Raises:
        ValueError: there are not.

    Examples:
        >>> fields("a,b", ",", 2)
        ['a', 'b']
    """
    found = line.split(separator)
    allowed = count if isinstance(count, tuple) else (count,)
    if len(found) not in allowed:
        raise ValueError(f"{len(found)} fields, expected {' or '.join(map(str, allowed))}")
    return found
