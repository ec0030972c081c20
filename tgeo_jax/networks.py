"""Networks for a dataset: what of its inputs they need to know, and what does not go together."""

from __future__ import annotations

from typing import Any, Protocol

import flax.linen as nn
import numpy as np

from tgeo_jax import models


class Inputs(Protocol):
    """What a dataset says of its inputs; see `data.sources.Dataset`."""

    @property
    def num_classes(self) -> int:
        """K."""

    @property
    def example(self) -> np.ndarray:
        """One raw input, with its batch axis."""

    @property
    def vocabulary(self) -> tuple[int, ...]:
        """Values of each field of a table of categories; empty for all others."""


def build(
    name: str, dataset: Inputs, *, precision: str, remat: bool = False, **options: Any
) -> nn.Module:
    """`models.build` with the classes and the vocabulary of a dataset.

    Args:
        name: a key of `models.MODELS`.
        dataset: what the network will see.
        precision: as there.
        remat: as there.
        **options: as there.

    Raises:
        ValueError: as there, or a network for images that would get rows of a table.

    Examples:
        >>> from types import SimpleNamespace
        >>> rows = np.zeros((1, 2), np.float32)
        >>> table = SimpleNamespace(num_classes=2, example=rows, vocabulary=())
        >>> build("cnn", table, precision="float32")
        Traceback (most recent call last):
        ...
        ValueError: model 'cnn' looks at images, and this dataset holds rows of a table; use 'mlp' \
or 'row_encoder'
    """
    module = models.build(
        name,
        dataset.num_classes,
        precision=precision,
        remat=remat,
        vocabulary=dataset.vocabulary,
        **options,
    )
    if dataset.example.ndim == 2 and name != "mlp" and name not in models.TABLES:
        raise ValueError(
            f"model {name!r} looks at images, and this dataset holds rows of a table; use 'mlp' or "
            "'row_encoder'"
        )
    return module


def example(dataset: Inputs) -> np.ndarray:
    """One input as networks get it: pixels as float32, rows of a table as they are.

    Examples:
        >>> from types import SimpleNamespace
        >>> example(SimpleNamespace(example=np.zeros((1, 8, 8, 1), np.uint8))).dtype
        dtype('float32')
        >>> example(SimpleNamespace(example=np.zeros((1, 2), np.int32))).dtype
        dtype('int32')
    """
    found = dataset.example
    return found if np.issubdtype(found.dtype, np.signedinteger) else found.astype(np.float32)
