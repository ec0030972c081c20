"""What the finished runs of a table say: a value for every seed of every cell."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.reproduction.declared import Table
from experiments.reproduction.runs import DONE, Cell, Run
from tgeo_jax import comparison, storage, writers
from tgeo_jax.data import splits
from tgeo_jax.workdir import Workdir

ACCURACY = "test/accuracy"
LAST, BEST = "last", "best_by_validation"


@dataclasses.dataclass(frozen=True)
class Found:
    """A cell's figures.

    Attributes:
        seeds: which have finished.
        values: by (figure, `first`, `last` or `best_by_validation`), one for each of these seeds.
        seconds: of training, all seeds together.
        missing: why some or all seeds are not there; empty if they all are.
    """

    seeds: tuple[int, ...]
    values: Mapping[tuple[str, str], tuple[float, ...]]
    seconds: float
    missing: str = ""

    def mean(self, figure: str, which: str) -> float | None:
        """Over the seeds; None where it was not measured."""
        found = self.values.get((figure, which))
        return statistics.fmean(found) if found else None

    def std(self, figure: str, which: str) -> float | None:
        """Sample standard deviation; None for a single seed."""
        found = self.values.get((figure, which), ())
        return statistics.stdev(found) if len(found) > 1 else None


def of_cell(table: Table, cell: Cell, runs: Mapping[str, Run], failed: Mapping[str, str]) -> Found:
    """Reads a cell's runs.

    Args:
        table: that it is in.
        cell: which.
        runs: of the table.
        failed: by run, why it could not be trained.
    """
    seeds: list[int] = []
    values: dict[tuple[str, str], list[float]] = {}
    seconds = 0.0
    missing = []
    for name in cell.runs:
        run = runs[name]
        state, share = run.status()
        if state != DONE:
            said = failed.get(name) or run.missing or f"{state}, {100 * share:.0f} % trained"
            missing.append(said)
            continue
        generation = cell.row.generation
        folder = run.folder if generation is None else run.folder.generation(generation)
        result = folder.result()
        if result is None:
            missing.append(f"{folder.path}: no generation {generation}")
            continue
        seeds += [each["seed"] for each in result["per_seed"]]
        seconds += result["seconds"]
        for figure in (ACCURACY, *table.figures):
            for which, found in _measured(folder, result, figure).items():
                values.setdefault((figure, which), []).extend(found)
    told = "; ".join(dict.fromkeys(missing))
    if told and seeds:
        told = f"{len(seeds)} of {table.seeds} seeds: {told}"
    kept = {key: tuple(each) for key, each in values.items() if len(each) == len(seeds)}
    return Found(tuple(seeds), kept, seconds, told)


def best_baseline(table: Table, column: Mapping[str, Found]) -> str:
    """The row that is not ours with the highest mean accuracy after the last epoch; empty if none.

    Args:
        table: the table.
        column: by row, the figures of one column.
    """
    means = {name: found.mean(ACCURACY, LAST) for name, found in column.items()}
    others = {n: m for n, m in means.items() if m is not None and n not in table.ours}
    return max(others, key=lambda name: others[name], default="")


def paired(one: Found, other: Found, which: str) -> tuple[float, float] | None:
    """Mean difference in accuracy over the seeds that both have, and the paired t-test's p.

    Returns:
        (difference, p); None where they have no seed in common.
    """
    common = [seed for seed in one.seeds if seed in other.seeds]
    values = []
    for found in (one, other):
        own = found.values.get((ACCURACY, which), ())
        if not own:
            return None
        values.append([own[found.seeds.index(seed)] for seed in common])
    return comparison.paired(*values) if common else None


def _measured(folder: Workdir, result: Mapping[str, Any], figure: str) -> dict[str, list[float]]:
    """A figure of every seed, by when it was measured."""
    per_seed = result["per_seed"]
    folder = [folder, *folder.generations()][-1]  # a chain's result is that of its last run
    if figure.startswith("samples/"):
        return _of_samples(folder, figure.removeprefix("samples/"))
    if figure.startswith("train/") or figure == "gap":
        return _of_log(folder, [each["seed"] for each in per_seed], figure)
    return {
        which: [each[which][figure] for each in per_seed]
        for which in (LAST, BEST)
        if all(figure in each[which] for each in per_seed)
    }


def _of_log(folder: Workdir, seeds: Sequence[int], figure: str) -> dict[str, list[float]]:
    """From the first and the last record; `gap` is training accuracy less test accuracy."""
    records = writers.read_records(folder.metrics)
    found = {}
    for which, index in (("first", 0), (LAST, -1)):
        of_seeds = [[each for each in records if each["seed"] == seed][index] for seed in seeds]
        if figure == "gap" and which == LAST:
            found[which] = [each["train/accuracy"] - each[ACCURACY] for each in of_seeds]
        elif all(figure in each for each in of_seeds):
            found[which] = [each[figure] for each in of_seeds]
    return found


def _of_samples(folder: Workdir, figure: str) -> dict[str, list[float]]:
    """Mean ratio of the images that were made outliers, and of the others."""
    if not storage.exists(folder.samples):
        return {}
    ratio_SxN = storage.read_arrays(folder.samples)["ratio"]
    is_outlier_N = outliers(folder, ratio_SxN.shape[1])
    chosen_N = {"outlier_ratio": is_outlier_N, "other_ratio": ~is_outlier_N}[figure]
    if not chosen_N.any():
        return {}
    return {LAST: ratio_SxN[:, chosen_N].mean(axis=1).tolist()}


def outliers(folder: Workdir, count: int) -> np.ndarray:
    """Which of a run's training images were made outliers.

    Args:
        folder: of the run.
        count: N, how many training images it has.

    Returns:
        [N], booleans.
    """
    data = folder.config()["data"]
    found = np.zeros(count, bool)
    found[splits.outliers(count, data.get("outliers", 0.0), data["split_seed"])] = True
    return found
