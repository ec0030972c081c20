"""The ledger as tables, each figure beside the published one of the same method and pair."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from tgeo_jax import config
from tgeo_jax.comparison import decimal, percent
from tgeo_jax.ledger import METHODS, Record
from tgeo_jax.outcome import mean_and_std

NONE = "\N{EN DASH}"
_OTHER = ("train.epochs", "data.batch_size", "data.fraction")  # columns of "other runs"
# What ends a run early, chooses another epoch or spoils data is a deviation from every recipe.
_STANDARD = {"train.patience": 0, "train.select_by": "accuracy", "data.outliers": 0.0}
_LEARNED = ("tgeo", "bikd", "rw")  # ratios that an outer loss trains


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
        "last epoch / mean at the epoch that validation chose, and the AUC there of two classes",
        "(number of seeds) [note].",
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
        told = "Our runs by the standard recipe"
        if not own:
            told = "None of our runs here is by the standard recipe yet"
        lines += [f"### {group['name']}", "", f"{told}: {_settings(published['recipe'])}.", ""]
        lines += [*_group(group["pairs"], own, published["rows"], notes), ""]
        placed += own
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
    for field, standard in {**published.get("recipe", {}), **_STANDARD}.items():
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
    areas = [seed["best_by_validation"].get("test/auc") for seed in record["per_seed"]]
    if None not in areas:  # of two classes
        figures += f", AUC {decimal(mean_and_std(areas))}"
    return f"{figures} ({seeds}) {_note(notes, _provenance(record))}"


def _provenance(record: Record) -> str:
    dataset, selection = record["dataset"], record["selection"]
    parts = [
        f"Selection on {selection['count']} examples ({100 * selection['fraction']:g} % of the "
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
        if record["axes"]["ratio"] in _LEARNED:
            parts.append(f"meta({_settings(_of_meta(record['recipe']['meta']))})")
        for about in record["teacher_converted"]:
            parts.append(
                f"teacher converted from {about['file']} ({about['sha256'][:8]}), which may have "
                "seen the selection images"
            )
    return "; ".join(parts) + "."


def _of_meta(meta: Mapping[str, Any]) -> dict[str, Any]:
    """What is not as by default of how the ratio is trained."""
    default = config.default().meta.to_dict()
    changed = {name: value for name, value in meta.items() if value != default.get(name)}
    rate = meta["optimizer"]
    changed["optimizer"] = f"{rate['name']} {rate['learning_rate']:g}"
    return changed


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
