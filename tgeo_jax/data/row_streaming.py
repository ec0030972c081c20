"""Categorical tables too large for memory: rows are read and hashed as they are needed.

As of streamed images (see `streaming`), what a step sees is a function of (seed, step), whatever
the number of workers and processes. Which rows are held out and in which order they come is
computed from their places, so that nothing is kept for each row but the 32 bytes of the reader's
own index.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import pathlib
import sys
from collections.abc import Generator
from typing import Any

import grain
import numpy as np
from array_record.python import array_record_module

from tgeo_jax.data import fingerprints, fitting, records, shuffling, sources, streaming, tables
from tgeo_jax.data import workers as processes
from tgeo_jax.errors import DataError

_THREADS = 4  # that read ahead; two read less on two cores
_HELD_OUT, _EPOCH = 1, 2  # orders of their own
_OPTIONS = "readahead_buffer_size:0"  # made for reading at random


@dataclasses.dataclass(frozen=True)
class Rows:
    """Stored rows of a TFDS split; opened by each process for itself.

    Attributes:
        name: a key of `tables.LAYOUTS`.
        data_dir: TFDS folder.
        split: of the table.
    """

    name: str
    data_dir: str
    split: str

    def __len__(self) -> int:
        return int(_opened(self.name, self.data_dir, self.split)[0][-1])

    def read(self, positions_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Raw rows [B, F] int64 and labels [B] int32 at these places of the split.

        Raises:
            DataError: damaged files, or files that are gone.
        """
        layout = tables.LAYOUTS[self.name]
        try:
            starts, readers = _opened(self.name, self.data_dir, self.split)
            found: list[bytes] = [b""] * len(positions_B)
            file_B = np.searchsorted(starts, positions_B, side="right") - 1
            for file in np.unique(file_B):
                places = np.flatnonzero(file_B == file)
                some = readers[file].read((positions_B[places] - starts[file]).tolist())
                for place, record in zip(places.tolist(), some, strict=True):
                    found[place] = record
            return records.parsed(found, len(layout.columns), layout.dtype)
        except Exception as error:  # of the reader of records, or a file that is gone
            raise DataError(
                f"data.name={self.name!r}: rows of the {self.split} split cannot be read "
                f"({error}); prepare the dataset again"
            ) from error


@functools.cache
def _opened(name: str, data_dir: str, split: str) -> tuple[np.ndarray, list[Any]]:
    """Where each file's rows begin, and the end of the last; a reader for each file."""
    paths = tables.builder(name, data_dir).info.splits[split].filepaths
    readers = [array_record_module.ArrayRecordReader(str(path), _OPTIONS) for path in paths]
    return np.cumsum([0, *(reader.num_records() for reader in readers)]), readers


@dataclasses.dataclass(frozen=True)
class Part:
    """Some records of a split, without a list of them.

    Attributes:
        total: records of the split.
        first: place of the part's first record in the order that `seed` gives to all of them.
        count: of its records, which follow.
        seed: None for the order in which they are stored.
    """

    total: int
    first: int
    count: int
    seed: int | None = None

    def positions(self, indices_B: np.ndarray) -> np.ndarray:
        """Where in the split the records of these indices in [0, count) are, int64.

        Examples:
            >>> both = [Part(5, 0, 2, seed=0), Part(5, 2, 3, seed=0)]
            >>> sorted(np.concatenate([p.positions(np.arange(p.count)) for p in both]).tolist())
            [0, 1, 2, 3, 4]
        """
        places_B = self.first + np.asarray(indices_B, np.int64)
        if self.seed is None:
            return places_B
        return shuffling.permuted(shuffling.keys(_HELD_OUT, self.seed), places_B, self.total)


@dataclasses.dataclass(frozen=True)
class RowStream:
    """A split of a categorical table that is read as it is needed.

    Attributes:
        rows: of the TFDS split.
        part: which of them.
        hash_buckets: ids of each field; see `fitting.hashed`.
        workers: processes that read; 0 for threads of this one.
    """

    rows: Rows
    part: Part
    hash_buckets: int
    workers: int = 0

    def __len__(self) -> int:
        return self.part.count

    @property
    def example(self) -> np.ndarray:
        """A row [1, F] of ids, for its shape and dtype."""
        return np.zeros((1, len(tables.LAYOUTS[self.rows.name].columns)), np.int32)

    @property
    def corrupt(self) -> tuple[str, ...]:
        """None: what is malformed was left out when the table was prepared."""
        return ()

    def batches(
        self,
        seed: int,
        first_step: int,
        batch_size: int,
        *,
        crop: bool = False,
        shard: tuple[int, int] = (0, 1),
    ) -> Generator[tuple[np.ndarray, np.ndarray], None, None]:
        """Endless shuffled batches from some step on; every epoch has an order of its own.

        Args:
            seed: of the order.
            first_step: the step whose batch comes first.
            batch_size: of this process.
            crop: without effect, rows have no crops; here because images' streams have it.
            shard: which process this is, of how many. Of a global batch, the first process gets
                the first rows, and so on.

        Returns:
            (ids [B, F] int32, labels [B] int32). Close it, or its workers run on.

        Raises:
            DataError: rows that cannot be read.
        """
        del crop
        every = grain.MapDataset.source(_Batches(self, seed, batch_size, shard))
        steps = every[first_step:]
        read = processes.read(steps, self.workers) if self.workers else self._by_threads(steps)
        with contextlib.closing(iter(read)) as iterator:
            while True:
                yield processes.following(iterator, self.workers)

    def sweep(
        self, batch_size: int, shard: tuple[int, int] = (0, 1)
    ) -> Generator[tuple[np.ndarray, np.ndarray, np.ndarray], None, None]:
        """Every row once, in order: (ids, labels, whether each is real), the last batch padded.

        Threads of this process read: workers would have to be started for every pass.

        Args:
            batch_size: of every batch, in all processes together.
            shard: which process this is, of how many: it gets its rows of every batch.

        Raises:
            DataError: rows that cannot be read.
        """
        process, count = shard
        own = batch_size // count

        def padded(index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            start = index * batch_size + process * own
            real = max(min(len(self) - start, own), 0)
            ids = np.zeros((own, self.example.shape[1]), np.int32)
            labels = np.zeros(own, np.int32)
            ids[:real], labels[:real] = self.take(np.arange(start, start + real))
            return ids, labels, np.arange(own) < real

        whole = grain.MapDataset.range(-(-len(self) // batch_size)).map(padded)
        with contextlib.closing(iter(self._by_threads(whole))) as batches:
            yield from batches

    def take(self, indices_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ids [B, F] and labels [B] of the rows at these indices in [0, N)."""
        rows, labels = self.rows.read(self.part.positions(indices_B))
        return fitting.hashed(
            rows, tables.LAYOUTS[self.rows.name].buckets, self.hash_buckets
        ), labels

    def digest(self) -> str:
        """SHA-256 of which rows of which version of the table these are; no row is read."""
        info = tables.builder(self.rows.name, self.rows.data_dir).info
        text = f"{info.full_name} {info.dataset_size} {self.rows.split} {self.part} "
        return fingerprints.of(np.frombuffer(f"{text}{self.hash_buckets}".encode(), np.uint8))

    def _by_threads(self, batches: grain.MapDataset) -> grain.IterDataset:
        len(self.rows)  # opened here, before all threads do so at once
        return batches.to_iter_dataset(grain.ReadOptions(_THREADS, processes.BUFFERED * _THREADS))


@dataclasses.dataclass(frozen=True)
class _Batches:
    """Which rows come in which step, for one process."""

    stream: RowStream
    seed: int
    size: int
    shard: tuple[int, int]

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        process, count = self.shard
        places_B = (step * count + process) * self.size + np.arange(self.size)
        epoch_B, place_B = np.divmod(places_B, len(self.stream))
        indices_B = np.empty_like(place_B)
        for epoch in np.unique(epoch_B).tolist():  # a batch may begin the next one
            here = epoch_B == epoch
            keys = shuffling.keys(_EPOCH, self.seed, epoch)
            indices_B[here] = shuffling.permuted(keys, place_B[here], len(self.stream))
        return self.stream.take(indices_B)


def load(
    name: str,
    data_dir: str = "",
    *,
    validation_fraction: float = 0.1,
    split_seed: int = 0,
    fraction: float = 1.0,
    part: str = "all",
    teacher_fraction: float = 0.7,
    hash_buckets: int = 65536,
    workers: int = 0,
) -> streaming.StreamedDataset:
    """A prepared categorical table whose rows are read from disk as they are needed.

    What is held out, what is the teacher's and the student's, and what `fraction` keeps, is chosen
    by place in one random order of the training rows: first what is held out, then the teacher's
    part, then the student's. A stratified choice would have to read every label first.

    Args:
        name: a key of `tables.LAYOUTS` of a categorical table.
        data_dir: TFDS folder; empty for TFDS's own default.
        validation_fraction: share of the training rows held out, in (0, 1).
        split_seed: which.
        fraction: share of the remaining training rows, or of the part, that is kept, in (0, 1].
        part: `teacher` or `student` for one of two disjoint parts; `all` for both.
        teacher_fraction: the teacher's share, in (0, 1).
        hash_buckets: ids of each field, the missing one counted.
        workers: processes that read; 0 for threads of this one.

    Returns:
        The dataset; its vocabulary is `hash_buckets` for every column.

    Raises:
        DataError: not prepared, with what prepares it, or prepared with too few rows.
    """
    dataset = sources.builder(name, data_dir)
    sources.check_prepared(dataset, name, data_dir)
    data_dir = str(pathlib.Path(dataset.data_dir).absolute().parents[1])  # workers start elsewhere
    counts = {split: len(Rows(name, data_dir, split)) for split in dataset.info.splits}
    total = counts["train"]
    held_out = math.ceil(validation_fraction * total)
    left = total - held_out
    of_teacher = round(teacher_fraction * left)
    first, count = {
        "all": (0, left),
        "teacher": (0, of_teacher),
        "student": (of_teacher, left - of_teacher),
    }[part]
    if not count:
        raise DataError(
            f"data.part={part!r}: of {total} training rows none is left for it; change "
            "data.validation_fraction or data.teacher_fraction"
        )
    count = max(round(fraction * count), 1)

    def stream(split: str, chosen: Part) -> RowStream:
        return RowStream(Rows(name, data_dir, split), chosen, hash_buckets, workers)

    def whole(split: str) -> RowStream:
        return stream(split, Part(counts[split], 0, counts[split]))

    # "validation" is what is held out.
    others = {
        split if split.startswith("test") else f"test_{split}": split
        for split in sorted(set(counts) - {"train", "test"})
    }
    columns = tables.LAYOUTS[name].columns
    return streaming.StreamedDataset(
        train=stream("train", Part(total, held_out + first, count, split_seed)),
        validation=stream("train", Part(total, 0, held_out, split_seed)),
        test=whole("test"),
        class_names=tuple(dataset.info.features["label"].names),
        mean=(),
        std=(),
        vocabulary=(hash_buckets,) * len(columns),
        feature_names=columns,
        extra={called: whole(split) for called, split in others.items()},
    )
