"""What a report says in words and tables: who won, what it cost, what differed."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from tgeo_jax import comparison, selection
from tgeo_jax.workdir import Workdir

Results = Mapping[str, dict[str, Any]]
NONE = "\N{EN DASH}"
_LAST = "last"
_ROUNDING = 1e-6  # accuracies are counts over a split, in float32


class Ranked(NamedTuple):
    """By what runs are ranked, best first."""

    figure: str  # of the test split
    which: str
    names: list[str]


class Table(NamedTuple):
    """Of texts; the first column names the row."""

    heads: list[str]
    rows: list[list[str]]


def also_chosen(results: Results) -> list[str]:
    """The figures besides accuracy that chose epochs.

    Examples:
        >>> also_chosen({"kd": {"select_by": "auc"}, "old": {}})
        ['auc']
    """
    names = (result.get("select_by", "accuracy") for result in results.values())
    return [name for name in dict.fromkeys(names) if name != "accuracy"]


def ranked(results: Results) -> Ranked:
    """The runs by test accuracy after the last epoch, or by the figure that chose their epochs.

    Examples:
        >>> result = {"test_accuracy": {"last": {"mean": 0.9}}}
        >>> ranked({"kd": result}).figure
        'accuracy'
    """
    figures = {result.get("select_by", "accuracy") for result in results.values()}
    figure, which = "accuracy", _LAST
    if len(figures) == 1 and figures != {"accuracy"}:
        (chosen,) = figures
        if all(_mean(result, chosen, "best_by_validation") for result in results.values()):
            figure, which = chosen, "best_by_validation"
    sign = selection.FIGURES[figure]

    def order(name: str) -> float:
        found = _mean(results[name], figure, which)
        assert found is not None
        return -sign * found["mean"] if np.isfinite(found["mean"]) else np.inf

    return Ranked(figure, which, sorted(results, key=order))


def _mean(result: Mapping[str, Any], figure: str, which: str) -> dict[str, Any] | None:
    if figure == "accuracy":
        return result["test_accuracy"][which]
    return result.get("figures", {}).get(which, {}).get(f"test/{figure}")


def against(
    result: Mapping[str, Any], other: Mapping[str, Any], by: Ranked
) -> tuple[float, float, int] | None:
    """Mean difference, p of the paired t-test and number of seeds that both have; None: no seed.

    p is 0 where the difference is the same for each seed, up to rounding, and not 0.
    """
    own, theirs = (
        {
            seed["seed"]: seed[by.which][f"test/{by.figure}"]
            for seed in each["per_seed"]
            if f"test/{by.figure}" in seed.get(by.which, {})
        }
        for each in (result, other)
    )
    shared = sorted(own.keys() & theirs.keys())
    if not shared:
        return None
    ours, others = ([values[seed] for seed in shared] for values in (own, theirs))
    apart = np.subtract(ours, others)
    if len(shared) > 1 and 0 < np.ptp(apart) < _ROUNDING:
        return float(apart.mean()), 0.0, len(shared)
    return *comparison.paired(ours, others), len(shared)


def summary(results: Results) -> list[str]:
    """Sentences: the best run, and by how much it is better than the next."""
    by = ranked(results)
    first, *others = by.names
    when = "after the last epoch" if by.which == _LAST else "at the epoch that validation chose"
    told = [
        f"{'Best' if others else 'Test'} {_figure(by)} {when}: {first}, "
        f"{_told(results[first], by)}, over {_count(len(results[first]['per_seed']), 'seed')}."
    ]
    if others:
        told.append(_next(results, first, others[0], by))
    if others and len(others) > 1:
        last = by.names[-1]
        told.append(f"Last of {len(by.names)}: {last}, {_told(results[last], by)}.")
    elsewhere = [name for name in others if _digest(results[name]) != _digest(results[first])]
    if elsewhere:
        told.append(f"Trained on other data than {first}: {', '.join(elsewhere)}.")
    for name, result in results.items():
        if result.get("stopped_early"):
            told.append(f"{name} stopped early, after {result['epochs']} epochs.")
    return told


def _digest(result: Mapping[str, Any]) -> str | None:
    return result.get("dataset", {}).get("digest")


def _next(results: Results, first: str, second: str, by: Ranked) -> str:
    text = f"Next: {second}, {_told(results[second], by)}"
    found = against(results[first], results[second], by)
    if found is None:
        return f"{text}; the two have no seed in common, so that no pairs can be tested."
    difference, p, seeds = found
    text += f". The difference over {_count(seeds, 'seed')} that both have is "
    text += _difference(abs(difference), by).lstrip("+")
    if np.isnan(p):
        return f"{text}; one seed says nothing of chance."
    if p == 0:  # no spread at all
        return f"{text}, the same for each: no t-test can judge that."
    verdict = "is more than" if p < 0.05 else "may be"
    return f"{text} (paired t-test: {_surprise(p)}): it {verdict} chance, at the 5 % level."


def _figure(by: Ranked) -> str:
    return comparison.NAMES[by.figure]


def _told(result: Mapping[str, Any], by: Ranked) -> str:
    found = _mean(result, by.figure, by.which)
    assert found is not None
    if by.figure == "accuracy":
        return f"{comparison.percent(found)} %"
    return comparison.decimal(found)


def _difference(value: float, by: Ranked) -> str:
    return f"{100 * value:+.2f} points" if by.figure == "accuracy" else f"{value:+.4f}"


def _surprise(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def differences(results: Results) -> list[str]:
    """Of each run the difference from the best one, with its p: a column of the table.

    Examples:
        >>> accuracy = {"last": {"mean": 0.5, "std": None}}
        >>> result = {"test_accuracy": accuracy, "per_seed": [{"seed": 0}]}
        >>> differences({"kd": result, "tgeo": result}) == ["best", NONE]
        True
    """
    by = ranked(results)
    column = []
    for name, result in results.items():
        found = against(result, results[by.names[0]], by)
        if name == by.names[0]:
            column.append("best")
        elif found is None:
            column.append(NONE)
        else:
            difference, p, _ = found
            told = _difference(difference, by).removesuffix(" points")
            column.append(told + (f" ({_surprise(p)})" if p > 0 else ""))
    return column


def method(config: Mapping[str, Any]) -> str:
    """Loss, ratio and role of a configuration.

    Examples:
        >>> method({"role": {"name": "frozen"}, "loss": {"name": "kl"}, "ratio": {"name": "ada"}})
        'kl, ada, frozen'
        >>> method({"role": {"name": "alone"}})
        'alone'
    """
    role = config.get("role", {}).get("name", "")
    axes = ["role"] if role == "alone" else ["loss", "ratio", "role"]
    return ", ".join(filter(None, (config.get(axis, {}).get("name", "") for axis in axes)))


def trust(arrays: Mapping[str, np.ndarray]) -> str:
    """How much the ratio trusts the teacher where that is right, and where not."""
    right = np.broadcast_to(arrays["teacher_right"], arrays["ratio"].shape)
    means = [
        f"{arrays['ratio'][where].mean():.3f} where it is {word} ({100 * where.mean():.0f} %)"
        for where, word in ((right, "right"), (~right, "wrong"))
        if where.any()
    ]
    return f"Mean weight of the teacher over the training samples: {', '.join(means)}."


def costs(results: Results, records: Mapping[str, list[dict[str, Any]]]) -> Table:
    """Time and device of every run."""
    rows = []
    for name, result in results.items():
        epochs = result.get("epoch_seconds", [])
        rates = [r["time/samples_per_second"] for r in records[name] if _RATE in r]
        rows.append(
            [
                name,
                f"{result['seconds']:.0f}",
                f"{statistics.median(epochs):.3g}" if epochs else NONE,
                f"{statistics.median(rates):.0f}" if rates else NONE,
                str(result.get("epochs", NONE)),
                str(result["steps"]),
                str(len(result["per_seed"])),
                result["device"],
            ]
        )
    heads = [
        "run", "seconds", "median epoch seconds", "samples per second", "epochs", "steps", "seeds",
        "device",
    ]  # fmt: skip
    return Table(heads, rows)


_RATE = "time/samples_per_second"


def environment(results: Results) -> Table:
    """Versions, commit and data of every run."""
    rows = []
    for name, result in results.items():
        versions, data = result["versions"], result.get("dataset", {})
        rows.append(
            [
                name,
                *(versions.get(package, NONE) for package in ("tgeo_jax", "jax", "python")),
                "+".join(map(_short, result.get("commit", NONE).split("+"))),
                data.get("name", NONE),
                data.get("digest", NONE)[:12],
                " / ".join(str(data[s]) for s in ("train", "validation", "test") if s in data),
                result.get("finished", NONE),
            ]
        )
    heads = [
        "run", "tgeo_jax", "jax", "python", "commit", "dataset", "its digest",
        "training / validation / test", "finished",
    ]  # fmt: skip
    return Table(heads, rows)


def _short(commit: str) -> str:
    digits, dash, changed = commit.partition("-")
    return digits[:12] + dash + changed


def config_differences(configs: Mapping[str, Mapping[str, Any]]) -> Table:
    """The fields in which the configurations differ, a column for each run.

    Examples:
        >>> config_differences({"a": {"x": {"y": 1}, "z": 0}, "b": {"x": {"y": 2}, "z": 0}}).rows
        [['x.y', '1', '2']]
    """
    flat = {name: dict(_flat(config)) for name, config in configs.items()}
    fields = dict.fromkeys(field for config in flat.values() for field in config)
    rows = []
    for field in sorted(fields):
        values = [json.dumps(each[field]) if field in each else NONE for each in flat.values()]
        if len(set(values)) > 1:
            rows.append([field, *values])
    return Table(["field", *flat], rows)


def _flat(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in config.items():
        if isinstance(value, dict):
            found += _flat(value, f"{prefix}{name}.")
        else:
            found.append((f"{prefix}{name}", value))
    return found


def teacher(result: Mapping[str, Any]) -> str:
    """How often the teacher is right, empty where nobody teaches."""
    about = result.get("teacher")
    if not about:
        return ""
    told = []
    if "train_accuracy" in about:
        told.append(f"{100 * about['train_accuracy']:.2f} % right on the training split")
    if "test_accuracy" in about:
        told.append(f"{100 * about['test_accuracy']:.2f} % on the test split")
    return f"Teacher: {', '.join(told)}." if told else ""


def finished(folder: Workdir) -> dict[str, Any]:
    """The result of a run.

    Raises:
        ValueError: it has not finished.
    """
    result = folder.result()
    if result is None:
        raise ValueError(f"{folder.path}: not finished; a report is made of finished runs")
    return result
