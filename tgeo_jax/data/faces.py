"""Face sets without TensorFlow: ORL, and folders in the layouts of CASIA-WebFace and LFW.

People are split, not only images: those whose pairs are compared in evaluation are never trained
on. Splits of the builders: `train` and `test`, images of the people who are trained on, and
`verification`, images of the others, whose label is -1.
"""

from __future__ import annotations

import io
import pathlib
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from tgeo_jax.data import face_sources, preparing
from tgeo_jax.data.pairs import Pairs
from tgeo_jax.errors import DataError

SIDE = 112  # pixels of aligned crops, as ArcFace and MobileFaceNet take them


class _Faces(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Images uint8 [H, W, C]; label -1 and a name of their own for people in evaluation."""

    VERSION = tfds.core.Version("1.0.0")
    SHAPE: ClassVar[tuple[int, int, int]]
    RESIZES: ClassVar[bool] = False
    ABOUT: ClassVar[str]
    PAGE: ClassVar[str | None]
    content: face_sources.Content
    max_corrupt: int

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            description=self.ABOUT,
            homepage=self.PAGE,
            features=tfds.features.FeaturesDict(
                {
                    "id": tfds.features.Text(),
                    "image": tfds.features.Image(shape=self.SHAPE),
                    "label": tfds.features.ClassLabel(),
                    "person": tfds.features.Text(),
                }
            ),
            metadata=tfds.core.MetadataDict(),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        del dl_manager
        self.info.features["label"].names = self.content.people  # type: ignore[attr-defined]
        about: Any = self.info.metadata
        others = {image.person for image in self.content.images["verification"]}
        about.update(corrupt=[], pairs=self.content.pairs, others=len(others))
        return {
            split: self._generate_examples(split, images)
            for split, images in self.content.images.items()
        }

    def _generate_examples(self, split: str, images: list[face_sources.Image]) -> Iterator:
        labels = {person: label for label, person in enumerate(self.content.people)}
        about: Any = self.info.metadata
        for index, image in enumerate(images):
            try:
                encoded = _encoded(image.read(), self.SHAPE, self.RESIZES)
            except Exception as error:  # damage shows as whatever the decoder stumbles over
                about["corrupt"].append(image.name)
                self._complain(split, about["corrupt"], error)
                continue
            label = labels.get(image.person, -1)
            key = f"{split}_{index:07d}"
            yield key, {"id": key, "image": encoded, "label": label, "person": image.person}

    def _complain(self, split: str, corrupt: list[str], error: Exception) -> None:
        if split == "verification":
            raise DataError(
                f"{corrupt[-1]}: cannot be decoded ({error}), and pairs to verify need it; replace "
                "it"
            ) from error
        if len(corrupt) > self.max_corrupt:
            raise DataError(
                f"{len(corrupt)} images cannot be decoded, and --max_malformed={self.max_corrupt} "
                f"may be skipped: {', '.join(corrupt[:20])}; replace or remove them ({error})"
            ) from error


class _Orl(_Faces, skip_registration=True):  # type: ignore[call-arg]
    name = "orl_faces"
    SHAPE = (112, 92, 1)
    RELEASE_NOTES: ClassVar[dict[str, str]] = {
        "1.0.0": "s1 to s30 are trained on, by their images 1 to 7, and tested by 8 to 10; "
        "s31 to s40 are for verification only."
    }
    ABOUT = (
        "40 people, 10 grey images of each: 'The Database of Faces' of the Olivetti Research "
        "Laboratory, Cambridge, 1992 to 1994."
    )
    PAGE = "https://cam-orl.co.uk/facedatabase.html"


class _Folder(_Faces, skip_registration=True):  # type: ignore[call-arg]
    name = "face_folder"
    SHAPE = (SIDE, SIDE, 3)
    RESIZES = True
    RELEASE_NOTES: ClassVar[dict[str, str]] = {
        "1.0.0": "One in ten images of every person is for testing."
    }
    ABOUT = "Faces from folders: training people by name, and a list of pairs of other people."
    PAGE = None


_BUILDERS: dict[str, type[_Faces]] = {"orl_faces": _Orl, "face_folder": _Folder}
NAMES = tuple(_BUILDERS)


def builder(name: str, data_dir: str = "") -> tfds.core.DatasetBuilder:
    """The TFDS builder of a face set, prepared or not.

    Args:
        name: one of `NAMES`.
        data_dir: TFDS folder; empty for TFDS's own default.

    Examples:
        >>> builder("orl_faces", "/nowhere").info.features["image"].shape
        (112, 92, 1)
    """
    dataset: tfds.core.DatasetBuilder = preparing.opened(_BUILDERS[name], data_dir)
    return dataset


def prepare(
    name: str, source: str | pathlib.Path, data_dir: str = "", *, max_corrupt: int = 10
) -> pathlib.Path:
    """Writes a face set's files unless they are there already.

    Args:
        name: one of `NAMES`.
        source: of `orl_faces` its archive, or the folder of its files; of `face_folder` a folder
            that holds `train/PERSON/IMAGE.jpg`, `pairs.txt` in LFW's layout,
            `evaluation/NAME/NAME_0001.jpg`, and where folders in `train` are numbers `names.txt`
            with lines `FOLDER NAME`. Images of another size than 112x112 are resized; nothing is
            aligned.
        data_dir: TFDS folder; empty for TFDS's own default.
        max_corrupt: how many training images may be skipped because they cannot be decoded.

    Returns:
        The folder that holds the files.

    Raises:
        DataError: a source that is missing or of another layout, people who are both trained on
            and in pairs, or too many images that cannot be decoded.

    Examples:
        >>> prepare("orl_faces", "/nowhere/x.tar.gz", "/nowhere")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        tgeo_jax.errors.DataError: /nowhere/x.tar.gz: no such file or folder; get orl_faces.tar...
    """
    folder = pathlib.Path(builder(name, data_dir).data_dir)
    if preparing.is_done(folder):
        return folder
    how = {"orl_faces": face_sources.ORL_HOW, "face_folder": face_sources.FOLDER_HOW}[name]
    path = pathlib.Path(source).expanduser()
    if not str(source):
        raise DataError(f"{name}: not prepared yet; {how}")
    if not path.exists():
        raise DataError(f"{source}: no such file or folder; {how}")
    content = (face_sources.orl if name == "orl_faces" else face_sources.folder)(path)
    with preparing.alone(folder) as needed:
        if needed:
            writer = preparing.opened(_BUILDERS[name], data_dir)
            writer.content, writer.max_corrupt = content, max_corrupt
            preparing.write(writer)
    return folder


def verification(dataset: tfds.core.DatasetBuilder, images: np.ndarray) -> Pairs:
    """The pairs of a prepared face set.

    Args:
        dataset: from `builder`.
        images: its verification split, in the order of the ids.

    Examples:
        >>> from types import SimpleNamespace
        >>> metadata = {"pairs": [[0, 1, True, 0], [0, 2, False, 1]]}
        >>> stored = SimpleNamespace(info=SimpleNamespace(metadata=metadata))
        >>> found = verification(stored, np.zeros((3, 112, 92, 1), np.uint8))
        >>> found.pairs.tolist(), found.same.tolist(), found.folds.tolist()
        ([[0, 1], [0, 2]], [True, False], [0, 1])
    """
    stored = np.asarray(_about(dataset)["pairs"], np.int32)
    return Pairs(images, stored[:, :2], stored[:, 2] == 1, stored[:, 3])


def corrupt(dataset: tfds.core.DatasetBuilder) -> tuple[str, ...]:
    """Names of the training images that were skipped when a set was prepared.

    Examples:
        >>> from types import SimpleNamespace
        >>> corrupt(SimpleNamespace(info=SimpleNamespace(metadata={"corrupt": ["a/1.jpg"]})))
        ('a/1.jpg',)
    """
    return tuple(_about(dataset)["corrupt"])


def told(dataset: tfds.core.DatasetBuilder) -> str:
    """What to say of a prepared face set: people, pairs, and what was skipped.

    Examples:
        >>> from types import SimpleNamespace
        >>> pairs = [[0, 1, True, 0], [0, 2, False, 1]]
        >>> info = SimpleNamespace(
        ...     metadata={"others": 2, "pairs": pairs, "corrupt": ["a/1.jpg"]},
        ...     features={"label": SimpleNamespace(names=["a", "b", "c"])})
        >>> print(told(SimpleNamespace(info=info)))
        people: 3 trained on, 2 others for verification
        pairs: 1 of one person, 1 of two, in 2 folds
        images skipped because they cannot be decoded: 1
          a/1.jpg
    """
    about, names = _about(dataset), dataset.info.features["label"].names
    same = sum(same for _, _, same, _ in about["pairs"])
    folds = len({fold for *_, fold in about["pairs"]})
    lines = [
        f"people: {len(names):,} trained on, {about['others']:,} others for verification",
        f"pairs: {same:,} of one person, {len(about['pairs']) - same:,} of two, in {folds} folds",
        f"images skipped because they cannot be decoded: {len(about['corrupt'])}",
    ]
    return "\n".join([*lines, *(f"  {name}" for name in about["corrupt"])])


def hold_out(
    labels: np.ndarray, fraction: float, seed: int, num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Splits in two as `splits.stratified`, but every person has an image at least in both parts.

    Args:
        labels: person of each image, [N].
        fraction: share of a person's images in the second part, in (0, 1), rounded, at least one.
        seed: fixes the split.
        num_classes: K.

    Returns:
        (kept, held_out), sorted index arrays.

    Raises:
        DataError: a person with fewer than two images.

    Examples:
        >>> kept, held_out = hold_out(np.array([0, 0, 0, 1, 1]), 0.1, seed=0, num_classes=2)
        >>> len(kept), np.array([0, 0, 0, 1, 1])[held_out]
        (3, array([0, 1]))
    """
    random = np.random.RandomState(seed)  # its stream is frozen, unlike default_rng's
    order = random.permutation(len(labels))
    by_person = np.split(
        order[np.argsort(labels[order], kind="stable")],
        np.cumsum(np.bincount(labels, minlength=num_classes))[:-1],
    )
    few = next((label for label, own in enumerate(by_person) if len(own) < 2), None)
    if few is not None:
        raise DataError(
            f"data.validation_fraction={fraction}: person {few} has {len(by_person[few])} images "
            "to train on, and one must be left when one is held out; add some, or drop the person"
        )
    held = [own[: min(max(1, round(fraction * len(own))), len(own) - 1)] for own in by_person]
    held_out = np.sort(np.concatenate(held))
    return np.setdiff1d(np.arange(len(labels)), held_out), held_out


def _encoded(content: bytes, shape: tuple[int, int, int], resizes: bool) -> io.BytesIO:
    """A file of the right size and number of channels: as it is, or as PNG."""
    height, width, channels = shape
    image: Any = Image.open(io.BytesIO(content))
    image.load()  # a truncated file shows here
    mode = "L" if channels == 1 else "RGB"
    if image.format in ("JPEG", "PNG") and image.mode == mode and image.size == (width, height):
        return io.BytesIO(content)
    image = image.convert(mode)
    if image.size != (width, height):
        if not resizes:
            raise ValueError(f"{image.width}x{image.height} pixels, not {width}x{height}")
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    png = io.BytesIO()
    image.save(png, "PNG")
    png.seek(0)
    return png


def _about(dataset: tfds.core.DatasetBuilder) -> dict[str, Any]:
    return dict(dataset.info.metadata or {})
