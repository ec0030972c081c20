"""The runs of a table: their configurations, the commands that train them, what is done already."""

from __future__ import annotations

import dataclasses
import importlib.util
import pathlib
import sys
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from experiments.reproduction.declared import Part, Table, Teacher
from tgeo_jax import config as configs
from tgeo_jax import generations, storage, writers
from tgeo_jax.data import sources
from tgeo_jax.errors import ConfigError, DataError, TgeoError
from tgeo_jax.workdir import Workdir

DONE, BEGUN, WAITING, MISSING = "done", "begun", "to do", "cannot run"


@dataclasses.dataclass(frozen=True)
class Run:
    """One call of `experiments.main`.

    Attributes:
        name: of its folder below the table's.
        source: the configuration file with its argument; empty for what is not trained here.
        flags: the fields that differ from the file's, as on the command line.
        config: the whole configuration.
        workdir: its folder.
        needs: name of the run that has to be finished before; empty if none.
        missing: why it cannot run here; empty if it can.
    """

    name: str
    source: str
    flags: tuple[str, ...]
    config: ConfigDict
    workdir: storage.Path
    needs: str = ""
    missing: str = ""

    @property
    def command(self) -> list[str]:
        """What trains it, from the repository's folder."""
        return [
            *("python", "-m", "experiments.main"),
            f"--config={self.source}",
            f"--workdir={self.workdir}",
            *self.flags,
        ]

    @property
    def folder(self) -> Workdir:
        return Workdir(self.workdir)

    def status(self) -> tuple[str, float]:
        """What is done of it: one of the constants above, and the share of its epochs.

        A finished run may have been moved together with its teacher.

        Raises:
            ConfigError: its folder holds a run of another configuration.
        """
        is_done = self.folder.result() is not None
        if self.source:
            changed = self.folder.changes(self.config)
            if not is_done or any(not each.startswith("teacher.workdir:") for each in changed):
                self.folder.check_same(self.config)
        if is_done:
            return DONE, 1.0
        if self.missing:
            return MISSING, 0.0
        share = _share(self)
        return (BEGUN if share else WAITING), share


@dataclasses.dataclass(frozen=True)
class Cell:
    """A row in a column.

    Attributes:
        row: which.
        column: which.
        runs: names of the runs that its seeds are in.
    """

    row: Part
    column: Part
    runs: tuple[str, ...]


def stages(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """What is left to train, teachers and other runs that wait for nobody first.

    Args:
        runs: of a table.

    Returns:
        `teachers` and `students`; a stage in which nothing is left is not there.
    """
    left = [run for run in runs if run.source and run.status()[0] not in (DONE, MISSING)]
    found = {
        "teachers": [run for run in left if not run.needs],
        "students": [run for run in left if run.needs],
    }
    return {stage: own for stage, own in found.items() if own}


def settings(given: Sequence[str]) -> dict[str, Any]:
    """What --set says, its values in TOML or else text.

    Args:
        given: `FIELD=VALUE` each.

    Raises:
        ConfigError: no equals sign.

    Examples:
        >>> settings(["train.epochs=2", "data.dir=gs://bucket/data"])
        {'train.epochs': 2, 'data.dir': 'gs://bucket/data'}
    """
    found = {}
    for each in given:
        field, equals, value = each.partition("=")
        if not equals:
            raise ConfigError(f"--set={each}: must be FIELD=VALUE")
        try:
            found[field] = tomllib.loads(f"it = {value}")["it"]
        except tomllib.TOMLDecodeError:
            found[field] = value
    return found


def of_table(
    table: Table, workdir: storage.Path, settings: Mapping[str, Any] | None = None
) -> tuple[dict[str, Run], list[Cell]]:
    """All runs of a table, teachers first, and its cells.

    Cells with the same configuration, such as a plain student under several teachers, share runs.

    Args:
        table: from `declared.load`.
        workdir: folder of all its runs.
        settings: fields of every run, teachers too, by dotted path.

    Raises:
        ConfigError: a configuration that cannot run, with the run's name.
    """
    found: dict[str, Run] = {}
    cells = []
    of_rows = {row.name: row for row in table.rows}
    for column in table.columns:
        for row in table.rows:
            trained = of_rows.get(row.of, row) if row.of else row
            runs = _of_cell(table, trained, column, workdir, settings or {}, found)
            cells.append(Cell(row, column, tuple(run.name for run in runs)))
            found.update({run.name: run for run in runs})
    return found, cells


def _of_cell(
    table: Table,
    row: Part,
    column: Part,
    workdir: storage.Path,
    everywhere: Mapping[str, Any],
    found: dict[str, Run],
) -> list[Run]:
    source = (row.config or column.config or table.config).format(row=row.name, column=column.name)
    name = f"{column.name}/{row.name}"
    base = _loaded(source, name)
    config = base.copy_and_resolve_references()
    for settings in (table.settings, column.settings, row.settings, everywhere):
        _set(config, settings, name)
    needs = ""
    if config.teacher.workdir:
        teacher = table.teacher_of(column)
        needs = _with_teacher(teacher, config, name, workdir, everywhere, found)
    is_packed = table.packed if table.packed is not None else config.data.pipeline == "resident"
    groups = [(config.seed, table.seeds)]
    if not is_packed:
        groups = [(config.seed + index, 1) for index in range(table.seeds)]
    runs = []
    for seed, seeds in groups:
        own = config.copy_and_resolve_references()
        own.seed, own.seeds = seed, seeds
        folder = name if is_packed else f"{name}/seed_{seed}"
        run = _run(folder, source, base, own, workdir, needs, found)
        same = (other for other in found.values() if _is_same(other.config, own))
        runs.append(run if run.name in found else next(same, run))
    return runs


def _is_same(one: ConfigDict, other: ConfigDict) -> bool:
    """Whether two configurations train the same: what names a teacher that nobody asks is equal."""

    def asked(config: ConfigDict) -> dict[str, Any]:
        fields = config.to_dict()
        return {**fields, "teacher": None} if config.role.name == "alone" else fields

    return asked(one) == asked(other)


def _run(
    name: str,
    source: str,
    base: ConfigDict,
    config: ConfigDict,
    workdir: storage.Path,
    needs: str,
    found: Mapping[str, Run],
) -> Run:
    try:
        configs.check(config)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error
    missing = _missing_data(config)
    if needs and found[needs].missing:
        missing = f"{needs} cannot be had: {found[needs].missing}"
    if name in found and found[name].config.to_dict() != config.to_dict():
        raise ConfigError(f"{name}: two different runs with this name; rename a row or a column")
    flags = tuple(_flags(base.to_dict(), config.to_dict()))
    return Run(name, source, flags, config, workdir / name, needs, missing)


def _with_teacher(
    teacher: Teacher | None,
    config: ConfigDict,
    name: str,
    workdir: storage.Path,
    everywhere: Mapping[str, Any],
    found: dict[str, Run],
) -> str:
    """Points a student to its teacher, which is added to the runs; returns the teacher's name."""
    if teacher is None:
        raise ConfigError(f"{name}: teacher: no section [teacher.any] or of that name declares it")
    known = f"teachers/{teacher.name}"
    if teacher.workdir:
        config.teacher.workdir = teacher.workdir
        missing = ""
        if not storage.exists(storage.path(teacher.workdir) / "result.json"):
            missing = f"teacher.workdir={teacher.workdir!r}: no finished run there"
        place = storage.path(teacher.workdir)
        found.setdefault(known, Run(known, "", (), config, place, missing=missing))
        return known
    config.teacher.workdir = str(workdir / known)
    if known not in found:
        base = _loaded(teacher.config, known)
        own = base.copy_and_resolve_references()
        for settings in (teacher.settings, everywhere):
            _set(own, settings, known)
        found[known] = _run(known, teacher.config, base, own, workdir, "", found)
    config.teacher.update(found[known].config.student.to_dict())
    return known


def _missing_data(config: ConfigDict) -> str:
    try:
        dataset = sources.builder(config.data.name, config.data.dir)
        sources.check_prepared(dataset, config.data.name, config.data.dir)
    except TgeoError as error:
        return str(error)
    return ""


def _loaded(source: str, name: str) -> ConfigDict:
    """What the configuration file returns; see experiments.main."""
    path, _, argument = source.partition(":")
    if not pathlib.Path(path).is_file():
        raise ConfigError(f"{name}: config={source!r}: no such file")
    spec = importlib.util.spec_from_file_location(f"_config_{abs(hash(path))}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    try:
        return module.get_config(argument) if argument else module.get_config()
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error


def _set(config: ConfigDict, settings: Mapping[str, Any], name: str) -> None:
    for field, value in settings.items():
        said = configs.unknown_field(config, field)
        if said is not None:
            raise ConfigError(f"{name}: {said}")
        new = tuple(value) if isinstance(value, list) else value
        try:
            config.update_from_flattened_dict({field: new})
        except TypeError as error:
            raise ConfigError(f"{name}: {field}={value!r}: {error}") from error


def _flags(base: Mapping[str, Any], config: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The fields in which a configuration differs, as experiments.main takes them.

    Examples:
        >>> _flags({"a": {"b": 1, "c": ()}}, {"a": {"b": 2, "c": (3, 4)}})
        ['--config.a.b=2', '--config.a.c=(3,4)']
    """
    found: list[str] = []
    for name, value in config.items():
        if isinstance(value, dict):
            found += _flags(base[name], value, f"{prefix}{name}.")
        elif value != base[name]:
            found.append(f"--config.{prefix}{name}={_shown(value)}")
    return found


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Sequence) and not isinstance(value, str):
        return repr(tuple(value)).replace(" ", "")
    return str(value)


def _share(run: Run) -> float:
    """Of a run that has not finished, the share of its epochs that its log tells of."""
    folders = run.folder.generations() if storage.exists(run.workdir) else []
    chain = generations.is_chain(run.config)
    total = run.config.role.trikd.generations + 1 if chain else 1
    shares = [_logged(folder, run.config.train.epochs) for folder in folders or [run.folder]]
    return sum(shares) / total


def _logged(folder: Workdir, epochs: int) -> float:
    if not storage.exists(folder.metrics):
        return 0.0
    try:
        epoch = max((record["epoch"] for record in writers.read_records(folder.metrics)), default=0)
    except (DataError, ValueError):
        return 0.0
    return min(1.0, epoch / epochs)
