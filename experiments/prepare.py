"""Prepares a dataset for training: `python -m experiments.prepare --dataset=digits`.

CIFAR is prepared from its official binary version, downloaded beforehand:
`python -m experiments.prepare --dataset=cifar100 --source=cifar-100-binary.tar.gz`. So are the
faces of ORL, `--dataset=orl_faces --source=orl_faces.tar.gz`, folders of faces, and tables from the
folder of their published files: `python -m experiments.prepare --dataset=nsl_kdd --source=FOLDER`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import tensorflow_datasets as tfds
from absl import flags

from experiments import commandline
from tgeo_jax.data import faces, sources, tables

_DATASET = flags.DEFINE_string("dataset", "", f"One of: {', '.join(sources.BUILDERS)}.")
_DATA_DIR = flags.DEFINE_string("data_dir", "", "TFDS folder; TFDS's own default if empty.")
_SOURCE = flags.DEFINE_string(
    "source",
    "",
    "CIFAR's official binary archive (.tar.gz, .tar, .tar.xz), or its unpacked folder; ORL's "
    "archive or folder; of folders of faces, one with train/, evaluation/ and pairs.txt; of a "
    "table, the folder of its published files.",
)
_MAX_MALFORMED = flags.DEFINE_integer(
    "max_malformed",
    10,
    "Rows of a table, or training images of a face set, that may be skipped with a warning.",
    lower_bound=0,
)


def main(argv: Sequence[str]) -> None:
    del argv
    name, data_dir, limit = _DATASET.value, _DATA_DIR.value, _MAX_MALFORMED.value
    folder = sources.prepare(name, data_dir, _SOURCE.value, max_malformed=limit)
    print(f"Prepared: {folder}")
    dataset = sources.builder(name, data_dir)
    if name in tables.LAYOUTS:
        print(told_of_table(dataset))
        return
    if name in faces.NAMES:
        print(faces.told(dataset))
    for split in dataset.info.splits:
        print(f"{split}: {dataset.info.splits[split].num_examples:,} images")
    if None in dataset.info.features["image"].shape:
        return  # photographs of all sizes: too many for memory
    train, test = (sources.read(dataset, split) for split in ("train", "test"))
    for which, split in (("train", train), ("test", test)):
        print(f"{which}: SHA-256 of pixels and labels {digest(split)}")
    mean, std = channel_statistics(train.images)
    print("train: mean", *(f"{value:.8f}" for value in mean))
    print("train: std ", *(f"{value:.8f}" for value in std))


def told_of_table(dataset: tfds.core.DatasetBuilder) -> str:
    """What to compare of a prepared table: rows, classes, what was skipped or is not finite.

    Args:
        dataset: prepared, one of `tables.LAYOUTS`.

    Examples:
        >>> from types import SimpleNamespace
        >>> features = {"label": SimpleNamespace(names=["rest", "click"])}
        >>> info = SimpleNamespace(metadata={"malformed": 2}, splits=["test"], features=features)
        >>> empty = SimpleNamespace(name="frappe", info=info, as_data_source=lambda **options: [])
        >>> print(told_of_table(empty))  # doctest: +ELLIPSIS
        test: 0 rows (rest 0, click 0)
        test: SHA-256 of rows and labels e3b0c44298fc1c14...
        malformed rows skipped: 2
    """
    about = dict(dataset.info.metadata or {})
    names = dataset.info.features["label"].names
    lines = [about["note"]] if "note" in about else []
    for name in dataset.info.splits:
        found, labels = hashlib.sha256(), [np.zeros(0, "<i4")]
        for rows, some in tables.pieces(dataset, name):  # a log may be larger than memory
            found.update(np.ascontiguousarray(rows).data)
            labels.append(some.astype("<i4"))
        labels_N = np.concatenate(labels)
        found.update(labels_N.data)
        counts = np.bincount(labels_N, minlength=len(names))
        each = ", ".join(f"{label} {n:,}" for label, n in zip(names, counts, strict=True))
        lines.append(f"{name}: {len(labels_N):,} rows ({each})")
        lines.append(f"{name}: SHA-256 of rows and labels {found.hexdigest()}")
    lines.append(f"malformed rows skipped: {about['malformed']}")
    for column, counts in about.get("not_finite", {}).items():
        each = ", ".join(f"{n} {kind}" for kind, n in counts.items())
        lines.append(f"not finite in {column}: {each}")
    return "\n".join(lines)


def digest(split: sources.Split) -> str:
    """SHA-256 of the pixels (of a table, its raw rows) and then the labels, little-endian.

    Args:
        split: examples in the order of their ids.

    Returns:
        64 hexadecimal digits.

    Examples:
        >>> digest(sources.Split(np.zeros((1, 1, 1, 1), np.uint8), np.zeros(1), np.zeros(1)))[:12]
        '8855508aade1'
    """
    found = hashlib.sha256(np.ascontiguousarray(split.images).data)
    found.update(np.ascontiguousarray(split.labels, "<i4").data)
    return found.hexdigest()


def channel_statistics(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation by channel of pixels in [0, 1].

    Args:
        images: [N, H, W, C], uint8.

    Returns:
        Two arrays [C], float64.

    Examples:
        >>> channel_statistics(np.array([0, 255], np.uint8).reshape(1, 2, 1, 1))
        (array([0.5]), array([0.5]))
    """
    # A histogram is exact and needs no copy of the images as floats.
    counts = np.stack(
        [np.bincount(images[..., c].ravel(), minlength=256) for c in range(images.shape[-1])]
    )
    share = counts / counts.sum(1, keepdims=True)
    levels = np.arange(256) / 255
    mean = share @ levels
    return mean, np.sqrt((share * (levels - mean[:, None]) ** 2).sum(1))


if __name__ == "__main__":
    commandline.run(main)
