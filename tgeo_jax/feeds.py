"""Where dispatches get their data: splits on the device, or batches read as they are needed."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterator
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from tgeo_jax import distill, parallel, randomness
from tgeo_jax.data import sources, streaming
from tgeo_jax.dispatch import Resident
from tgeo_jax.randomness import Purpose
from tgeo_jax.state import Batch

Pair = tuple[np.ndarray, np.ndarray]  # images or rows, labels
Pairs = Generator[Pair, None, None]


class InMemory:
    """Splits that stay on the device; every dispatch gets the same."""

    streamed = False

    def __init__(self, data: Resident):
        self._data = data

    def chunk(self, step: int, num_steps: int) -> Resident:
        """The data of some consecutive steps."""
        del step, num_steps
        return self._data

    def close(self) -> None:
        """Nothing to end."""


class Streamed:
    """Batches of a streamed dataset, those of the outer loss too.

    Args:
        config: batch sizes.
        method: whether it needs outer batches.
        dataset: the streams.
        mesh: the devices.
        seed: of the one seed that trains.
    """

    streamed = True

    def __init__(
        self,
        config: ConfigDict,
        method: distill.Distillation,
        dataset: streaming.StreamedDataset,
        mesh: jax.sharding.Mesh,
        seed: int,
    ):
        self._method, self._seed = method, seed
        self._sizes = {"train": config.data.batch_size, "validation": config.meta.batch_size}
        self._splits = {"train": dataset.train, "validation": dataset.validation}
        self._sharding = parallel.steps_sharding(mesh)
        self._opened: dict[str, Pairs] = {}
        self._ahead: list[Pair] = []
        self._next_step = -1  # which the opened ones come to next

    def chunk(self, step: int, num_steps: int) -> Resident:
        """Reads the batches of some consecutive steps, [steps, B, ...]."""
        if step != self._next_step:
            self._open(step)
        self._next_step = step + num_steps
        wanted = num_steps - len(self._ahead)
        # The last prequential step looks at the batch after it, which the next chunk begins with.
        wanted += self._method.prequential
        read = self._ahead + list(itertools.islice(self._opened["train"], wanted))
        self._ahead = read[num_steps:]
        train = self._placed(read)
        if not self._method.meta_learned or self._method.prequential:
            return Resident(train, train)
        return Resident(train, self._placed(list(self._outer(step, num_steps))))

    def _outer(self, step: int, num_steps: int) -> Iterator[Pair]:
        """Outer batches; nothing is read for steps without a hypergradient, which ignore theirs."""
        size = self._sizes["validation"] // streaming.process_shard()[1]
        example = self._splits["validation"].example
        blank = np.zeros((size, *example.shape[1:]), example.dtype), np.zeros(size, np.int32)
        for current in range(step, step + num_steps):
            needed = current % self._method.meta_every == 0
            yield next(self._opened["validation"]) if needed else blank

    def close(self) -> None:
        """Ends the workers."""
        for opened in self._opened.values():
            opened.close()
        self._opened, self._ahead, self._next_step = {}, [], -1

    def _open(self, step: int) -> None:
        self.close()
        shard = streaming.process_shard()
        purposes = {"train": Purpose.TRAIN_ORDER, "validation": Purpose.VALIDATION_ORDER}
        # As many outer batches were read as there were steps with a hypergradient.
        first = {"train": step, "validation": -(-step // self._method.meta_every)}
        for name, split in self._splits.items():
            of_order = int(jax.random.bits(randomness.key(self._seed, 0, purposes[name])))
            size = self._sizes[name] // shard[1]
            self._opened[name] = split.batches(
                of_order, first[name], size, crop=name == "train", shard=shard
            )

    def _placed(self, read: list[Pair]) -> Batch:
        def put(arrays: tuple[np.ndarray, ...]) -> jax.Array:
            return jax.make_array_from_process_local_data(self._sharding, np.stack(arrays))

        images, labels = zip(*read, strict=True)
        return Batch(put(images), put(labels))


def placed(split: Any, sharding: Any) -> Any:
    """A split on the device; a stream stays what it is.

    Examples:
        >>> from tgeo_jax.data.sources import Split
        >>> split = Split(np.zeros((1, 2, 2, 1), np.uint8), np.zeros(1), np.zeros(1))
        >>> type(placed(split, jax.devices()[0])).__name__
        'Batch'
    """
    if not isinstance(split, sources.Split):
        return split
    found: Any = Batch(split.images, split.labels)  # type: ignore[arg-type]
    return parallel.put(found, sharding)
