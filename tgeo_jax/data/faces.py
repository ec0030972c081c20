"""Face sets without TensorFlow: ORL, and folders in the layouts of CASIA-WebFace and LFW.

People are split, not only images: those whose pairs are compared in evaluation are never trained
on. Splits of the builders: `train` and `test`, images of the people who are trained on, and
`verification`, images of the others, whose label is -1.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import pathlib
import tarfile
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from tgeo_jax.data import preparing
from tgeo_jax.data.pairs import Pair, Pairs, Photo, of_everybody, read_list
from tgeo_jax.errors import DataError

SIDE = 112  # pixels of aligned crops, as ArcFace and MobileFaceNet take them
_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".pgm", ".ppm")
_ORL_TRAINED, _ORL_PEOPLE, _ORL_PHOTOS, _ORL_TEST = 30, 40, 10, 3
_TESTED = 10  # of a person's images, one in so many is for testing
_ORL_HOW = (
    "get orl_faces.tar.gz (AT&T Laboratories Cambridge, 'The Database of Faces': s1/1.pgm to "
    "s40/10.pgm) and run\n"
    "  python -m experiments.prepare --dataset=orl_faces --source=orl_faces.tar.gz"
)
_FOLDER_HOW = (
    "make a folder that holds train/PERSON/IMAGE.jpg (CASIA-WebFace's layout), pairs.txt (LFW's) "
    "and evaluation/NAME/NAME_0001.jpg (LFW's images), all of them aligned, and run\n"
    "  python -m experiments.prepare --dataset=face_folder --source=FOLDER"
)


@dataclasses.dataclass(frozen=True)
class _Image:
    """One image of a source: what it is called there, how to read it, and whom it shows."""

    name: str
    read: Callable[[], bytes]
    person: str


@dataclasses.dataclass(frozen=True)
class _Content:
    """Images by split, names of the people that are trained on, and pairs of the others."""

    images: dict[str, list[_Image]]
    people: list[str]
    pairs: list[tuple[int, int, bool, int]]  # two verification images, whether the same, the fold


class _Faces(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Images uint8 [H, W, C]; label -1 and a name of their own for people in evaluation."""

    VERSION = tfds.core.Version("1.0.0")
    SHAPE: ClassVar[tuple[int, int, int]]
    RESIZES: ClassVar[bool] = False
    ABOUT: ClassVar[str]
    PAGE: ClassVar[str | None]
    content: _Content
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

    def _generate_examples(self, split: str, images: list[_Image]) -> Iterator:
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
    how = {"orl_faces": _ORL_HOW, "face_folder": _FOLDER_HOW}[name]
    path = pathlib.Path(source).expanduser()
    if not str(source):
        raise DataError(f"{name}: not prepared yet; {how}")
    if not path.exists():
        raise DataError(f"{source}: no such file or folder; {how}")
    content = _orl(path) if name == "orl_faces" else _folder(path)
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
    """
    stored = np.asarray(_about(dataset)["pairs"], np.int32)
    return Pairs(images, stored[:, :2], stored[:, 2] == 1, stored[:, 3])


def corrupt(dataset: tfds.core.DatasetBuilder) -> tuple[str, ...]:
    """Names of the training images that were skipped when a set was prepared."""
    return tuple(_about(dataset)["corrupt"])


def told(dataset: tfds.core.DatasetBuilder) -> str:
    """What to say of a prepared face set: people, pairs, and what was skipped."""
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


# Reading the sources.


def _orl(path: pathlib.Path) -> _Content:
    files = {} if path.is_dir() else _from_archive(path)

    def image(person: int, number: int) -> _Image:
        name, read = f"s{person}/{number}.pgm", None
        if path.is_dir():
            inner = next((p for p in (path, path / "orl_faces") if (p / name).is_file()), None)
            read = None if inner is None else (inner / name).read_bytes
        elif name in files:
            read = functools.partial(files.__getitem__, name)
        if read is None:
            raise DataError(f"{path}: lacks {name}; {_ORL_HOW}")
        return _Image(f"{path}: {name}", read, f"s{person}")

    images: dict[str, list[_Image]] = {"train": [], "test": [], "verification": []}
    first_tested = _ORL_PHOTOS - _ORL_TEST + 1
    for person in range(1, _ORL_PEOPLE + 1):
        for number in range(1, _ORL_PHOTOS + 1):
            split = "test" if number >= first_tested else "train"
            split = split if person <= _ORL_TRAINED else "verification"
            images[split].append(image(person, number))
    others = [f"s{person}" for person in range(_ORL_TRAINED + 1, _ORL_PEOPLE + 1)]
    listed = of_everybody(dict.fromkeys(others, _ORL_PHOTOS))
    photos = [Photo(person, n) for person in others for n in range(1, _ORL_PHOTOS + 1)]
    people = [f"s{person}" for person in range(1, _ORL_TRAINED + 1)]
    return _Content(images, people, _indexed(listed, photos))


def _from_archive(path: pathlib.Path) -> dict[str, bytes]:
    """Content by the last two parts of a member's name; nothing is written under its name."""
    found = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                name = "/".join(pathlib.PurePosixPath(member.name).parts[-2:])
                if member.isfile() and (content := archive.extractfile(member)):
                    found[name] = content.read()
    except Exception as error:  # tarfile's, zlib's, lzma's or the system's
        raise DataError(f"{path}: not a readable archive ({error}); {_ORL_HOW}") from error
    return found


def _folder(path: pathlib.Path) -> _Content:
    for part in ("train", "evaluation", "pairs.txt"):
        if not (path / part).exists() or (path / part).is_dir() == part.endswith(".txt"):
            raise DataError(f"{path}: lacks {part}; {_FOLDER_HOW}")
    own: dict[str, list[pathlib.Path]] = {}
    for folder in sorted(p for p in (path / "train").iterdir() if p.is_dir()):
        own[folder.name] = _images_in(folder)
        if len(own[folder.name]) < 3:
            raise DataError(
                f"{folder}: holds {len(own[folder.name])} images; a person needs three or more, to "
                "train, validate and test on: add some, or remove the folder"
            )
    if len(own) < 2:
        raise DataError(f"{path / 'train'}: holds {len(own)} people; two or more are needed")
    listed = read_list(path / "pairs.txt")
    photos = sorted({photo for pair in listed for photo in (pair.first, pair.second)})
    _check_apart(path, list(own), {photo.person for photo in photos})
    images: dict[str, list[_Image]] = {"train": [], "test": [], "verification": []}
    for person, paths in own.items():
        for index, file in enumerate(paths):
            split = "test" if _is_tested(index, len(paths)) else "train"
            images[split].append(_Image(str(file), file.read_bytes, person))
    for photo in photos:
        file = _photo(path / "evaluation", photo)
        images["verification"].append(_Image(str(file), file.read_bytes, photo.person))
    return _Content(images, list(own), _indexed(listed, photos))


def _is_tested(index: int, count: int) -> bool:
    """One in ten, of few images the last."""
    return index % _TESTED == _TESTED - 1 or (count < _TESTED and index == count - 1)


def _images_in(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in _SUFFIXES)


def _photo(folder: pathlib.Path, photo: Photo) -> pathlib.Path:
    stem = f"{photo.person}_{photo.number:04d}"
    for suffix in _SUFFIXES:
        file = folder / photo.person / f"{stem}{suffix}"
        if file.is_file():
            return file
    raise DataError(f"{folder / photo.person / stem}.jpg: missing, and pairs.txt names it")


def _check_apart(path: pathlib.Path, trained: list[str], verified: set[str]) -> None:
    """Whoever is verified must not be trained on."""
    called = {person: person for person in trained}
    names = path / "names.txt"
    if names.exists():
        for number, line in enumerate(names.read_text().splitlines(), 1):
            words = line.split()
            if len(words) != 2:
                raise DataError(f"{names}, line {number}: must be `FOLDER NAME`; found {line!r}")
            called[words[0]] = words[1]
    # Of two spellings of a name, case and the character for a blank are what differs.
    plain = {name: name.lower().replace(" ", "_") for name in {*called.values(), *verified}}
    others = {plain[name] for name in verified}
    both = [person for person in trained if plain[called[person]] in others]
    if both:
        shown = ", ".join(both[:5]) + (", ..." if len(both) > 5 else "")
        raise DataError(
            f"{path}: {len(both)} people are in train and in pairs.txt: {shown}; remove their "
            "folders from train, for nobody who is verified may be trained on"
        )


def _indexed(listed: list[Pair], photos: list[Photo]) -> list[tuple[int, int, bool, int]]:
    index = {photo: position for position, photo in enumerate(photos)}
    return [(index[pair.first], index[pair.second], pair.same, pair.fold) for pair in listed]


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
