"""Datasets too large for memory: records are decoded and cropped by workers as they are needed.

What a step sees is a function of (seed, step): the order is shuffled by index, every random number
belongs to a place in that order, and a run that starts again at step n begins to read there. It
depends neither on the number of workers nor on that of processes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import pathlib
import resource
import sys
from collections.abc import Generator, Mapping
from typing import Any

import grain
import jax
import numpy as np
import tensorflow_datasets as tfds
from absl import logging

from tgeo_jax.data import crops, fingerprints, sources
from tgeo_jax.data import workers as processes
from tgeo_jax.data.readable import Readable
from tgeo_jax.errors import ConfigError, DataError

_SUBSTITUTES = 64  # tried in the place of a corrupt image before giving up
_BUFFERED = processes.BUFFERED  # batches that a worker, or all threads together, decode ahead
_THREADS = 16


@dataclasses.dataclass(frozen=True)
class Records:
    """Encoded examples of a TFDS split; opened by each worker for itself.

    Attributes:
        name: a key of `sources.BUILDERS`.
        data_dir: TFDS folder.
        split: of the dataset.
        positions: which of its records, [N].
    """

    name: str
    data_dir: str
    split: str
    positions: np.ndarray

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Encoded `image`, `label`, and what else TFDS keeps of it."""
        position = int(self.positions[index])
        try:
            return _source(self.name, self.data_dir, self.split)[position]
        except Exception as error:  # of the reader of records, or a file that is gone
            raise DataError(
                f"data.name={self.name!r}: {self.split}[{position}] cannot be read ({error}); "
                "prepare the dataset again"
            ) from error

    def called(self, index: int) -> str:
        """What to call a record in a message: its file or id, and where it lies."""
        found = self[index]
        told = found.get("file_name", found.get("id", b"record"))
        return f"{told.decode()} ({self.name} {self.split}[{self.positions[index]}])"


@functools.cache
def _source(name: str, data_dir: str, split: str) -> Any:
    """One for each process: every file of it that was ever read stays open."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # ImageNet has 1,024, a usual limit
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    decoders = {"image": tfds.decode.SkipDecoding()}
    return sources.builder(name, data_dir).as_data_source(split=split, decoders=decoders)


@dataclasses.dataclass(frozen=True)
class Stream:
    """A split that is read as it is needed.

    Attributes:
        records: its examples.
        image_size: S, of the square images that come out.
        channels: C, 3 or (grey) 1.
        workers: processes that decode; 0 for threads of this one.
        max_corrupt: how many images may fail to decode before reading stops with an error. A
            process counts those that it met itself since it started.
    """

    records: Records
    image_size: int
    channels: int = 3
    workers: int = 0
    max_corrupt: int = 10
    _corrupt: dict[int, str] = dataclasses.field(default_factory=dict, init=False)

    def __len__(self) -> int:
        return len(self.records)

    @property
    def example(self) -> np.ndarray:
        """An image [1, S, S, C], for its shape and dtype."""
        return np.zeros((1, self.image_size, self.image_size, self.channels), np.uint8)

    @property
    def corrupt(self) -> tuple[str, ...]:
        """The images so far that could not be decoded."""
        return tuple(self._corrupt.values())

    def batches(
        self,
        seed: int,
        first_step: int,
        batch_size: int,
        *,
        crop: bool,
        shard: tuple[int, int] = (0, 1),
    ) -> Generator[tuple[np.ndarray, np.ndarray], None, None]:
        """Endless shuffled batches from some step on; every epoch has an order of its own.

        Args:
            seed: of the order and of the crops.
            first_step: the step whose batch comes first.
            batch_size: of this process.
            crop: random resized crops for training; otherwise the centre, as for evaluation.
            shard: which process this is, of how many. Of a global batch, the first process gets
                the first rows, and so on.

        Returns:
            (images [B, S, S, C] uint8, labels [B] int32), in the place of a corrupt image the next
            one of the split. Close it, or its workers run on.

        Raises:
            DataError: more corrupt images than `max_corrupt`, naming some.
        """
        order = grain.MapDataset.range(len(self)).seed(seed).shuffle().repeat()
        share = grain.MapDataset.source(_Share(order, batch_size, shard))
        decode = _Decode(self.records, self.image_size, self.channels, seed if crop else None)
        examples = share[first_step * batch_size :].map(decode)
        if self.workers:
            read = processes.read(examples.batch(batch_size), self.workers)
        else:
            read = self._by_threads(examples, batch_size)
        with contextlib.closing(iter(read)) as iterator:
            while True:
                batch = processes.following(iterator, self.workers)
                self._note(batch["corrupt"])
                yield batch["image"], batch["label"]

    def sweep(
        self, batch_size: int, shard: tuple[int, int] = (0, 1)
    ) -> Generator[tuple[np.ndarray, np.ndarray, np.ndarray], None, None]:
        """Every example once, in order: (images, labels, whether each is real), the last padded.

        A corrupt image is blank and counts as padding. Threads of this process decode: workers
        would have to be started for every pass.

        Args:
            batch_size: of every batch, in all processes together.
            shard: which process this is, of how many: it gets its rows of every batch.

        Raises:
            DataError: more corrupt images than `max_corrupt`, naming some.
        """
        process, count = shard
        rows, whole = batch_size // count, -(-len(self) // batch_size)
        own = np.arange(whole * batch_size).reshape(whole, count, rows)[:, process].ravel()
        decode = _Decode(self.records, self.image_size, self.channels, substitute=False)
        own = own[own < len(self)]
        read: Any = iter(())  # Grain has no dataset of nothing
        if len(own):
            examples = grain.MapDataset.source(own)
            decoded = examples.map(lambda index: decode((int(index), int(index))))
            read = iter(self._by_threads(decoded, rows))
        none: dict[str, Any] = {
            "image": self.example[:0],
            "label": np.zeros(0, np.int32),
            "corrupt": np.zeros(0, np.int64),
        }
        with contextlib.ExitStack() as stack:
            if len(own):
                stack.callback(read.close)
            for _ in range(whole):
                batch: dict[str, Any] = next(
                    read, none
                )  # of the last batch, the last processes may get none
                self._note(batch["corrupt"])
                missing = rows - len(batch["label"])
                if missing:
                    pad = ((0, missing), *((0, 0),) * 3)
                    batch = {
                        "image": np.pad(batch["image"], pad),
                        "label": np.pad(batch["label"], pad[0]),
                        "corrupt": np.pad(batch["corrupt"], pad[0]),
                    }
                yield batch["image"], batch["label"], batch["corrupt"] < 0

    def digest(self) -> str:
        """SHA-256 of which records of which version of the dataset these are; no pixel is read."""
        dataset = sources.builder(self.records.name, self.records.data_dir)
        info = f"{dataset.info.full_name} {self.records.split} {self.image_size}"
        return fingerprints.of([np.frombuffer(info.encode(), np.uint8), self.records.positions])

    def _by_threads(self, examples: grain.MapDataset, batch_size: int) -> grain.IterDataset:
        # Here, before all of them open it at once.
        _source(self.records.name, self.records.data_dir, self.records.split)
        options = grain.ReadOptions(_THREADS, _BUFFERED * batch_size)
        return examples.to_iter_dataset(options).batch(batch_size)

    def _note(self, corrupt_B: np.ndarray) -> None:
        for index in sorted(set(corrupt_B[corrupt_B >= 0].tolist()) - self._corrupt.keys()):
            self._corrupt[index] = self.records.called(index)
            logging.warning("Corrupt image skipped: %s", self._corrupt[index])
        if len(self._corrupt) > self.max_corrupt:
            named = [*self.corrupt[:5], *(["..."] if len(self._corrupt) > 5 else [])]
            raise DataError(
                f"data.max_corrupt={self.max_corrupt}: {len(self._corrupt)} images cannot be "
                f"decoded ({', '.join(named)}); prepare the dataset again, or allow more"
            )


@dataclasses.dataclass(frozen=True)
class StreamedDataset:
    """As `sources.Dataset`, of streams: of images, or of rows of a categorical table."""

    train: Readable
    validation: Readable
    test: Readable
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    vocabulary: tuple[int, ...] = ()
    feature_names: tuple[str, ...] = ()
    extra: Mapping[str, Readable] = dataclasses.field(default_factory=dict)
    verification: None = None

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def example(self) -> np.ndarray:
        """An image [1, S, S, C], or row [1, F], for its shape and dtype."""
        return self.train.example

    @property
    def corrupt(self) -> tuple[str, ...]:
        """The images so far that could not be decoded, of all splits."""
        return self.train.corrupt + self.validation.corrupt + self.test.corrupt

    def digest(self) -> str:
        """SHA-256 of which records are in which split."""
        extra = (self.extra[name] for name in sorted(self.extra))
        splits = (self.train, self.validation, self.test, *extra)
        return fingerprints.of([np.frombuffer(s.digest().encode(), np.uint8) for s in splits])


def load(
    name: str,
    data_dir: str = "",
    *,
    image_size: int,
    validation_fraction: float = 0.1,
    split_seed: int = 0,
    fraction: float = 1.0,
    mean: tuple[float, ...] = (),
    std: tuple[float, ...] = (),
    workers: int = 0,
    max_corrupt: int = 10,
) -> StreamedDataset:
    """A prepared dataset whose images are read from disk as they are needed.

    What is held out, and what `fraction` keeps of the rest, is chosen by position alone: a
    stratified choice would have to read every label first. TFDS shuffles records when it writes
    them.

    Args:
        name: a key of `sources.BUILDERS`.
        data_dir: TFDS folder; empty for TFDS's own default.
        image_size: S.
        validation_fraction: share of the training examples held out, in (0, 1).
        split_seed: which.
        fraction: share of the remaining training examples that is kept, in (0, 1].
        mean: for normalisation, by channel; may be empty for ImageNet alone.
        std: likewise.
        workers: processes that decode; 0 for threads of this one.
        max_corrupt: images of a split that may fail to decode.

    Returns:
        The dataset.

    Raises:
        ConfigError: an unknown dataset, or no normalisation for its channels.
        DataError: not prepared, with what prepares it, or prepared without one of its splits.
    """
    dataset = sources.builder(name, data_dir)
    sources.check_prepared(dataset, name, data_dir)
    data_dir = str(pathlib.Path(dataset.data_dir).absolute().parents[1])  # workers start elsewhere
    counts = {part: dataset.info.splits[part].num_examples for part in dataset.info.splits}
    test = "test" if name != "imagenet2012" else "validation"  # ImageNet's test labels are secret
    for split in ("train", test):
        if not counts.get(split):
            raise DataError(f"data.name={name!r}: {dataset.data_dir} holds no {split} split")
    order = np.random.RandomState(split_seed).permutation(counts["train"])
    held_out = math.ceil(validation_fraction * len(order))
    kept = order[held_out:][: max(round(fraction * (len(order) - held_out)), 1)]

    channels = dataset.info.features["image"].shape[-1]

    def stream(split: str, positions: np.ndarray) -> Stream:
        records = Records(name, data_dir, split, np.sort(positions))
        return Stream(records, image_size, channels, workers, max_corrupt)

    if name == "imagenet2012":
        usual_mean, usual_std = sources.IMAGENET_NORMALISATION
        mean, std = mean or usual_mean, std or usual_std
    for field, given in (("mean", mean), ("std", std)):
        if len(given) != channels:
            raise ConfigError(
                f"data.{field}={tuple(given)}: must hold one number for each channel, "
                f"{channels}: a streamed dataset is not read to find it"
            )
    return StreamedDataset(
        train=stream("train", kept),
        validation=stream("train", order[:held_out]),
        test=stream(test, np.arange(counts[test])),
        class_names=tuple(dataset.info.features["label"].names),
        mean=tuple(mean),
        std=tuple(std),
    )


@dataclasses.dataclass(frozen=True)
class _Share:
    """What comes where, for one process: (place in the order of all processes, index)."""

    order: grain.MapDataset
    rows: int  # of a global batch
    shard: tuple[int, int]

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, place: int) -> tuple[int, int]:
        step, row = divmod(place, self.rows)
        process, count = self.shard
        place = (step * count + process) * self.rows + row
        return place, int(self.order[place])


@dataclasses.dataclass(frozen=True)
class _Decode:
    """Encoded bytes to a square of pixels; a corrupt image is told, and replaced or left blank.

    Only what cannot be decoded is corrupt: where reading itself fails, no other image will do.
    """

    records: Records
    size: int
    channels: int
    seed: int | None = None  # of random crops; None: the centre
    substitute: bool = True

    def __call__(self, at: tuple[int, int]) -> dict[str, Any]:
        place, first = at
        rng = None if self.seed is None else np.random.default_rng((self.seed, place))
        for attempt in range(_SUBSTITUTES if self.substitute else 1):
            found = self.records[(first + attempt) % len(self.records)]
            try:
                pixels = crops.square(found["image"], self.size, self.channels, rng)
            except Exception:  # decoders raise whatever they like
                continue
            return _decoded(pixels, found["label"], first if attempt else -1)
        if self.substitute:
            raise DataError(
                f"data.name={self.records.name!r}: {_SUBSTITUTES} images from "
                f"{self.records.called(first)} on cannot be decoded; prepare the dataset again"
            )
        blank = np.zeros((self.size, self.size, self.channels), np.uint8)
        return _decoded(blank, found["label"], first)


def _decoded(pixels: np.ndarray, label: int, corrupt: int) -> dict[str, Any]:
    return {"image": pixels, "label": np.int32(label), "corrupt": np.int64(corrupt)}


def process_shard() -> tuple[int, int]:
    """Which process this is, of how many.

    Examples:
        >>> process_shard()
        (0, 1)
    """
    return jax.process_index(), jax.process_count()
