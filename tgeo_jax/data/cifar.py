"""CIFAR-10 and CIFAR-100 from the official files: TFDS's own datasets, without TensorFlow.

TFDS's builders cannot prepare them without TensorFlow, but they read what is prepared here: name,
version, features, ids, keys and order of the records are theirs; images are stored as PNG.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import lzma
import pathlib
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.image_classification import cifar as originals
from tqdm import tqdm

from tgeo_jax.data import preparing
from tgeo_jax.errors import ConfigError, DataError, nearest

_PIXELS = 3 * 32 * 32


@dataclasses.dataclass(frozen=True)
class _Layout:
    """The official binary version: a record is one byte per label, then R, G and B planes.

    Attributes:
        url: of the archive.
        files: by TFDS split.
        records: in the files of a split, each.
        names: file of the class names by feature, in the order of a record's label bytes.
        classes: their numbers, in the same order.
        digests: MD5 by file; the archive's own stands under its name.
    """

    url: str
    files: dict[str, tuple[str, ...]]
    records: dict[str, int]
    names: dict[str, str]
    classes: tuple[int, ...]
    digests: dict[str, str]

    @property
    def archive(self) -> str:
        return self.url.rpartition("/")[2]

    @property
    def all_files(self) -> tuple[str, ...]:
        return (*self.files["train"], *self.files["test"], *self.names.values())


_LAYOUTS = {
    "cifar10": _Layout(
        url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        files={
            "train": tuple(f"data_batch_{number}.bin" for number in range(1, 6)),
            "test": ("test_batch.bin",),
        },
        records={"train": 10_000, "test": 10_000},
        names={"label": "batches.meta.txt"},
        classes=(10,),
        digests={"cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530"},
    ),
    "cifar100": _Layout(
        url="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
        files={"train": ("train.bin",), "test": ("test.bin",)},
        records={"train": 50_000, "test": 10_000},
        names={"coarse_label": "coarse_label_names.txt", "label": "fine_label_names.txt"},
        classes=(20, 100),
        digests={
            "train.bin": "6172c7755cfe09b2fe270c85cebc1b15",
            "test.bin": "4499cfba6c016c1be1438163640a0898",
        },
    ),
}
NAMES = tuple(_LAYOUTS)


def builder(name: str, data_dir: str = "") -> tfds.core.DatasetBuilder:
    """TFDS's own builder of a set, prepared or not.

    Args:
        name: one of `NAMES`.
        data_dir: TFDS folder; empty for TFDS's own default.

    Returns:
        A builder whose files are array_record, whoever prepared them.

    Raises:
        ConfigError: an unknown name.
        DataError: prepared in a format that only TensorFlow reads.

    Examples:
        >>> builder("cifar100", "/nowhere").info.full_name
        'cifar100/3.0.2'
    """
    if name not in _LAYOUTS:
        raise ConfigError(f"data.name={name!r}: unknown CIFAR set{nearest(name, NAMES)}")
    own = {"cifar10": originals.Cifar10, "cifar100": originals.Cifar100}
    return preparing.opened(own[name], data_dir)


def prepare(
    name: str,
    source: str | pathlib.Path,
    data_dir: str = "",
    *,
    digests: Mapping[str, str] | None = None,
) -> pathlib.Path:
    """Writes a set's TFDS files from the official binary version, unless they are there already.

    Nothing is written before the source is checked. CIFAR-100's two data files have official
    digests. For CIFAR-10 only the archive has one: a .tar.gz is compared with it, while a folder
    (or another kind of archive) is checked for file sizes, numbers of records and label range.

    Args:
        name: one of `NAMES`.
        source: the archive (.tar.gz, .tar, .tar.xz), or a folder that holds its files or the
            folder of its files. May be empty if the set is prepared already.
        data_dir: TFDS folder; empty for TFDS's own default.
        digests: MD5 by file name instead of the official ones; the number of records is then free.

    Returns:
        The folder that holds the files.

    Raises:
        ConfigError: an unknown name.
        DataError: the source is missing, is not the binary version, or is damaged.

    Examples:
        >>> prepare("cifar10", "/nowhere/x.tar.gz", "/nowhere")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        tgeo_jax.errors.DataError: /nowhere/x.tar.gz: no such file or folder; download https://...
    """
    folder = pathlib.Path(builder(name, data_dir).data_dir)
    if preparing.is_done(folder):
        return folder
    content = _checked(name, source, data_dir, digests)
    with preparing.alone(folder) as needed:
        if needed:
            _write(name, content, data_dir)
    return folder


# Reading the source.


@dataclasses.dataclass(frozen=True)
class _Content:
    """Records [N, labels + pixels] (uint8) by split; class names by feature, in label order."""

    records: dict[str, np.ndarray]
    names: dict[str, list[str]]


def _checked(
    name: str, source: str | pathlib.Path, data_dir: str, digests: Mapping[str, str] | None
) -> _Content:
    layout = _LAYOUTS[name]
    option = f" --data_dir={data_dir}" if data_dir else ""
    fix = (
        f"download {layout.url} and run\n"
        f"  python -m experiments.prepare --dataset={name} --source={layout.archive}{option}"
    )
    if not str(source):
        raise DataError(f"{name}: not prepared yet; {fix}")
    path = pathlib.Path(source).expanduser()
    if not path.exists():
        raise DataError(f"{source}: no such file or folder; {fix}")
    expected = layout.digests if digests is None else digests
    files = _files(path, layout.all_files, fix)
    if path.is_file() and path.name.endswith((".tar.gz", ".tgz")):
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "md5").hexdigest()
        _compare_digest(path, found, expected.get(layout.archive), fix)
    records = {}
    for split, members in layout.files.items():
        count = layout.records[split] if digests is None else None
        for member in members:
            where = path / member
            _compare_size(where, len(files[member]), len(layout.classes) + _PIXELS, count, fix)
            found = hashlib.md5(files[member], usedforsecurity=False).hexdigest()
            _compare_digest(where, found, expected.get(member), fix)
        joined = np.concatenate([np.frombuffer(files[member], np.uint8) for member in members])
        records[split] = joined.reshape(-1, len(layout.classes) + _PIXELS)
        _compare_labels(path, split, records[split], layout, fix)
    return _Content(records, _class_names(path, files, layout, fix))


def _compare_digest(path: pathlib.Path, found: str, expected: str | None, fix: str) -> None:
    if expected is not None and found != expected:
        raise DataError(f"{path}: MD5 {found}, expected {expected}: damaged or another file; {fix}")


def _compare_size(path: pathlib.Path, size: int, record: int, count: int | None, fix: str) -> None:
    if size == 0 or size % record:
        said = f"{size:,} bytes, expected a multiple of {record:,} (one record)"
        raise DataError(f"{path}: {said}: damaged or another file; {fix}")
    if count is not None and size != count * record:
        raise DataError(f"{path}: {size // record:,} records, expected {count:,}; {fix}")


def _compare_labels(
    path: pathlib.Path, split: str, records: np.ndarray, layout: _Layout, fix: str
) -> None:
    for column, (feature, classes) in enumerate(zip(layout.names, layout.classes, strict=True)):
        label = int(records[:, column].max())
        if label >= classes:
            files = ", ".join(layout.files[split])
            raise DataError(
                f"{path}: {feature} {label} in {files} is not in 0..{classes - 1}; {fix}"
            )


def _class_names(
    path: pathlib.Path, files: Mapping[str, bytes], layout: _Layout, fix: str
) -> dict[str, list[str]]:
    found = {}
    for (feature, file), classes in zip(layout.names.items(), layout.classes, strict=True):
        found[feature] = files[file].decode("utf-8", "replace").split()
        if len(found[feature]) != classes:
            raise DataError(
                f"{path / file}: {len(found[feature])} class names, expected {classes}; {fix}"
            )
    return found


def _files(path: pathlib.Path, wanted: Iterable[str], fix: str) -> dict[str, bytes]:
    """Content of the wanted files; what else is there is only listed for the message."""
    found, seen = _from_folder(path, wanted) if path.is_dir() else _from_archive(path, wanted, fix)
    missing = [file for file in wanted if file not in found]
    if missing and any(part in _OTHER_VERSIONS for name in seen for part in name.split("/")):
        raise DataError(f"{path}: not the binary version (pickles are never read); {fix}")
    if missing:
        raise DataError(f"{path}: lacks {', '.join(missing)}; {fix}")
    return found


# Names that only the Python and MATLAB versions have: their folders, and files in these.
_OTHER_VERSIONS = {
    *("cifar-10-batches-py", "cifar-100-python", "cifar-10-batches-mat", "cifar-100-matlab"),
    *("data_batch_1", "meta", "data_batch_1.mat", "train.mat"),
}


def _from_folder(path: pathlib.Path, wanted: Iterable[str]) -> tuple[dict[str, bytes], list[str]]:
    folders = [path, *sorted(child for child in path.iterdir() if child.is_dir())]
    best = max(folders, key=lambda folder: sum((folder / file).is_file() for file in wanted))
    found = {file: (best / file).read_bytes() for file in wanted if (best / file).is_file()}
    return found, [child.name for folder in folders for child in folder.iterdir()]


_UNREADABLE = (tarfile.TarError, OSError, EOFError, ValueError, zlib.error, lzma.LZMAError)


def _from_archive(
    path: pathlib.Path, wanted: Iterable[str], fix: str
) -> tuple[dict[str, bytes], list[str]]:
    """Reads in memory: whatever a member is called, nothing is written under its name."""
    found: dict[str, bytes] = {}
    seen = []
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                seen.append(member.name)
                file = pathlib.PurePosixPath(member.name).name
                if member.isfile() and file in wanted and (content := archive.extractfile(member)):
                    found.setdefault(file, content.read())
    except _UNREADABLE as error:
        raise DataError(f"{path}: not a readable archive ({error}); {fix}") from error
    return found, seen


# Writing.


class _FromMemory:
    """Hands a TFDS builder the examples that its own code would read with TensorFlow."""

    content: _Content
    bar: tqdm

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        del dl_manager
        for feature, names in self.content.names.items():
            self.info.features[feature].names = names  # type: ignore[attr-defined]
        return {
            split: self._generate_examples(f"{split}_", records)
            for split, records in self.content.records.items()
        }

    def _generate_examples(self, split_prefix: str, records: np.ndarray) -> Iterator:
        features = tuple(self.content.names)
        for index, record in enumerate(records):
            labels = dict(zip(features, record[: len(features)].tolist(), strict=True))
            pixels = record[len(features) :].reshape(3, 32, 32).transpose(1, 2, 0)
            yield index, {"id": f"{split_prefix}{index:05d}", "image": _png(pixels), **labels}
            self.bar.update()

    def _log_download_bytes(self) -> None:
        """Nothing is downloaded."""

    def _log_download_done(self) -> None:
        """The caller says where the files are."""


# Unregistered: the names belong to TFDS's own builders, and those read what these have written.
class _Cifar10(_FromMemory, originals.Cifar10, skip_registration=True):  # type: ignore[call-arg]
    name = "cifar10"


class _Cifar100(_FromMemory, originals.Cifar100, skip_registration=True):  # type: ignore[call-arg]
    name = "cifar100"


def _png(pixels: np.ndarray) -> io.BytesIO:
    # Encoding an array through the Image feature would need TensorFlow.
    png = io.BytesIO()
    Image.fromarray(pixels).save(png, "PNG")
    png.seek(0)
    return png


def _write(name: str, content: _Content, data_dir: str) -> None:
    writer = preparing.opened({"cifar10": _Cifar10, "cifar100": _Cifar100}[name], data_dir)
    writer.content = content
    bar = tqdm(
        total=sum(map(len, content.records.values())), desc=f"Preparing {name}", unit=" images",
        mininterval=0.5, dynamic_ncols=True,
    )  # fmt: skip
    with bar as writer.bar:
        preparing.write(writer)
