"""Prepared TFDS datasets as arrays in memory, without TensorFlow."""

from __future__ import annotations

import dataclasses
import functools
import io
import pathlib
from collections.abc import Callable, Mapping

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from tgeo_jax import storage
from tgeo_jax.data import (
    cifar,
    decoded,
    faces,
    fingerprints,
    fitting,
    normalisation,
    splits,
    tables,
)
from tgeo_jax.data.normalisation import Normalisation
from tgeo_jax.data.pairs import Pairs
from tgeo_jax.errors import ConfigError, DataError, TgeoError, nearest
from tgeo_jax.values import shown


@dataclasses.dataclass(frozen=True)
class Split:
    """Images [N, H, W, C] (uint8), labels [N] (int32), and indices in the TFDS split [N] (int32).

    In the place of images a numeric table has rows [N, F] (float32) and a categorical one ids
    [N, F] (int32). The index counts examples in the order of their TFDS ids (of a table, of its
    rows); it does not depend on what is held out of the split.
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
        mean: of the training pixels in [0, 1], by channel; of a numeric table each feature's
            minimum over the training rows; of a categorical table ().
        std: likewise their standard deviation; the range; ().
        vocabulary: how many ids each column of a categorical table has, 0 (unknown or rare)
            included; () of everything else.
        feature_names: of a table's columns; () of images.
        extra: further test splits by name, such as NSL-KDD's `test_hard`; for reporting only.
        verification: of a face set, pairs of people who are in no split; None of everything else.
        corrupt: names of what was skipped when the set was prepared, since it cannot be decoded.
    """

    train: Split
    validation: Split
    test: Split
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    vocabulary: tuple[int, ...] = ()
    feature_names: tuple[str, ...] = ()
    extra: Mapping[str, Split] = dataclasses.field(default_factory=dict)
    verification: Pairs | None = None
    corrupt: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def example(self) -> np.ndarray:
        """An image [1, H, W, C], or row [1, F], for its shape and dtype."""
        return self.train.images[:1]

    def digest(self) -> str:
        """SHA-256 of all pixels and labels, of what is held out, and of the order of examples."""
        extra = (self.extra[name] for name in sorted(self.extra))
        parts = (self.train, self.validation, self.test, *extra)
        found: list[tuple] = [(part.images, part.labels, part.ids) for part in parts]
        if self.verification is not None:
            found.append(tuple(vars(self.verification).values()))
        return fingerprints.of(found)


# What published checkpoints were trained with; not exactly the statistics of the sets.
CIFAR10_NORMALISATION: Normalisation = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
CIFAR100_NORMALISATION: Normalisation = ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))
IMAGENET_NORMALISATION: Normalisation = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def _digits(data_dir: str) -> tfds.core.DatasetBuilder:
    from tgeo_jax.data.digits import Digits  # importing a builder registers it with TFDS

    return Digits(data_dir=data_dir or None, file_format="array_record")


def _imagenet(data_dir: str) -> tfds.core.DatasetBuilder:
    return tfds.builder("imagenet2012", data_dir=data_dir or None, file_format="array_record")


Builder = Callable[[str], tfds.core.DatasetBuilder]  # from TFDS's folder
BUILDERS: dict[str, Builder] = {
    "digits": _digits,
    **{name: functools.partial(cifar.builder, name) for name in cifar.NAMES},
    "imagenet2012": _imagenet,
    **{name: functools.partial(faces.builder, name) for name in faces.NAMES},
    **{name: functools.partial(tables.builder, name) for name in tables.LAYOUTS},
}
TOO_LARGE = ("imagenet2012",)  # for memory: these are streamed
_ARCHIVES = {
    "cifar10": "cifar-10-binary.tar.gz",
    "cifar100": "cifar-100-binary.tar.gz",
    "orl_faces": "orl_faces.tar.gz",
    "face_folder": "FOLDER",
}


def builder(name: str, data_dir: str = "") -> tfds.core.DatasetBuilder:
    """The TFDS builder of that name, prepared or not.

    Args:
        name: a key of `BUILDERS`.
        data_dir: TFDS folder; empty for TFDS's own default.

    Returns:
        A builder whose files are array_record, readable without TensorFlow.

    Raises:
        ConfigError: an unknown dataset, with the nearest name.
        DataError: a folder that cannot be used, or damaged files that describe the dataset.

    Examples:
        >>> builder("digits", "/nowhere").info.features["image"].shape
        (8, 8, 1)
    """
    if name not in BUILDERS:
        raise ConfigError(f"data.name={name!r}: unknown dataset{nearest(name, BUILDERS)}")
    storage.check_folder(data_dir, "data.dir")
    try:
        return BUILDERS[name](data_dir)
    except TgeoError:
        raise
    except Exception as error:  # whatever TFDS says
        raise DataError(
            f"data.name={name!r} in data.dir={shown(data_dir)}: cannot be opened ({_line(error)}); "
            "name another folder, or delete the dataset's and prepare it again"
        ) from error


def is_prepared(dataset: tfds.core.DatasetBuilder) -> bool:
    """Whether a builder's files are there and complete.

    Examples:
        >>> is_prepared(builder("digits", "/nowhere"))
        False
    """
    try:
        return (pathlib.Path(dataset.data_dir) / "dataset_info.json").exists()
    except OSError:  # a name that is too long, or a folder of somebody else's
        return False


def prepare(
    name: str, data_dir: str = "", source: str = "", *, max_malformed: int = 10
) -> pathlib.Path:
    """Writes a dataset's files unless they are there already.

    Args:
        name: a key of `BUILDERS`.
        data_dir: TFDS folder; empty for TFDS's own default.
        source: of CIFAR, its official binary archive or the folder of its files; of face sets see
            `faces.prepare`; of a table, the folder of its published files.
        max_malformed: how many rows of a table's files, or images of a face set, may be skipped
            because they cannot be read.

    Returns:
        The folder that holds the files.

    Raises:
        ConfigError: an unknown dataset, or a source for one that needs none.
        DataError: a source that is missing or damaged, or a dataset that TFDS itself must prepare.

    Examples:
        >>> prepare("imagenet2012", "/nowhere")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        tgeo_jax.errors.DataError: imagenet2012: not prepared in /nowhere/imagenet2012/5.1.0; ...
    """
    dataset = builder(name, data_dir)
    if name in cifar.NAMES:
        return cifar.prepare(name, source, data_dir)
    if name in faces.NAMES:
        return faces.prepare(name, source, data_dir, max_corrupt=max_malformed)
    if name in tables.LAYOUTS:
        return tables.prepare(name, source, data_dir, max_malformed=max_malformed)
    if source:
        raise ConfigError(f"--source={source}: {name} needs no files; leave --source out")
    if name == "imagenet2012" and not is_prepared(dataset):
        raise DataError(
            f"{name}: not prepared in {dataset.data_dir}; TFDS prepares it from the files of "
            "image-net.org, once and on any machine that has TensorFlow:\n"
            "  tfds build imagenet2012 --file_format=array_record --manual_dir=FOLDER\n"
            "where FOLDER holds ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar; training "
            "needs no TensorFlow"
        )
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
    fraction: float = 1.0,
    imbalance: float = 1.0,
    mean: tuple[float, ...] = (),
    std: tuple[float, ...] = (),
    part: str = "all",
    teacher_fraction: float = 0.7,
    oversample: bool = False,
    min_count: int = 1,
    outliers: float = 0.0,
) -> Dataset:
    """Reads a prepared dataset and holds a stratified validation split out of its training split.

    What is fitted (normalisation, scaling, vocabularies) is fitted on all that is not held out,
    before anything is dropped: a teacher that learned from another share sees the same input.

    Args:
        name: a key of `BUILDERS`.
        data_dir: TFDS folder; empty for TFDS's own default.
        validation_fraction: share of the training examples held out, in (0, 1).
        split_seed: which examples are held out or dropped and which labels are corrupted.
        label_noise: share of training labels replaced by another class; validation and test
            labels stay as they are.
        fraction: share of the remaining training examples that is kept, stratified, in (0, 1].
        imbalance: how many times as many examples the first class keeps as the last, >= 1; what is
            held out stays balanced (see `splits.long_tailed`).
        mean: for normalisation, by channel (of a numeric table by feature); empty for that of all
            examples not held out.
        std: likewise.
        part: which of two disjoint, stratified parts of what is not held out is trained on:
            `teacher` or `student`; `all` for both.
        teacher_fraction: the teacher's share of it, in (0, 1).
        oversample: whether examples of the smaller classes are repeated, drawn with replacement,
            until every class has as many as the largest (see `splits.oversampled`).
        min_count: categorical tables only: values that fewer rows have share the id 0.
        outliers: images only: share of the training images that become Gaussian noise, with their
            labels (see `splits.with_noise`), in [0, 1).

    Returns:
        The dataset, in memory.

    Raises:
        ConfigError: an unknown dataset, or a normalisation for other channels than it has.
        DataError: not prepared (with the command that prepares it), or a class without examples
            in one of the splits.

    References:
        TGeo-KD (arXiv 2312.15112): `part` and `oversample` are its protocol for click-through rates
        and attacks.
    """
    dataset = builder(name, data_dir)
    check_prepared(dataset, name, data_dir)
    whole, test = (read(dataset, split) for split in ("train", "test"))
    class_names = tuple(dataset.info.features["label"].names)
    classes = len(class_names)
    divide = faces.hold_out if name in faces.NAMES else splits.stratified
    kept, held_out = divide(whole.labels, validation_fraction, split_seed, classes)
    extra: dict[str, Split] = {}
    fitted = None
    if name in tables.LAYOUTS:
        about = dict(dataset.info.metadata or {})
        fitted = fitting.fit(tables.LAYOUTS[name], about, whole.images[kept], min_count)
        others = sorted(set(dataset.info.splits) - {"train", "test"})
        # A published validation split is not what this run holds out.
        names = {split: split if split.startswith("test") else f"test_{split}" for split in others}
        extra = {names[split]: _encoded(read(dataset, split), fitted) for split in others}
        whole, test = _encoded(whole, fitted), _encoded(test, fitted)
    mean, std = normalisation.of(whole.take(kept).images, tuple(mean), tuple(std))
    if imbalance > 1:
        splits.check_balanced(whole.labels[held_out], validation_fraction, classes)
    if part != "all":
        parts = splits.teacher_and_student(
            whole.labels[kept], teacher_fraction, split_seed, classes
        )
        kept = kept[parts[part]]
    if fraction < 1:
        kept = kept[splits.subset(whole.labels[kept], fraction, split_seed, classes)]
    if imbalance > 1:
        kept = kept[splits.long_tailed(whole.labels[kept], imbalance, split_seed, classes)]
    train = whole.take(kept)
    labels = splits.corrupt_labels(train.labels, label_noise, split_seed, classes)
    train = dataclasses.replace(train, labels=labels)
    if outliers:
        chosen = splits.outliers(len(train), outliers, split_seed)
        images = splits.with_noise(train.images, chosen, split_seed)
        train = dataclasses.replace(train, images=images)
    if oversample:
        train = train.take(splits.oversampled(labels, split_seed, classes))
    verification: Pairs | None = None
    corrupt: tuple[str, ...] = ()
    if name in faces.NAMES:
        verification = faces.verification(dataset, read(dataset, "verification").images)
        corrupt = faces.corrupt(dataset)
    return Dataset(
        train=train,
        validation=whole.take(held_out),
        test=test,
        class_names=class_names,
        mean=mean,
        std=std,
        vocabulary=fitted.vocabulary if fitted else (),
        feature_names=fitted.feature_names if fitted else (),
        extra=extra,
        verification=verification,
        corrupt=corrupt,
    )


def _encoded(split: Split, fitted: fitting.Fitted) -> Split:
    return dataclasses.replace(split, images=fitted.encode(split.images))


def check_prepared(dataset: tfds.core.DatasetBuilder, name: str, data_dir: str) -> None:
    """Checks that a dataset is ready to be read.

    Raises:
        DataError: it is not, with the command that prepares it.

    Examples:
        >>> check_prepared(builder("digits", "/nowhere"), "digits", "/nowhere")
        Traceback (most recent call last):
        ...
        tgeo_jax.errors.DataError: data.name='digits': not prepared in /nowhere/digits/1.0.0; run
          python -m experiments.prepare --dataset=digits --data_dir=/nowhere
    """
    if is_prepared(dataset):
        return
    if name in tables.LAYOUTS:
        raise DataError(
            f"data.name={name!r}: not prepared in {dataset.data_dir}; "
            + tables.how_to_prepare(name, data_dir)
        )
    option = f" --data_dir={data_dir}" if data_dir else ""
    source = f" --source={_ARCHIVES[name]}" if name in _ARCHIVES else ""
    raise DataError(
        f"data.name={name!r}: not prepared in {dataset.data_dir}; run\n"
        f"  python -m experiments.prepare --dataset={name}{source}{option}"
    )


def read(dataset: tfds.core.DatasetBuilder, split: str) -> Split:
    """All examples of a prepared dataset's split, in the order of their ids.

    Decoded once: then the arrays lie beside the dataset's files (see `decoded`).

    Raises:
        DataError: its files are damaged or gone.
    """
    path = pathlib.Path(dataset.data_dir) / f"decoded.{split}.npz"
    try:
        records = [pathlib.Path(path) for path in dataset.info.splits[split].filepaths]
        arrays = decoded.load_or_decode(path, records, lambda: vars(_decode_all(dataset, split)))
        return Split(**arrays)
    except Exception as error:  # whatever a reader of records or of images says
        raise DataError(
            f"{dataset.data_dir}: the {split} split cannot be read ({_line(error)}); delete the "
            "folder and prepare the dataset again"
        ) from error


def _decode_all(dataset: tfds.core.DatasetBuilder, split: str) -> Split:
    if dataset.name in tables.LAYOUTS:
        rows, labels = tables.rows_and_labels(dataset, split)
        return Split(rows, labels, np.arange(len(labels), dtype=np.int32))
    source = dataset.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})
    examples = [source[index] for index in range(len(source))]
    # By id, so that the order does not depend on how TFDS shuffled the records when writing.
    examples.sort(key=lambda example: example["id"])
    return Split(
        np.stack([_decode(example["image"]) for example in examples]),
        np.asarray([example["label"] for example in examples], np.int32),
        np.arange(len(examples), dtype=np.int32),
    )


def _line(error: Exception) -> str:
    """The first line of an error, or its kind."""
    return next(iter(str(error).splitlines()), "")[:300] or type(error).__name__


def _decode(png: bytes) -> np.ndarray:
    """Pixels [H, W, C]; grey images get their one channel."""
    pixels = np.asarray(Image.open(io.BytesIO(png)))
    return pixels if pixels.ndim == 3 else pixels[..., None]
