"""Prepared TFDS datasets as arrays in memory, without TensorFlow."""

from __future__ import annotations

import dataclasses
import io
import pathlib
from collections.abc import Callable

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from tgeo_jax.data import splits
from tgeo_jax.errors import ConfigError, DataError, nearest


@dataclasses.dataclass(frozen=True)
class Split:
    """Images [N, H, W, C] (uint8), labels [N] (int32), and indices in the TFDS split [N] (int32).

    The index counts examples in the order of their TFDS ids; it does not depend on what is held
    out of the split.
    """

    images: np.ndarray
    labels: np.ndarray
    ids: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: np.ndarray) -> Split:
        """The examples at these indices, in that order."""
        return Split(self.images[indices], self.labels[indices], self.ids[indices])


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A dataset ready for a run: the validation split is held out of the training split.

    Attributes:
        train: what the inner loss sees.
        validation: what the outer loss and model selection see.
        test: for reporting only.
        class_names: K names.
        mean: of the training pixels in [0, 1], by channel.
        std: likewise.
    """

    train: Split
    validation: Split
    test: Split
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


def _digits() -> type[tfds.core.DatasetBuilder]:
    from tgeo_jax.data.digits import Digits  # importing a builder registers it with TFDS

    return Digits


BUILDERS: dict[str, Callable[[], type[tfds.core.DatasetBuilder]]] = {"digits": _digits}


def builder(name: str, data_dir: str = "") -> tfds.core.DatasetBuilder:
    """The TFDS builder of that name, prepared or not.

    Args:
        name: a key of `BUILDERS`.
        data_dir: TFDS folder; empty for TFDS's own default.

    Returns:
        A builder whose files are array_record, readable without TensorFlow.

    Raises:
        ConfigError: an unknown dataset, with the nearest name.

    Examples:
        >>> builder("digits", "/nowhere").info.features["image"].shape
        (8, 8, 1)
    """
    if name not in BUILDERS:
        raise ConfigError(f"data.name={name!r}: unknown dataset{nearest(name, BUILDERS)}")
    return BUILDERS[name]()(data_dir=data_dir or None, file_format="array_record")


def is_prepared(dataset: tfds.core.DatasetBuilder) -> bool:
    """Whether a builder's files are there and complete.

    Examples:
        >>> is_prepared(builder("digits", "/nowhere"))
        False
    """
    return (pathlib.Path(dataset.data_dir) / "dataset_info.json").exists()


def prepare(name: str, data_dir: str = "") -> pathlib.Path:
    """Writes a dataset's files unless they are there already.

    Args:
        name: a key of `BUILDERS`.
        data_dir: TFDS folder; empty for TFDS's own default.

    Returns:
        The folder that holds the files.
    """
    dataset = builder(name, data_dir)
    if not is_prepared(dataset):
        dataset.download_and_prepare()
    return pathlib.Path(dataset.data_dir)


def load(
    name: str,
    data_dir: str = "",
    *,
    validation_fraction: float = 0.1,
    split_seed: int = 0,
    label_noise: float = 0.0,
) -> Dataset:
    """Reads a prepared dataset and holds a stratified validation split out of its training split.

    Args:
        name: a key of `BUILDERS`.
        data_dir: TFDS folder; empty for TFDS's own default.
        validation_fraction: share of the training examples held out, in (0, 1).
        split_seed: which examples are held out and which labels are corrupted.
        label_noise: share of training labels replaced by another class; validation and test
            labels stay as they are.

    Returns:
        The dataset, in memory.

    Raises:
        ConfigError: an unknown dataset.
        DataError: not prepared (with the command that prepares it), or a class without examples
            in one of the splits.
    """
    dataset = builder(name, data_dir)
    if not is_prepared(dataset):
        option = f" --data_dir={data_dir}" if data_dir else ""
        raise DataError(
            f"data.name={name!r}: not prepared in {dataset.data_dir}; run\n"
            f"  python -m experiments.prepare --dataset={name}{option}"
        )
    whole, test = (_read(dataset, split) for split in ("train", "test"))
    class_names = tuple(dataset.info.features["label"].names)
    train_indices, validation_indices = splits.stratified(
        whole.labels, validation_fraction, split_seed, len(class_names)
    )
    train = whole.take(train_indices)
    labels = splits.corrupt_labels(train.labels, label_noise, split_seed, len(class_names))
    pixels = train.images.reshape(-1, train.images.shape[-1]) / np.float64(255)
    return Dataset(
        train=dataclasses.replace(train, labels=labels),
        validation=whole.take(validation_indices),
        test=test,
        class_names=class_names,
        mean=tuple(pixels.mean(0).tolist()),
        std=tuple(pixels.std(0).tolist()),
    )


def _read(dataset: tfds.core.DatasetBuilder, split: str) -> Split:
    source = dataset.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})
    examples = [source[index] for index in range(len(source))]
    # By id, so that the order does not depend on how TFDS shuffled the records when writing.
    examples.sort(key=lambda example: example["id"])
    return Split(
        np.stack([_decode(example["image"]) for example in examples]),
        np.asarray([example["label"] for example in examples], np.int32),
        np.arange(len(examples), dtype=np.int32),
    )


def _decode(png: bytes) -> np.ndarray:
    """Pixels [H, W, C]; grey images get their one channel."""
    pixels = np.asarray(Image.open(io.BytesIO(png)))
    return pixels if pixels.ndim == 3 else pixels[..., None]
