"""Where the images of a face set come from: ORL's archive or folder, folders of people.

Nothing is decoded here: a `Content` says which image belongs to which split, whom it shows and how
its bytes are read.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import tarfile
from collections.abc import Callable

from tgeo_jax.data.pairs import Pair, Photo, of_everybody, read_list
from tgeo_jax.errors import DataError

_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".pgm", ".ppm")
_ORL_TRAINED, _ORL_PEOPLE, _ORL_PHOTOS, _ORL_TEST = 30, 40, 10, 3
_TESTED = 10  # of a person's images, one in so many is for testing
ORL_HOW = (
    "get orl_faces.tar.gz (AT&T Laboratories Cambridge, 'The Database of Faces': s1/1.pgm to "
    "s40/10.pgm) and run\n"
    "  python -m experiments.prepare --dataset=orl_faces --source=orl_faces.tar.gz"
)
FOLDER_HOW = (
    "make a folder that holds train/PERSON/IMAGE.jpg (CASIA-WebFace's layout), pairs.txt (LFW's) "
    "and evaluation/NAME/NAME_0001.jpg (LFW's images), all of them aligned, and run\n"
    "  python -m experiments.prepare --dataset=face_folder --source=FOLDER"
)


@dataclasses.dataclass(frozen=True)
class Image:
    """One image of a source: what it is called there, how to read it, and whom it shows."""

    name: str
    read: Callable[[], bytes]
    person: str


@dataclasses.dataclass(frozen=True)
class Content:
    """Images by split, names of the people that are trained on, and pairs of the others."""

    images: dict[str, list[Image]]
    people: list[str]
    pairs: list[tuple[int, int, bool, int]]  # two verification images, whether the same, the fold


def orl(path: pathlib.Path) -> Content:
    """The 40 people of ORL: 30 to train on, all pairs of the other ten to verify.

    Args:
        path: of the archive, or of the folder of its files.

    Raises:
        DataError: a file that is no archive, or lacks an image.

    Examples:
        >>> orl(pathlib.Path("/"))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        tgeo_jax.errors.DataError: /: lacks s1/1.pgm; get orl_faces.tar.gz ...
    """
    files = {} if path.is_dir() else _from_archive(path)

    def image(person: int, number: int) -> Image:
        name, read = f"s{person}/{number}.pgm", None
        if path.is_dir():
            inner = next((p for p in (path, path / "orl_faces") if (p / name).is_file()), None)
            read = None if inner is None else (inner / name).read_bytes
        elif name in files:
            read = functools.partial(files.__getitem__, name)
        if read is None:
            raise DataError(f"{path}: lacks {name}; {ORL_HOW}")
        return Image(f"{path}: {name}", read, f"s{person}")

    images: dict[str, list[Image]] = {"train": [], "test": [], "verification": []}
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
    return Content(images, people, _indexed(listed, photos))


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
        raise DataError(f"{path}: not a readable archive ({error}); {ORL_HOW}") from error
    return found


def folder(path: pathlib.Path) -> Content:
    """People in folders to train on, and others that a list of pairs names.

    Args:
        path: of what holds `train`, `evaluation`, `pairs.txt` and perhaps `names.txt`.

    Raises:
        DataError: something is missing or of another layout, or somebody is in both.

    Examples:
        >>> folder(pathlib.Path("/nowhere"))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        tgeo_jax.errors.DataError: /nowhere: lacks train; make a folder that holds ...
    """
    for part in ("train", "evaluation", "pairs.txt"):
        if not (path / part).exists() or (path / part).is_dir() == part.endswith(".txt"):
            raise DataError(f"{path}: lacks {part}; {FOLDER_HOW}")
    own: dict[str, list[pathlib.Path]] = {}
    for person in sorted(p for p in (path / "train").iterdir() if p.is_dir()):
        own[person.name] = _images_in(person)
        if len(own[person.name]) < 3:
            raise DataError(
                f"{person}: holds {len(own[person.name])} images; a person needs three or more, to "
                "train, validate and test on: add some, or remove the folder"
            )
    if len(own) < 2:
        raise DataError(f"{path / 'train'}: holds {len(own)} people; two or more are needed")
    listed = read_list(path / "pairs.txt")
    photos = sorted({photo for pair in listed for photo in (pair.first, pair.second)})
    _check_apart(path, list(own), {photo.person for photo in photos})
    images: dict[str, list[Image]] = {"train": [], "test": [], "verification": []}
    for name, paths in own.items():
        for index, file in enumerate(paths):
            split = "test" if _is_tested(index, len(paths)) else "train"
            images[split].append(Image(str(file), file.read_bytes, name))
    for photo in photos:
        file = _photo(path / "evaluation", photo)
        images["verification"].append(Image(str(file), file.read_bytes, photo.person))
    return Content(images, list(own), _indexed(listed, photos))


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
    called = {person: person for person in trained} | _called(path / "names.txt")
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


def _called(names: pathlib.Path) -> dict[str, str]:
    """Names of people by their folder, from lines `FOLDER NAME`; none without the file."""
    if not names.exists():
        return {}
    try:
        text = names.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{names}: byte {error.start} ({error.object[error.start]:#04x}) is not UTF-8; save "
            "the file as UTF-8"
        ) from error
    except OSError as error:
        raise DataError(
            f"{names}: cannot be read ({error}); must be lines `FOLDER NAME`"
        ) from error
    found = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if len(words) != 2:
            raise DataError(f"{names}, line {number}: must be `FOLDER NAME`; found {line!r}")
        found[words[0]] = words[1]
    return found


def _indexed(listed: list[Pair], photos: list[Photo]) -> list[tuple[int, int, bool, int]]:
    index = {photo: position for position, photo in enumerate(photos)}
    return [(index[pair.first], index[pair.second], pair.same, pair.fold) for pair in listed]
