"""The ledger: one JSON line for each finished run, and their table beside the published figures.

A line holds what a figure needs to be believed and repeated: the configuration, the data's digest,
every seed's accuracy, the device and the commit. Nothing is typed in by hand, and the table shows
no figure of ours without its line.
"""

from __future__ import annotations

import json
import pathlib
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from tgeo_jax import outcome, storage, workdir, writers
from tgeo_jax.errors import DataError

Record = dict[str, Any]
FIELDS = (
    "date", "pair", "method", "axes", "student", "teacher", "dataset", "selection", "seeds",
    "per_seed", "test_accuracy", "teacher_test_accuracy", "teacher_fingerprint",
    "teacher_converted", "device", "versions", "commit",
    "median_epoch_seconds", "seconds", "recipe",
)  # fmt: skip
METHODS = (  # the order of the table's rows; "teacher" is the teacher's network trained alone
    "teacher", "plain", "kd", "annealed", "ada", "wls", "rw", "bikd", "tgeo",
    "dkd", "dist", "logit_std", "cmkd", "dml", "trikd",
)  # fmt: skip
TIMES = "\N{MULTIPLICATION SIGN}"
_IDENTITY = ("recipe", "seeds", "dataset", "teacher_fingerprint", "commit", "device")


def entry(folder: workdir.Workdir) -> Record:
    """The record of a finished run, from its config.json, result.json and metrics.jsonl.

    Args:
        folder: the run's folder, or that of a finished chain.

    Returns:
        A value for each of `FIELDS`, JSON-able; accuracies are shares, not percent. The recipe is
        the whole configuration without this machine's folders.

    Raises:
        DataError: no run, an unfinished or too old one, or files that contradict each other; or one
            of several teachers is gone, so that its network has no name.

    Examples:
        >>> entry(workdir.Workdir(pathlib.Path("/nowhere")))
        Traceback (most recent call last):
        ...
        tgeo_jax.errors.DataError: /nowhere/config.json: no such file: no run there; name the \
folder of a finished run
    """
    config, result = _finished(folder)
    alone = config["role"]["name"] == "alone"
    axes = {axis: None if alone else config[axis]["name"] for axis in ("loss", "ratio")}
    teacher = None if alone else _teacher_name(config)
    student = config["student"]["name"]
    about_teacher = result["teacher"] or {}
    held_out, per_seed = config["data"]["validation_fraction"], result["per_seed"]
    return {
        "date": result["finished"],
        "pair": student if teacher is None else f"{teacher}-{student}",
        "method": method(config),
        "axes": {**axes, "role": config["role"]["name"]},
        "student": student,
        "teacher": teacher,
        "dataset": result["dataset"],
        "selection": {"fraction": held_out, "count": result["dataset"]["validation"]},
        "seeds": [seed["seed"] for seed in per_seed],
        "per_seed": per_seed,
        "test_accuracy": {which: _mean_and_std(per_seed, which) for which in outcome.WHICH},
        "teacher_test_accuracy": about_teacher.get("test_accuracy"),
        "teacher_fingerprint": about_teacher.get("fingerprint"),
        "teacher_converted": about_teacher.get("converted", []),
        "device": result["device"],
        "versions": result["versions"],
        "commit": result["commit"],
        "median_epoch_seconds": statistics.median(result["epoch_seconds"]),
        "seconds": result["seconds"],
        "recipe": _without_folders(config),
    }


def method(config: Mapping[str, Any]) -> str:
    """What a run is called in the table, from its choices on the three axes.

    Args:
        config: a configuration as plain data.

    Returns:
        A name of `METHODS`, or loss, ratio and role where the combination has no name of its own.

    Examples:
        >>> from tgeo_jax.config import default
        >>> method(default().to_dict())
        'kd'
    """
    fixed = ("constant", "weighted")
    loss, ratio, role = (config[axis]["name"] for axis in ("loss", "ratio", "role"))
    if role == "alone":
        return "plain"
    if role in ("dml", "trikd") and loss == "kl" and ratio in fixed:
        return role
    if role in ("frozen", "cached") and not config["loss"]["weights"]:
        if loss == "kl" and ratio == "constant":
            return "kd"
        if loss == "kl" and ratio in METHODS:
            return ratio
        if loss in METHODS and ratio in fixed:
            return loss
    return f" {TIMES} ".join((loss, ratio, role))


def add(path: pathlib.Path, record: Record, *, allow_dirty: bool = False) -> None:
    """Appends a run to a ledger; the file is always whole.

    Args:
        path: the ledger; made if it is not there.
        record: from `entry`.
        allow_dirty: whether to take a run of code with changes that are in no commit.

    Raises:
        DataError: a run whose code cannot be named, one that is there already, or a damaged ledger.

    Examples:
        >>> add(pathlib.Path("runs.jsonl"), {"commit": "unknown"})  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        tgeo_jax.errors.DataError: commit='unknown': no commit holds the code that trained the ...
    """
    commit = record["commit"]
    unclear = "+" in commit or commit.endswith("-dirty")
    if commit == "unknown" or (unclear and not allow_dirty):
        raise DataError(
            f"commit={commit!r}: no commit holds the code that trained the run; train it from a "
            "clean git checkout, in a new workdir (--allow_dirty takes changed code all the same)"
        )
    records = read(path) if path.exists() else []
    for number, other in enumerate(records, 1):
        if all(other[field] == record[field] for field in _IDENTITY):
            raise DataError(
                f"{path}, line {number}: this run ({record['method']}, {record['pair']}, seeds "
                f"{record['seeds']}, commit {commit}) is there already"
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(each) + "\n" for each in [*records, record])
    storage.write_atomically(path, lines)


def read(path: pathlib.Path) -> list[Record]:
    """The records of a ledger, oldest first.

    Args:
        path: a file of JSON lines.

    Raises:
        DataError: no such file, or a damaged line, with its number.

    Examples:
        >>> read(pathlib.Path("/nowhere.jsonl"))
        Traceback (most recent call last):
        ...
        tgeo_jax.errors.DataError: /nowhere.jsonl: no such ledger; add a finished run first
    """
    if not path.exists():
        raise DataError(f"{path}: no such ledger; add a finished run first")
    lines = enumerate(path.read_bytes().splitlines(), 1)
    return [_parsed(line, f"{path}, line {number}", FIELDS) for number, line in lines]


def _finished(folder: workdir.Workdir) -> tuple[dict[str, Any], dict[str, Any]]:
    """Configuration and result, which count only if the log tells of the same run."""
    config = _loaded(folder.path / "config.json", "no run there; name the folder of a finished run")
    missing = "the run has not finished; run its command again, it resumes"
    result = _loaded(folder.path / "result.json", missing)
    if "converted" in config:
        raise DataError(f"{folder.path}: a converted network, not a run; nothing to add")
    needed = ("commit", "dataset", "epoch_seconds", "finished")
    lacking = [name for name in needed if not result.get(name)]
    if lacking:
        raise DataError(
            f"{folder.path / 'result.json'}: lacks {', '.join(lacking)}: an older version trained "
            "it; train it with this version, in a new workdir"
        )
    metrics = [folder, *folder.generations()][-1].metrics  # a chain's result is that of its last
    logged = {(r["seed"], r["step"]): r for r in writers.read_records(metrics)}
    for seed in result["per_seed"]:
        for which in outcome.WHICH:
            step = result["steps"] if which == "last" else seed[which]["step"]
            found = logged.get((seed["seed"], step), {}).get("test/accuracy")
            if found != seed[which]["test/accuracy"]:
                raise DataError(
                    f"{metrics}: test/accuracy of seed {seed['seed']} at step {step} is {found}, "
                    f"result.json says {seed[which]['test/accuracy']}: restore the file, or train "
                    "the run again in a new workdir"
                )
    return config, result


def _loaded(path: storage.Path, missing: str) -> dict[str, Any]:
    if not storage.exists(path):
        raise DataError(f"{path}: no such file: {missing}")
    return _parsed(storage.read_bytes(path), str(path), ())


def _parsed(text: bytes, where: str, fields: Iterable[str]) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (RecursionError, ValueError) as error:
        said = error.msg if isinstance(error, json.JSONDecodeError) else error
        raise DataError(f"{where}: not JSON ({said}); restore the file") from error
    lacking = [field for field in fields if not isinstance(found, dict) or field not in found]
    if lacking:
        raise DataError(f"{where}: lacks {', '.join(lacking)}; restore the file")
    if not isinstance(found, dict):
        raise DataError(f"{where}: no JSON object; restore the file")
    return found


def _teacher_name(config: Mapping[str, Any]) -> str:
    if config["role"]["name"] != "several":
        return config["teacher"]["name"]
    missing = "a teacher in role.several.workdirs, whose network only this file names; restore it"
    paths = map(storage.path, config["role"]["several"]["workdirs"])
    found = (_loaded(path / "config.json", missing)["student"]["name"] for path in paths)
    return "+".join(found)


def _without_folders(value: Any, field: str = "") -> Any:
    """A configuration as it is on every machine: of a run's folder only its own name is left."""
    if isinstance(value, dict):
        return {k: _without_folders(v, k) for k, v in value.items() if k != "dir"}
    if field == "workdirs":
        return [pathlib.PurePath(path).name for path in value]
    return pathlib.PurePath(value).name if field in ("workdir", "anchor") else value


def _mean_and_std(per_seed: list[dict], which: str) -> dict[str, float | None]:
    values = [seed[which]["test/accuracy"] for seed in per_seed]
    std = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": std}
