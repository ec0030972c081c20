"""What a run asks of a split that is read as it is needed, of images or of rows."""

from __future__ import annotations

from collections.abc import Generator
from typing import Protocol

import numpy as np


class Readable(Protocol):
    """See `streaming.Stream` and `row_streaming.RowStream`."""

    def __len__(self) -> int:
        """N examples."""

    @property
    def example(self) -> np.ndarray:
        """One input with its batch axis, for its shape and dtype."""

    @property
    def corrupt(self) -> tuple[str, ...]:
        """Names of what could not be decoded so far."""

    def batches(
        self,
        seed: int,
        first_step: int,
        batch_size: int,
        *,
        crop: bool,
        shard: tuple[int, int] = (0, 1),
    ) -> Generator[tuple[np.ndarray, np.ndarray], None, None]:
        """Endless shuffled batches (inputs, labels) from some step on."""

    def sweep(
        self, batch_size: int, shard: tuple[int, int] = (0, 1)
    ) -> Generator[tuple[np.ndarray, np.ndarray, np.ndarray], None, None]:
        """Every example once, in order: (inputs, labels, whether each is real)."""

    def digest(self) -> str:
        """SHA-256 of which examples these are."""
