"""Pairs of face images for verification: the lists of LFW's layout, and those of a small set."""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
from typing import NamedTuple

import numpy as np

from tgeo_jax.errors import DataError

FOLDS = 10


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Images of people who are not trained on, and which two to compare.

    Attributes:
        images: [M, H, W, C], uint8.
        pairs: indices of both images, [P, 2], int32.
        same: whether both show one person, [P], bool.
        folds: of cross-validation, [P], int32, counted from 0.
    """

    images: np.ndarray
    pairs: np.ndarray
    same: np.ndarray
    folds: np.ndarray

    def __len__(self) -> int:
        return len(self.same)


class Photo(NamedTuple):
    """The number of a photograph among those of a person, from 1."""

    person: str
    number: int


class Pair(NamedTuple):
    """Two photographs to compare, and the fold that they belong to."""

    first: Photo
    second: Photo
    fold: int

    @property
    def same(self) -> bool:
        """Whether both show one person."""
        return self.first.person == self.second.person


def read_list(path: pathlib.Path) -> list[Pair]:
    """Reads a list of pairs in LFW's layout.

    The first line says `FOLDS N`: then each fold has N lines `NAME i j`, photographs i and j of one
    person, and N lines `NAME i OTHER j`. Where it says only `N`, the list is one such part; then
    its pairs are dealt out to ten folds in turn, those of either kind by themselves.

    Args:
        path: of the list, as pairs.txt of LFW.

    Raises:
        DataError: a list that is missing or not of this layout, with the line.

    References:
        Huang et al. 2007, "Labeled Faces in the Wild", view 2.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder) / "pairs.txt"
        ...     _ = path.write_text("2 1\\nAda 1 2\\nAda 1 Emmy 1\\nEmmy 1 2\\nEmmy 2 Ada 2\\n")
        ...     found = read_list(path)
        >>> found[1]
        Pair(first=Photo(person='Ada', number=1), second=Photo(person='Emmy', number=1), fold=0)
        >>> [(pair.same, pair.fold) for pair in found]
        [(True, 0), (False, 0), (True, 1), (False, 1)]
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); put LFW's pairs.txt there") from error
    header = lines[0].split() if lines else []
    if len(header) not in (1, 2) or not all(_is_count(word) for word in header):
        raise DataError(
            f"{path}, line 1: must say `FOLDS N` or `N`, as `10 300` in LFW's pairs.txt; found "
            f"{(lines or [''])[0][:80]!r}"
        )
    folds, size = [*map(int, header)] if len(header) == 2 else [1, int(header[0])]
    rows = [(number, line.split()) for number, line in enumerate(lines[1:], 2) if line.strip()]
    if len(rows) != 2 * folds * size:
        raise DataError(
            f"{path}: holds {len(rows):,} pairs; its first line promises {folds} x 2 x {size}"
        )
    found = []
    for index, (number, words) in enumerate(rows):
        fold, within = divmod(index, 2 * size)
        same, fold = within < size, within % size % FOLDS if len(header) == 1 else fold
        found.append(_pair(path, number, words, same, fold))
    if len({pair.fold for pair in found}) < 2:
        raise DataError(f"{path}: all pairs are in one fold; cross-validation needs two or more")
    return found


def of_everybody(photos_of: dict[str, int]) -> list[Pair]:
    """All pairs of photographs of one person, and as many of two; a fold for each person.

    Every two people give the same number of pairs, drawn once and for all, half of them to the fold
    of either; so each fold has as many pairs of either kind.

    Args:
        photos_of: how many photographs a person has, the same number n of everybody; with F people,
            n (n - 1) / 2 must be a multiple of F - 1.

    Returns:
        F n (n - 1) pairs.

    Examples:
        >>> found = of_everybody({"a": 3, "b": 3, "c": 3, "d": 3})
        >>> len(found), sum(pair.same for pair in found)
        (24, 12)
    """
    (count,) = set(photos_of.values())
    people = list(photos_of)
    each, rest = divmod(count * (count - 1) // 2, len(people) - 1)
    assert rest == 0
    found = [
        Pair(Photo(person, i), Photo(person, j), fold)
        for fold, person in enumerate(people)
        for i, j in itertools.combinations(range(1, count + 1), 2)
    ]
    random = np.random.RandomState(0)  # its stream is frozen, unlike default_rng's
    for (a, first), (b, second) in itertools.combinations(enumerate(people), 2):
        drawn = random.permutation(count * count)[: 2 * each]
        for turn, (i, j) in enumerate(zip(drawn // count + 1, drawn % count + 1, strict=True)):
            fold = a if turn < each else b
            found.append(Pair(Photo(first, int(i)), Photo(second, int(j)), fold))
    return found


def _is_count(word: str) -> bool:
    return word.isdecimal() and 0 < int(word) < 10**6


def _pair(path: pathlib.Path, number: int, words: list[str], same: bool, fold: int) -> Pair:
    wanted = "`NAME i j`" if same else "`NAME i OTHER j`"
    if same and len(words) == 3:
        words = [words[0], words[1], words[0], words[2]]
    right = len(words) == 4 and _is_count(words[1]) and _is_count(words[3])
    if not right or (words[0] == words[2]) != same:
        raise DataError(f"{path}, line {number}: must be {wanted}; found {' '.join(words)[:80]!r}")
    return Pair(Photo(words[0], int(words[1])), Photo(words[2], int(words[3])), fold)
