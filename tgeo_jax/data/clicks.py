"""Click-through rates: Criteo, Avazu, Frappe and MovieLens as tables of categorical columns.

Every value is kept exactly, as an integer: the logs' own hashes are 8 hexadecimal digits, and
nothing is hashed again.
"""

from __future__ import annotations

import csv
import datetime
import functools
import pathlib
import re
import zlib
from collections.abc import Callable, Sequence

import numpy as np

from tgeo_jax.data import attacks, layouts
from tgeo_jax.data.layouts import MISSING, Content, Layout, Tally
from tgeo_jax.errors import DataError

_CLICK = ("no_click", "click")


def _is_test(number: int) -> bool:
    """Whether a line of a log that has no test split belongs to it: a fifth, whatever its length.

    By a checksum of the line's number, so that a log of any size is split while it is read.
    """
    return zlib.crc32(b"%d" % number) % 5 == 0


def _by_line(path: pathlib.Path, tally: Tally, parse: layouts.Parse, header: bool) -> Content:
    parts = {"train": lambda number: not _is_test(number), "test": _is_test}
    splits = {
        split: layouts.rows(path, tally, parse, np.int64, header=header, wanted=wanted)
        for split, wanted in parts.items()
    }
    return Content(splits, {"files": {"log": path.name}})


def _label(text: str) -> int:
    if text not in ("0", "1"):
        raise ValueError(f"label {text!r}, expected 0 or 1")
    return int(text)


def _hash(text: str) -> int:
    """The value of up to 8 hexadecimal digits."""
    if len(text) > 8:
        raise ValueError(f"{text!r}: not 8 hexadecimal digits")
    return int(text, 16) if text else MISSING


# Criteo.

_COUNTS, _HASHES = 13, 26
_CRITEO_FILES = ("train.txt", "dac_sample.txt", "train.csv", "dac_sample.csv")


def _read_criteo(source: pathlib.Path, tally: Tally) -> Content:
    path = source if source.is_file() else layouts.needed(source, *_CRITEO_FILES)
    first = _first_line(path)
    separator = "\t" if "\t" in first else ","
    parse = functools.partial(_criteo_row, separator)
    return _by_line(path, tally, parse, header=first.split(separator)[0] not in ("0", "1"))


def _criteo_row(separator: str, line: str) -> tuple[list[int], int]:
    label, *values = layouts.fields(line, separator, 1 + _COUNTS + _HASHES)
    counts = [int(text) if text else MISSING for text in values[:_COUNTS]]
    return counts + [_hash(text) for text in values[_COUNTS:]], _label(label)


def _first_line(path: pathlib.Path) -> str:
    for _, line in layouts.numbered(path):
        return line
    raise DataError(f"{path}: is empty")


CRITEO = Layout(
    name="criteo",
    kind="categorical",
    columns=tuple(
        [f"I{n}" for n in range(1, _COUNTS + 1)] + [f"C{n}" for n in range(1, _HASHES + 1)]
    ),
    class_names=_CLICK,
    read=_read_criteo,
    files="train.txt of the Display Advertising Challenge, or dac_sample.txt",
    description="""
Criteo's Display Advertising Challenge: 13 counts (I1 to I13) and 26 hashed values (C1 to C26) of a
shown advertisement, clicked or not. A fifth of the lines, fixed by this builder's version, is the
test split.
""",
    citation="""
@misc{criteo2014display, title={Display Advertising Challenge}, author={{Criteo Labs}},
  howpublished={Kaggle}, year={2014}}
""",
    homepage="https://www.kaggle.com/c/criteo-display-ad-challenge",
    buckets=_COUNTS,
)

# Avazu.

_AVAZU: dict[str, Callable[[str], int]] = {
    **dict.fromkeys(("C1", "banner_pos"), int),
    **dict.fromkeys(("site_id", "site_domain", "site_category"), _hash),
    **dict.fromkeys(("app_id", "app_domain", "app_category"), _hash),
    **dict.fromkeys(("device_id", "device_ip", "device_model"), _hash),
    **dict.fromkeys(("device_type", "device_conn_type"), int),
    **dict.fromkeys((f"C{number}" for number in range(14, 22)), int),
}
_AVAZU_HEADER = ",".join(("id", "click", "hour", *_AVAZU))


def _read_avazu(source: pathlib.Path, tally: Tally) -> Content:
    path = source if source.is_file() else layouts.needed(source, "train.csv")
    if _first_line(path) != _AVAZU_HEADER:
        raise DataError(f"{path}: its first line must be {_AVAZU_HEADER}")
    return _by_line(path, tally, _avazu_row, header=True)


def _avazu_row(line: str) -> tuple[list[int], int]:
    _, click, hour, *values = layouts.fields(line, ",", 3 + len(_AVAZU))
    parsed = [parse(text) for parse, text in zip(_AVAZU.values(), values, strict=True)]
    return [*_hour_and_weekday(hour), *parsed], _label(click)


@functools.lru_cache(4096)
def _hour_and_weekday(text: str) -> tuple[int, int]:
    """Of YYMMDDHH; Monday is 0."""
    if len(text) != 8:
        raise ValueError(f"hour {text!r}: not YYMMDDHH")
    day = datetime.date(2000 + int(text[:2]), int(text[2:4]), int(text[4:6]))
    hour = int(text[6:])
    if not 0 <= hour < 24:
        raise ValueError(f"hour {text!r}: not YYMMDDHH")
    return hour, day.weekday()


AVAZU = Layout(
    name="avazu",
    kind="categorical",
    columns=("hour", "weekday", *_AVAZU),
    class_names=_CLICK,
    read=_read_avazu,
    files="train.csv of the Click-Through Rate Prediction competition",
    description="""
Avazu's Click-Through Rate Prediction: ten days of mobile advertisements, clicked or not. The time
is kept as hour of the day and weekday. A fifth of the lines, fixed by this builder's version, is
the test split.
""",
    citation="""
@misc{avazu2014ctr, title={Click-Through Rate Prediction}, author={Wang, S. and Cukierski, W.},
  howpublished={Kaggle}, year={2014}}
""",
    homepage="https://www.kaggle.com/c/avazu-ctr-prediction",
)

# Frappe.

_FRAPPE_COLUMNS = (
    *("user", "item", "daytime", "weekday", "isweekend", "homework", "cost", "weather"),
    *("country", "city"),
)
_FRAPPE_FILES = {split: f"frappe.{split}.libfm" for split in ("train", "validation", "test")}
FRAPPE_NOTE = (
    "frappe.train.libfm is not there: frappe.validation.libfm became the training split, so "
    "results are not comparable with published ones"
)


def _read_frappe(source: pathlib.Path, tally: Tally) -> Content:
    if source.is_file():
        raise DataError(f"{source}: is a file; name the folder of all of them")
    files = {
        split: layouts.find(source, [file, file.removeprefix("frappe.")])
        for split, file in _FRAPPE_FILES.items()
    }
    about = {}
    if files["train"] is None:
        about["note"] = FRAPPE_NOTE
        files = {"train": files["validation"], "test": files["test"]}
    for split, path in files.items():
        if path is None:
            raise DataError(f"{source}: holds no {_FRAPPE_FILES[split]}")
    found = {split: path for split, path in files.items() if path is not None}
    splits = {
        split: layouts.rows(path, tally, _frappe_row, np.int64) for split, path in found.items()
    }
    return Content(splits, {"files": {s: path.name for s, path in found.items()}, **about})


def _frappe_row(line: str) -> tuple[list[int], int]:
    label, *entries = line.split()
    if len(entries) != len(_FRAPPE_COLUMNS):
        raise ValueError(f"{len(entries)} features, expected {len(_FRAPPE_COLUMNS)}")
    if float(label) not in (-1, 1):
        raise ValueError(f"label {label!r}, expected 1 or -1")
    values = []
    for entry in entries:
        index, _, weight = entry.partition(":")
        if weight != "1":
            raise ValueError(f"feature {entry!r}: not INDEX:1")
        values.append(int(index))
    return values, int(float(label) > 0)


FRAPPE = Layout(
    name="frappe",
    kind="categorical",
    columns=_FRAPPE_COLUMNS,
    class_names=("unused", "used"),
    read=_read_frappe,
    files="frappe.train.libfm, frappe.validation.libfm and frappe.test.libfm",
    description="""
Frappe: which apps people used in which context, ten one-hot fields in libFM format, with two
negatives drawn for each use by those who published the split.
""",
    citation="""
@article{baltrunas2015frappe, title={Frappe: Understanding the Usage and Perception of Mobile App
  Recommendations In-The-Wild}, author={Baltrunas, L. and Church, K. and Karatzoglou, A. and
  Oliver, N.}, journal={arXiv:1505.03014}, year={2015}}
""",
    homepage="https://github.com/hexiangnan/neural_factorization_machine",
)

# MovieLens.

_LIKED = 4.0  # stars
GENRES = (
    *("(no genres listed)", "Action", "Adventure", "Animation", "Children", "Comedy", "Crime"),
    *("Documentary", "Drama", "Fantasy", "Film-Noir", "Horror", "IMAX", "Musical", "Mystery"),
    *("Romance", "Sci-Fi", "Thriller", "War", "Western"),
)
_YEAR = re.compile(r"\((\d{4})(?:[-\u2013]\d{0,4})?\)\s*$")


def _read_movielens(source: pathlib.Path, tally: Tally) -> Content:
    ratings, movies = (layouts.needed(source, f"{name}.csv") for name in ("ratings", "movies"))
    known = _movies(movies, tally)

    def parse(line: str) -> tuple[Sequence[int], int]:
        user, movie, rating, _ = layouts.fields(line, ",", 4)
        stars = float(rating)
        if not 0.5 <= stars <= 5:
            raise ValueError(f"rating {rating}, expected 0.5 to 5")
        if int(movie) not in known:
            raise ValueError(f"movie {movie}: not in {movies.name}")
        return (int(user), int(movie), *known[int(movie)]), int(stars >= _LIKED)

    found = list(layouts.rows(ratings, tally, parse, np.int64, header=True))
    labels = np.array([label for _, label in found])
    values = np.stack([row for row, _ in found]) if found else np.zeros((0, 5), np.int64)
    return Content(attacks.halves(source, values, labels), {"files": {"ratings": ratings.name}})


def _movies(path: pathlib.Path, tally: Tally) -> dict[int, tuple[int, int, int]]:
    """Year, set of genres (one bit each) and first genre by movie."""
    found = {}
    for number, line in layouts.numbered(path):
        if number == 1:
            continue
        try:
            movie, title, genres = next(csv.reader([line]))
            of_movie = [GENRES.index(genre) for genre in genres.split("|")]
            year = _YEAR.search(title)
            bits = sum(1 << index for index in set(of_movie))
            found[int(movie)] = (int(year[1]) if year else MISSING, bits, of_movie[0])
        except ValueError as error:
            tally.skip(path, number, error)
    return found


MOVIELENS = Layout(
    name="movielens",
    kind="categorical",
    columns=("user", "movie", "year", "genres", "first_genre"),
    class_names=("other", "liked"),
    read=_read_movielens,
    files="ratings.csv and movies.csv of ml-latest-small",
    description="""
MovieLens: whether a person gave a movie four stars or more. The split into train and test (80/20,
stratified, not by time) is fixed by this builder's version.
""",
    citation="""
@article{harper2015movielens, title={The MovieLens Datasets: History and Context},
  author={Harper, F. M. and Konstan, J. A.}, journal={ACM TiiS}, volume={5}, number={4},
  year={2015}}
""",
    homepage="https://grouplens.org/datasets/movielens/latest/",
)
