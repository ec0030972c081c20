"""Tables of rows as TFDS datasets, without TensorFlow.

A record is a label and one row of fixed width: values of eight bytes each, float64 of a numeric
table, int64 of a categorical one. Nothing is fitted here: scaling and vocabularies depend on which
rows are trained on (see `fitting`). Records keep the order of the published files.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from tgeo_jax.data import attacks, clicks, preparing, records
from tgeo_jax.data.layouts import Content, Layout, Tally
from tgeo_jax.errors import DataError

LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        *(attacks.NSL_KDD, *attacks.POWER_ATTACK),
        *(clicks.CRITEO, clicks.AVAZU, clicks.FRAPPE, clicks.MOVIELENS),
    )
}
_ROWS_AT_ONCE = 10_000


class _Table(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Feature `row` [F] and `label`; `info.metadata` says what the files held."""

    layout: ClassVar[Layout]
    pkg_dir_path: ClassVar[pathlib.Path] = pathlib.Path(__file__).parent
    # Set before it is prepared.
    content: Content
    tally: Tally
    bar: tqdm

    def _info(self) -> tfds.core.DatasetInfo:
        layout = self.layout
        row = tfds.features.Tensor(
            shape=(len(layout.columns),),
            dtype=layout.dtype,
            encoding=tfds.features.Encoding.BYTES,
        )
        label = tfds.features.ClassLabel(names=list(layout.class_names))
        return self.dataset_info_from_configs(
            description=layout.description,
            citation=layout.citation,
            homepage=layout.homepage,
            features=tfds.features.FeaturesDict({"row": row, "label": label}),
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict(),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        del dl_manager
        return {split: self._generate_examples(split) for split in self.content.splits}

    def _generate_examples(self, split: str) -> Iterator:
        for index, (row, label) in enumerate(self.content.splits[split]):
            yield index, {"row": row, "label": label}
            self.bar.update()
        found = {"malformed": self.tally.count, **self.content.about}
        self.info.metadata.update(found)  # type: ignore[union-attr]

    def _log_download_bytes(self) -> None:
        """Nothing is downloaded."""

    def _log_download_done(self) -> None:
        """The caller says where the files are."""


def _builder_class(layout: Layout) -> type[_Table]:
    content = {
        "layout": layout,
        "name": layout.name,
        "__module__": __name__,
        "VERSION": tfds.core.Version(layout.version),
    }
    name = "".join(part.capitalize() for part in layout.name.split("_"))
    return type(name, (_Table,), content)


_BUILDERS = {name: _builder_class(layout) for name, layout in LAYOUTS.items()}


def builder(name: str, data_dir: str = "") -> tfds.core.DatasetBuilder:
    """The builder of a table, prepared or not.

    Args:
        name: a key of `LAYOUTS`.
        data_dir: TFDS folder; empty for TFDS's own default.

    Examples:
        >>> builder("nsl_kdd", "/nowhere").info.features["row"].shape
        (41,)
    """
    return preparing.opened(_BUILDERS[name], data_dir)


def how_to_prepare(name: str, data_dir: str = "") -> str:
    """Which files a table needs, and the command.

    Examples:
        >>> print(how_to_prepare("nsl_kdd"))
        put KDDTrain+.txt (or KDDTrain+_20Percent.txt), KDDTest+.txt and KDDTest-21.txt \
(https://www.unb.ca/cic/datasets/nsl.html) in a folder and run
          python -m experiments.prepare --dataset=nsl_kdd --source=FOLDER
    """
    layout = LAYOUTS[name]
    option = f" --data_dir={data_dir}" if data_dir else ""
    return (
        f"put {layout.files} ({layout.homepage}) in a folder and run\n"
        f"  python -m experiments.prepare --dataset={name} --source=FOLDER{option}"
    )


def prepare(
    name: str, source: str | pathlib.Path, data_dir: str = "", *, max_malformed: int = 10
) -> pathlib.Path:
    """Writes a table's TFDS files from the published ones, unless they are there already.

    Args:
        name: a key of `LAYOUTS`.
        source: the folder of the published files (or the file, where it is one), gzipped or not.
            May be empty if the table is prepared already, or if they lie in TFDS's manual
            folder, `downloads/manual` in its own.
        data_dir: TFDS folder; empty for TFDS's own default.
        max_malformed: how many rows may be skipped because they cannot be read; each is named in
            a warning.

    Returns:
        The folder that holds the files.

    Raises:
        DataError: the source is missing or lacks a file, is damaged, or has more malformed rows.

    Examples:
        >>> prepare("nsl_kdd", "/nowhere", "/nowhere")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        tgeo_jax.errors.DataError: /nowhere: no such file or folder; put KDDTrain+.txt (or ...
    """
    dataset = builder(name, data_dir)
    folder = pathlib.Path(dataset.data_dir)
    if preparing.is_done(folder):
        return folder
    path = _source(name, source, data_dir, folder)
    tally = Tally(max_malformed)
    try:
        content = LAYOUTS[name].read(path, tally)
        with preparing.alone(folder) as needed:
            if needed:
                _write(dataset, content, tally)
    except DataError as error:
        raise DataError(f"{error}; {how_to_prepare(name, data_dir)}") from error
    return folder


def _source(
    name: str, source: str | pathlib.Path, data_dir: str, folder: pathlib.Path
) -> pathlib.Path:
    manual = folder.parents[1] / "downloads" / "manual"
    fix = how_to_prepare(name, data_dir)
    if str(source):
        path = pathlib.Path(source).expanduser()
        if not path.exists():
            raise DataError(f"{source}: no such file or folder; {fix}")
        return path
    for path in (manual / name, manual):
        if path.is_dir():
            return path
    raise DataError(f"{name}: not prepared yet; {fix}")


def _write(writer: Any, content: Content, tally: Tally) -> None:
    writer.content, writer.tally = content, tally
    bar = tqdm(
        desc=f"Preparing {writer.name}", unit=" rows", unit_scale=True, mininterval=0.5,
        dynamic_ncols=True,
    )  # fmt: skip
    with bar as writer.bar:
        preparing.write(writer)


def rows_and_labels(dataset: tfds.core.DatasetBuilder, split: str) -> tuple[np.ndarray, np.ndarray]:
    """All rows of a prepared table's split, in the order of the published files.

    Args:
        dataset: from `builder`.
        split: of it.

    Returns:
        rows [N, F] (float64 or int64) and labels [N] (int32).

    Examples:
        >>> from types import SimpleNamespace
        >>> empty = SimpleNamespace(name="frappe", as_data_source=lambda **options: [])
        >>> rows, labels = rows_and_labels(empty, "test")
        >>> rows.shape, rows.dtype, labels.shape
        ((0, 10), dtype('int64'), (0,))
    """
    layout = LAYOUTS[dataset.name]
    nothing = np.zeros((0, len(layout.columns)), layout.dtype), np.zeros(0, np.int32)
    rows, labels = zip(nothing, *pieces(dataset, split), strict=True)
    return np.concatenate(rows), np.concatenate(labels)


def pieces(
    dataset: tfds.core.DatasetBuilder, split: str
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """As `rows_and_labels`, some thousand rows at a time."""
    layout = LAYOUTS[dataset.name]
    raw: Any = dataset.as_data_source(
        split=split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
    )
    for start in range(0, len(raw), _ROWS_AT_ONCE):
        some = raw.__getitems__(range(start, min(start + _ROWS_AT_ONCE, len(raw))))
        yield records.parsed(some, len(layout.columns), layout.dtype)
