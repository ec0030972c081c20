"""A few rows in the published layout of every table, written here; their classes can be learned."""

from __future__ import annotations

import gzip
import pathlib

import numpy as np
import pytest
import tensorflow_datasets as tfds

from tgeo_jax.data import clicks, tables
from tgeo_jax.errors import DataError

_ATTACK = {"normal": "normal", "dos": "neptune", "probe": "satan", "r2l": "imap", "u2r": "perl"}
# Only in the test files: attacks that training does not hold, and a service.
_NEW_ATTACK = {**_ATTACK, "dos": "mailbomb", "u2r": "xterm"}


def nsl_kdd(folder: pathlib.Path, *, rows: int = 200, zipped: bool = True) -> pathlib.Path:
    """Training file (20 % version), test and hard test file, a share of each class."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.RandomState(0)
    for name, count, of_class in (
        ("KDDTrain+_20Percent.txt", rows, _ATTACK),
        ("KDDTest+.txt", rows // 2, _NEW_ATTACK),
        ("KDDTest-21.txt", rows // 4, _NEW_ATTACK),
    ):
        text = ""
        for index in range(count):
            kind = index % 5
            numbers = random.randint(0, 5, 41) + kind
            values = [str(number) for number in numbers]
            service = "gopher" if of_class is _NEW_ATTACK and index % 7 == 0 else "http"
            values[1:4] = [("tcp", "udp", "icmp")[index % 3], service, ("SF", "REJ")[kind % 2]]
            attack = list(of_class.values())[kind]
            text += ",".join([*values, attack, "21"]) + "\n"
        if zipped:
            (folder / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
        else:
            (folder / name).write_text(text)
    return folder


def power_attack(folder: pathlib.Path, variant: str, *, rows: int = 40) -> pathlib.Path:
    """15 files; impedances of the first relay are infinite or unknown in some rows."""
    folder.mkdir(parents=True, exist_ok=True)
    layout = tables.LAYOUTS[f"power_attack_{variant}"]
    random = np.random.RandomState(0)
    place = layout.columns.index("R1-PA:Z")
    for file in range(1, 16):
        lines = [",".join((*layout.columns, "marker"))]
        for index in range(rows):
            kind = (index + file) % len(layout.class_names)
            values = [f"{number:.4f}" for number in random.normal(kind, 1, len(layout.columns))]
            values[place] = {0: "inf", 1: "-inf", 2: "nan"}.get(index, values[place])
            lines.append(",".join([*values, layout.class_names[kind]]))
        (folder / f"data{file}.csv").write_text("\n".join(lines) + "\n")
    return folder


def criteo(
    folder: pathlib.Path, *, rows: int = 100, separator: str = "\t", header: bool = False
) -> pathlib.Path:
    """One file, with empty fields."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.RandomState(0)
    lines = [separator.join(("label", *clicks.CRITEO.columns))] if header else []
    for index in range(rows):
        counts = [str(n) for n in random.randint(-1, 2000, 13)]
        hashes = [f"{n:08x}" for n in random.randint(0, 2**32, 26, np.int64) // 10**9 * 7]
        counts[index % 13], hashes[index % 26] = "", ""
        lines.append(separator.join([str(index % 2), *counts, *hashes]))
    (folder / "train.txt").write_text("\n".join(lines) + "\n")
    return folder


def avazu(folder: pathlib.Path, *, rows: int = 100) -> pathlib.Path:
    """One file of two days."""
    folder.mkdir(parents=True, exist_ok=True)
    header = (
        "id,click,hour,C1,banner_pos,site_id,site_domain,site_category,app_id,app_domain,"
        "app_category,device_id,device_ip,device_model,device_type,device_conn_type,"
        "C14,C15,C16,C17,C18,C19,C20,C21"
    )
    lines = [header]
    for index in range(rows):
        hour = f"1410{21 + index % 2}{index % 24:02}"
        hashes = ",".join(f"{(index * place) % 11:08x}" for place in range(1, 10))
        last = f"{15700 + index % 5},320,50,1722,0,35,{-1 if index % 3 else 100084},79"
        lines.append(f"{10**18 + index},{index % 2},{hour},1005,0,{hashes},1,2,{last}")
    (folder / "train.csv").write_text("\n".join(lines) + "\n")
    return folder


def frappe(folder: pathlib.Path, *, rows: int = 100, train: bool = False) -> pathlib.Path:
    """The two public files, or all three."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "validation", "test") if train else ("validation", "test"):
        lines = [
            f"{'1' if row % 3 == 0 else '-1'} "
            + " ".join(f"{100 * field + (row * (field + 1)) % 7}:1" for field in range(10))
            for row in range(rows if split != "test" else rows // 2)
        ]
        (folder / f"frappe.{split}.libfm").write_text("\n".join(lines) + "\n")
    return folder


def movielens(folder: pathlib.Path, *, rows: int = 100) -> pathlib.Path:
    """Ratings of five movies, one of them without a year and one with a comma in its title."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "movies.csv").write_text(
        "movieId,title,genres\n"
        "1,Toy Story (1995),Adventure|Animation|Children|Comedy|Fantasy\n"
        '2,"Postman, The (1994)",Comedy|Drama\n'
        "7,Babylon 5,Sci-Fi\n"
        "9,Nothing (2006\u20132007),(no genres listed)\n"
        "30,Drama of a Comedy (1994),Drama|Comedy\n"
    )
    lines = ["userId,movieId,rating,timestamp"]
    for row in range(rows):
        movie, stars = (1, 2, 7, 9, 30)[row % 5], (4.0, 3.5, 5.0, 0.5)[row % 4]
        lines.append(f"{row // 10 + 1},{movie},{stars},{964982703 + row}")
    (folder / "ratings.csv").write_text("\n".join(lines) + "\n")
    return folder


def write(name: str, folder: pathlib.Path) -> pathlib.Path:
    """The published files of any table.

    Args:
        name: a key of `tables.LAYOUTS`.
        folder: to be made.
    """
    if name.startswith("power_attack_"):
        return power_attack(folder, name.removeprefix("power_attack_"))
    return {
        "nsl_kdd": nsl_kdd, "criteo": criteo, "avazu": avazu,
        "frappe": frappe, "movielens": movielens,
    }[name](folder)  # fmt: skip


def prepared(
    name: str, tmp_path: pathlib.Path, source: pathlib.Path | None = None
) -> tfds.core.DatasetBuilder:
    """A builder of a table prepared from the stand-in, or from a given source."""
    source = source or write(name, tmp_path / "source")
    tables.prepare(name, source, str(tmp_path / "tfds"))
    return tables.builder(name, str(tmp_path / "tfds"))


def refused(
    name: str, source: pathlib.Path | str, tmp_path: pathlib.Path, said: str, **options: int
) -> str:
    """Preparation fails with this message and the command that would do; nothing is left."""
    with pytest.raises(DataError, match=said) as raised:
        tables.prepare(name, source, str(tmp_path / "tfds"), **options)
    assert f"python -m experiments.prepare --dataset={name} --source=FOLDER" in str(raised.value)
    assert not list((tmp_path / "tfds").glob("*/*"))
    return str(raised.value)
