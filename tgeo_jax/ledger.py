"""The ledger: one JSON line for each finished run, and their table beside the published figures.

A line holds what a figure needs to be believed and repeated: the configuration, the data's digest,
every seed's accuracy, the device and the commit. Nothing is typed in by hand, and the table shows
no figure of ours without its line.
"""

from __future__ import annotations

import datetime
import json
import pathlib
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from tgeo_jax import workdir, writers
from tgeo_jax.comparison import percent
from tgeo_jax.errors import DataError

Record = dict[str, Any]
FIELDS = (
    "date", "pair", "method", "axes", "student", "teacher", "dataset", "selection", "seeds",
    "per_seed", "test_accuracy", "teacher_test_accuracy", "device", "versions", "commit",
    "median_epoch_seconds", "seconds", "recipe",
)  # fmt: skip
METHODS = (  # the order of the table's rows; "teacher" is the teacher's network trained alone
    "teacher", "plain", "kd", "annealed", "ada", "wls", "rw", "bikd", "tgeo",
    "dkd", "dist", "logit_std", "cmkd", "dml", "trikd",
)  # fmt: skip
NONE = "\N{EN DASH}"
TIMES = "\N{MULTIPLICATION SIGN}"
_IDENTITY = ("recipe", "seeds", "dataset", "commit", "device")
_WHICH = ("last", "best_by_validation")
_OTHER = ("train.epochs", "data.batch_size", "data.fraction")  # columns of "other runs"


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
    written = (folder.path / "result.json").stat().st_mtime
    held_out, per_seed = config["data"]["validation_fraction"], result["per_seed"]
    return {
        "date": datetime.datetime.fromtimestamp(written, datetime.UTC).strftime("%FT%TZ"),
        "pair": student if teacher is None else f"{teacher}-{student}",
        "method": method(config),
        "axes": {**axes, "role": config["role"]["name"]},
        "student": student,
        "teacher": teacher,
        "dataset": result["dataset"],
        "selection": {"fraction": held_out, "count": result["dataset"]["validation"]},
        "seeds": [seed["seed"] for seed in per_seed],
        "per_seed": per_seed,
        "test_accuracy": {which: _mean_and_std(per_seed, which) for which in _WHICH},
        "teacher_test_accuracy": result["teacher"] and result["teacher"]["test_accuracy"],
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
    if commit == "unknown" or (commit.endswith("-dirty") and not allow_dirty):
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
    writers.write_atomically(path, lines)


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
    lines = enumerate(path.read_text().splitlines(), 1)
    return [_parsed(line, f"{path}, line {number}", FIELDS) for number, line in lines]


def render(records: Iterable[Record], published: Mapping[str, Any]) -> str:
    """The Markdown page of a ledger, with the published figures where they can be compared.

    Args:
        records: from `read`.
        published: by dataset, as results/published.json: the standard recipe, groups of pairs, and
            rows of figures.

    Returns:
        For each dataset one table per group of pairs, holding runs of the standard recipe only, a
        table of all other runs, and the notes that the cells' numbers in brackets refer to.

    Examples:
        >>> render([], {})
        'No runs yet.\\n'
    """
    if not (records := list(records)):
        return "No runs yet.\n"
    notes: dict[str, int] = {}
    lines = [
        "Test accuracy in percent. Ours: mean ± sample standard deviation over the seeds after the",
        "last epoch / mean at the epoch of the best validation accuracy (number of seeds) [note].",
        "",
    ]
    for name in dict.fromkeys(record["dataset"]["name"] for record in records):
        of_dataset = [record for record in records if record["dataset"]["name"] == name]
        lines += [f"## {name}", "", *_dataset(of_dataset, published.get(name, {}), notes)]
    lines += ["## Notes", "", "The ledger holds each run's whole configuration.", ""]
    return "\n".join([*lines, *(f"{number}. {text}" for text, number in notes.items())]) + "\n"


def _dataset(records: list[Record], published: Mapping[str, Any], notes: dict) -> list[str]:
    standard = [record for record in records if not _deviations(record, published)]
    lines, placed = [], []
    for group in published.get("groups", ()):
        own = [r for r in standard if any(_place(r, pair) for pair in group["pairs"])]
        if own:
            recipe = f"Our runs by the standard recipe: {_settings(published['recipe'])}."
            lines += [f"### {group['name']}", "", recipe, ""]
            lines += [*_group(group["pairs"], own, published["rows"], notes), ""]
            placed += own
    if published and not placed:
        lines += ["No run by the standard recipe stands beside the published rows yet.", ""]
    others = [record for record in records if record not in placed]
    return lines + (_other_runs(others, published, notes) if others else [])


def _group(pairs: list[str], records: list[Record], rows: list[dict], notes: dict) -> list[str]:
    """One table: a row for each method and under it the published ones, a column for each pair."""
    rows = [row for row in rows if any(pair in row["top1"] for pair in pairs)]
    named = {row["method"] for row in rows if row["method"]}
    named |= {place for r in records for pair in pairs for place in _place(r, pair)}
    order = [name for name in METHODS if name in named] + sorted(named - {*METHODS})
    lines = [_row("method", *pairs), _row("---", *["---"] * len(pairs))]
    for name in order:
        cells = []
        for pair in pairs:
            found = [_cell(r, notes) for r in records if name in _place(r, pair)]
            cells.append("<br>".join(found) or NONE)
        lines.append(_row(name, *cells))
        lines += [_published_row(row, pairs, notes) for row in rows if row["method"] == name]
    return lines + [_published_row(row, pairs, notes) for row in rows if not row["method"]]


def _published_row(row: Mapping[str, Any], pairs: list[str], notes: dict) -> str:
    note = _note(notes, f"Published; source: {row['source']}. {row['remark']}".strip())
    cells = []
    for pair in pairs:
        std = row.get("std", {}).get(pair)
        figure = f"{row['top1'][pair]:.2f}" if pair in row["top1"] else NONE
        cells.append(figure if std is None else f"{figure} ± {std:.2f}")
    return _row(f"published: {row['label']} (epoch: {row['epoch']}) {note}", *cells)


def _other_runs(records: list[Record], published: Mapping[str, Any], notes: dict) -> list[str]:
    header = ["method", "pair", "accuracy", "epochs", "batch size", "data fraction"]
    header += ["other differences from the standard recipe", "seeds", "device", "commit"]
    lines = ["### Other runs", "", "Not to be compared with published rows.", ""]
    lines += [_row(*header), _row(*["---"] * len(header))]
    for record in records:
        changed = _deviations(record, published).items()
        settings = _settings({field: value for field, value in changed if field not in _OTHER})
        cells = [record["method"], record["pair"], _cell(record, notes)]
        cells += [str(_field(record["recipe"], path, 1.0)) for path in _OTHER]
        cells += [settings or NONE, str(record["seeds"])[1:-1], record["device"]]
        lines.append(_row(*cells, _short(record["commit"])))
    return [*lines, ""]


def _place(record: Record, pair: str) -> tuple[str, ...]:
    """The rows of a pair's column that a run belongs in; networks trained alone serve many."""
    if record["method"] != "plain":
        return (record["method"],) if record["pair"] == pair else ()
    networks = zip(("teacher", "plain"), pair.split("-"), strict=True)
    return tuple(row for row, network in networks if network == record["student"])


def _deviations(record: Record, published: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for field, standard in published.get("recipe", {}).items():
        if isinstance(standard, dict):
            standard = standard.get(record["student"], standard["others"])
        # What a configuration lacks came later, with what was done before as its default.
        value = _field(record["recipe"], field, standard)
        if value != standard:
            found[field] = value
    return found


def _cell(record: Record, notes: dict) -> str:
    last, best = (record["test_accuracy"][which] for which in ("last", "best_by_validation"))
    seeds = f"{len(record['seeds'])} seed" + "s" * (len(record["seeds"]) > 1)
    figures = f"{percent(last)} / {percent({**best, 'std': None})}"
    return f"{figures} ({seeds}) {_note(notes, _provenance(record))}"


def _provenance(record: Record) -> str:
    dataset, selection = record["dataset"], record["selection"]
    parts = [
        f"Selection on {selection['count']} images ({100 * selection['fraction']:g} % of the "
        f"training split), trained on {dataset['train']}, tested on {dataset['test']}",
        f"data {dataset['digest'][:8]}",
        f"seeds {str(record['seeds'])[1:-1]}",
        record["device"],
        f"commit {_short(record['commit'])}",
        _field(record["recipe"], "precision", "float32"),
    ]
    if record["teacher"] is not None:
        parts.append(f"teacher's test accuracy {100 * record['teacher_test_accuracy']:.2f}")
        axes = [("loss", part) for part in record["axes"]["loss"].split("+")]
        for axis, name in [*axes, ("ratio", record["axes"]["ratio"])]:
            parts.append(f"{name}({_settings(record['recipe'][axis][name])})")
        parts.append(record["axes"]["role"])
    return "; ".join(parts) + "."


def _finished(folder: workdir.Workdir) -> tuple[dict[str, Any], dict[str, Any]]:
    """Configuration and result, which count only if the log tells of the same run."""
    config = _loaded(folder.path / "config.json", "no run there; name the folder of a finished run")
    missing = "the run has not finished; run its command again, it resumes"
    result = _loaded(folder.path / "result.json", missing)
    lacking = [name for name in ("commit", "dataset", "epoch_seconds") if not result.get(name)]
    if lacking:
        raise DataError(
            f"{folder.path / 'result.json'}: lacks {', '.join(lacking)}: an older version trained "
            "it; train it with this version, in a new workdir"
        )
    metrics = [folder, *folder.generations()][-1].metrics  # a chain's result is that of its last
    logged = {(r["seed"], r["step"]): r for r in writers.read_records(metrics)}
    for seed in result["per_seed"]:
        for which in _WHICH:
            step = result["steps"] if which == "last" else seed[which]["step"]
            found = logged.get((seed["seed"], step), {}).get("test/accuracy")
            if found != seed[which]["test/accuracy"]:
                raise DataError(
                    f"{metrics}: test/accuracy of seed {seed['seed']} at step {step} is {found}, "
                    f"result.json says {seed[which]['test/accuracy']}: restore the file, or train "
                    "the run again in a new workdir"
                )
    return config, result


def _loaded(path: pathlib.Path, missing: str) -> dict[str, Any]:
    if not path.exists():
        raise DataError(f"{path}: no such file: {missing}")
    return _parsed(path.read_text(), str(path), ())


def _parsed(text: str, where: str, fields: Iterable[str]) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON ({error.msg}); restore the file") from error
    lacking = [field for field in fields if not isinstance(found, dict) or field not in found]
    if lacking:
        raise DataError(f"{where}: lacks {', '.join(lacking)}; restore the file")
    return found


def _teacher_name(config: Mapping[str, Any]) -> str:
    if config["role"]["name"] != "several":
        return config["teacher"]["name"]
    missing = "a teacher in role.several.workdirs, whose network only this file names; restore it"
    paths = map(pathlib.Path, config["role"]["several"]["workdirs"])
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


def _field(recipe: Any, path: str, default: Any) -> Any:
    for part in path.split("."):
        if part not in recipe:
            return default
        recipe = recipe[part]
    return recipe


def _settings(fields: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={json.dumps(value)}" for name, value in fields.items())


def _note(notes: dict[str, int], text: str) -> str:
    return f"[{notes.setdefault(text, len(notes) + 1)}]"


def _short(commit: str) -> str:
    name, dirty, _ = commit.partition("-dirty")
    return name[:7] + dirty


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"
