"""What a table is: rows, columns, and the configuration of each cell, read from a TOML file.

A file says `config`, the configuration file of a cell, in which `{row}` and `{column}` stand for
the names; `rows` and `columns`; `set`, fields of every student; and, where one row, column or
teacher needs it, a section `[row.NAME]`, `[column.NAME]` or `[teacher.NAME]` with its own `config`
and `set`.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import tomllib
from collections.abc import Mapping
from typing import Any

from tgeo_jax.errors import ConfigError, nearest

FOLDER = pathlib.Path("configs/tables")
PUBLISHED = pathlib.Path("results/published.json")
_TABLE = {
    "title": str,
    "about": str,
    "config": str,
    "rows": list,
    "columns": list,
    "folder": str,
    "seeds": int,
    "packed": bool,
    "figures": list,
    "ours": list,
    "set": dict,
    "teacher": dict,
    "row": dict,
    "column": dict,
    "published": list,
    "published_of": str,
}
_NEEDED = ("title", "config", "rows", "columns")
_PART = {"label": str, "config": str, "set": dict, "teacher": str, "of": str, "generation": int}
_TEACHER = {"config": str, "set": dict, "workdir": str}
_FIGURE = {"row": str, "column": str, "figure": str, "value": float, "std": float,
           "epoch": str, "source": str}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Part:
    """A row or a column.

    Attributes:
        name: by which the command line and the folders call it.
        label: what the table calls it.
        config: its own configuration file, empty for the table's.
        settings: its own fields, by dotted path.
        teacher: of a column, the teacher's name; empty: the part of its name before a hyphen.
        of: of a row that is read from another row's run, the name of that row.
        generation: which of that chain's runs.
    """

    name: str
    label: str
    config: str = ""
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    teacher: str = ""
    of: str = ""
    generation: int | None = None


@dataclasses.dataclass(frozen=True)
class Teacher:
    """Who is trained, or has to be there, before the students.

    Attributes:
        name: of its folder.
        config: its configuration file; empty where it is not trained here.
        settings: its own fields.
        workdir: where it has to be, if it is not trained here.
    """

    name: str
    config: str
    settings: Mapping[str, Any]
    workdir: str = ""


@dataclasses.dataclass(frozen=True)
class Published:
    """A figure of a paper.

    Attributes:
        value: in the paper's unit: percent for accuracies.
        std: over its seeds, where it is told.
        epoch: which epoch it is of: `last`, `best on test`, or `unknown`.
        source: where it is from.
    """

    value: float
    std: float | None
    epoch: str
    source: str


@dataclasses.dataclass(frozen=True)
class Table:
    """A table; see the module.

    Attributes:
        name: of its file.
        title: heading.
        about: what it shows and what it departs from, in a paragraph.
        config: of a cell.
        rows: what is compared.
        columns: on what.
        teachers: by name; `any` stands for all that have no section.
        folder: of its runs, which tables with common runs share.
        seeds: how many of each cell.
        packed: whether several seeds of a cell are one program; None: where that pays.
        figures: what else is shown besides test accuracy.
        ours: rows that are compared with the best of the others.
        settings: fields of every student.
        published: by (row, column, figure).
    """

    name: str
    title: str
    about: str
    config: str
    rows: tuple[Part, ...]
    columns: tuple[Part, ...]
    teachers: Mapping[str, Teacher]
    folder: str
    seeds: int
    packed: bool | None
    figures: tuple[str, ...]
    ours: tuple[str, ...]
    settings: Mapping[str, Any]
    published: Mapping[tuple[str, str, str], Published]

    def teacher_of(self, column: Part) -> Teacher | None:
        """Who teaches in a column; None where nobody is declared."""
        name = column.teacher or column.name.partition("-")[0]
        found = self.teachers.get(name) or self.teachers.get("any")
        if found is None:
            return None
        return dataclasses.replace(
            found,
            name=name,
            config=found.config.replace("{teacher}", name),
            workdir=found.workdir.replace("{teacher}", name),
        )

    def restricted(self, rows: list[str], columns: list[str], seeds: int | None) -> Table:
        """The same table with some of its rows and columns only.

        Args:
            rows: names; empty for all.
            columns: names; empty for all.
            seeds: how many; None for as many as declared.

        Raises:
            ConfigError: a name that it does not have.
        """
        chosen = {}
        for flag, names, parts in (("methods", rows, self.rows), ("pairs", columns, self.columns)):
            known = {part.name: part for part in parts}
            for name in names:
                if name not in known:
                    raise ConfigError(
                        f"--{flag}={name}: table {self.name!r} has no such "
                        f"{'row' if flag == 'methods' else 'column'}{nearest(name, known)}"
                    )
            chosen[flag] = tuple(known[name] for name in names) or parts
        return dataclasses.replace(
            self, rows=chosen["methods"], columns=chosen["pairs"], seeds=seeds or self.seeds
        )


def names(folder: pathlib.Path = FOLDER) -> list[str]:
    """The tables that there are."""
    return sorted(path.stem for path in folder.glob("*.toml"))


def load(name: str, folder: pathlib.Path = FOLDER) -> Table:
    """Reads a table.

    Args:
        name: of a file in the folder, or the path of one anywhere.
        folder: where tables are.

    Raises:
        ConfigError: no such table, or what is wrong with its file.
    """
    path = pathlib.Path(name) if name.endswith(".toml") else folder / f"{name}.toml"
    if not path.is_file():
        raise ConfigError(f"--table={name}: no such table{nearest(name, names(folder))}")
    try:
        found = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not TOML: {error}") from error
    _check(found, _TABLE, str(path), _NEEDED)
    parts = {
        kind: tuple(_part(n, found.get(kind, {}), f"{path}: {kind}") for n in found[f"{kind}s"])
        for kind in ("row", "column")
    }
    _check_names(found, path)
    return Table(
        name=path.stem,
        title=found["title"],
        about=" ".join(found.get("about", "").split()),
        config=found["config"],
        rows=parts["row"],
        columns=parts["column"],
        teachers={
            key: _teacher(key, value, f"{path}: teacher.{key}")
            for key, value in found.get("teacher", {}).items()
        },
        folder=found.get("folder", path.stem),
        seeds=found.get("seeds", 5),
        packed=found.get("packed"),
        figures=tuple(found.get("figures", ())),
        ours=tuple(found.get("ours", ())),
        settings=found.get("set", {}),
        published={
            **_of_dataset(found.get("published_of", "")),
            **dict(_figure(each, f"{path}: published") for each in found.get("published", ())),
        },
    )


def _part(name: str, sections: Mapping[str, Any], where: str) -> Part:
    section = sections.get(name, {})
    _check(section, _PART, f"{where}.{name}")
    return Part(
        name=name,
        label=section.get("label", name),
        config=section.get("config", ""),
        settings=section.get("set", {}),
        teacher=section.get("teacher", ""),
        of=section.get("of", ""),
        generation=section.get("generation"),
    )


def _teacher(name: str, section: Any, where: str) -> Teacher:
    _check(section, _TEACHER, where)
    if ("config" in section) == ("workdir" in section):
        raise ConfigError(
            f"{where}: needs either config (it is trained here) or workdir (it has to be there)"
        )
    return Teacher(
        name, section.get("config", ""), section.get("set", {}), section.get("workdir", "")
    )


def _figure(section: Any, where: str) -> tuple[tuple[str, str, str], Published]:
    _check(section, _FIGURE, where, ("row", "column", "value", "source"))
    key = section["row"], section["column"], section.get("figure", "test/accuracy")
    return key, Published(
        section["value"], section.get("std"), section.get("epoch", "unknown"), section["source"]
    )


def _of_dataset(name: str) -> dict[tuple[str, str, str], Published]:
    """What results/published.json has of a dataset."""
    if not name:
        return {}
    known = json.loads(PUBLISHED.read_text())
    if name not in known:
        raise ConfigError(f"published_of={name!r}: not in {PUBLISHED}{nearest(name, known)}")
    found: dict[tuple[str, str, str], Published] = {}
    for row in known[name]["rows"]:
        for pair, value in row["top1"].items():
            key = row["method"] or row["label"], pair, "test/accuracy"
            # Of two that were printed of one method the first is the one that is shown.
            std = row.get("std", {}).get(pair)
            found.setdefault(key, Published(value, std, row["epoch"], row["source"]))
    return found


def _check(
    section: Any, known: Mapping[str, type], where: str, needed: tuple[str, ...] = ()
) -> None:
    if not isinstance(section, dict):
        raise ConfigError(f"{where}={section!r}: must be a section with {', '.join(known)}")
    for key, value in section.items():
        if key not in known:
            raise ConfigError(f"{where}: {key}: no such key{nearest(key, known)}")
        kind = known[key]
        right = isinstance(value, (int, float) if kind is float else kind)
        if not right or (kind is not bool and isinstance(value, bool)):
            raise ConfigError(f"{where}: {key}={value!r}: must be of type {kind.__name__}")
    for key in needed:
        if key not in section:
            raise ConfigError(f"{where}: {key}: missing")


def _check_names(found: Mapping[str, Any], path: pathlib.Path) -> None:
    """Names that are folders, and sections that name a row or a column there is."""
    for kind in ("row", "column"):
        listed = found[f"{kind}s"]
        for name in listed:
            if not isinstance(name, str) or not name or set(name) & set("/\\ ,:{}"):
                raise ConfigError(f"{path}: {kind}s: {name!r}: must be a word, it names a folder")
        if len(set(listed)) < len(listed) or not listed:
            raise ConfigError(f"{path}: {kind}s={listed}: must be several different names")
        for name, section in found.get(kind, {}).items():
            if name not in listed:
                raise ConfigError(f"{path}: {kind}.{name}: not in {kind}s{nearest(name, listed)}")
            of = section.get("of", "")
            if of and of not in listed:
                raise ConfigError(f"{path}: {kind}.{name}: of={of!r}: not in {kind}s")
    for name in found.get("ours", ()):
        if name not in found["rows"]:
            raise ConfigError(f"{path}: ours: {name!r}: not in rows{nearest(name, found['rows'])}")
    if found.get("seeds", 1) < 1:
        raise ConfigError(f"{path}: seeds={found['seeds']}: must be positive")
