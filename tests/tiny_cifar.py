"""A few images in CIFAR's official layout, prepared as the real sets are."""

from __future__ import annotations

import pathlib

import numpy as np

from tgeo_jax.data import cifar

CLASSES = {"cifar10": 10, "cifar100": 100}
_FILES = {
    "cifar10": {"train": ["data_batch_1.bin"], "test": ["test_batch.bin"]},
    "cifar100": {"train": ["train.bin"], "test": ["test.bin"]},
}
_EMPTY = [f"data_batch_{number}.bin" for number in range(2, 6)]  # CIFAR-10 comes in five


def prepare(name: str, data_dir: str, *, train: int = 4, test: int = 1) -> None:
    """Writes so many images of each class, whose colour tells the class, in a random order."""
    random = np.random.RandomState(0)
    source = pathlib.Path(data_dir) / f"{name}_source"
    source.mkdir(parents=True)
    for split, count in (("train", train), ("test", test)):
        labels = random.permutation(np.repeat(np.arange(CLASSES[name]), count)).astype(np.uint8)
        colours = np.random.RandomState(1).randint(40, 216, (CLASSES[name], 3))[labels]
        noise = random.randint(-40, 40, (len(labels), 3, 1024))
        pixels = (colours[:, :, None] + noise).astype(np.uint8).reshape(len(labels), -1)
        columns = [labels[:, None], pixels]
        if name == "cifar100":
            columns.insert(0, labels[:, None] // 5)
        records = np.concatenate(columns, axis=1)
        parts = [records]
        files = list(_FILES[name][split])
        if name == "cifar10" and split == "train":
            files += _EMPTY
            parts = np.array_split(records, len(files))
        for file, part in zip(files, parts, strict=True):
            (source / file).write_bytes(part.tobytes())
    names = "\n".join(f"class_{number}" for number in range(CLASSES[name]))
    if name == "cifar10":
        (source / "batches.meta.txt").write_text(names)
    else:
        (source / "fine_label_names.txt").write_text(names)
        coarse = "\n".join(f"group_{number}" for number in range(20))
        (source / "coarse_label_names.txt").write_text(coarse)
    cifar.prepare(name, source, data_dir, digests={})
