"""The result of a finished run: what result.json says."""

from __future__ import annotations

import datetime
import itertools
import os
import pathlib
import platform
import subprocess
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from tgeo_jax import __version__, evaluate, origins, parallel, selection
from tgeo_jax.assemble import Run
from tgeo_jax.data import fingerprints

PyTree = Any

_FIGURES = (  # of each test split, where they are measured
    "accuracy",
    "top5_accuracy",
    "macro_f1",
    "auc",
    "cross_entropy",
    "ece",
    "teacher_agreement",
    "teacher_kl",
)
WHICH = ("last", "best_by_validation")


def result(
    run: Run,
    records: list[dict[str, Any]],
    seeds: tuple[int, ...],
    teacher: dict | None,
    commits: list[str],
    confusion: dict[str, dict[str, list]] | None = None,
) -> dict[str, Any]:
    """Puts a result together.

    Args:
        run: what was trained.
        records: of metrics.jsonl, to the last step, which may come early.
        seeds: that were trained.
        teacher: what is known of it, where one taught.
        commits: of the code that trained, more than one if the run was resumed by other code.
        confusion: of each of `WHICH` by test split, [seeds, K, K] counts, where they are counted:
            row the label, column the top class.

    Returns:
        JSON values. Means are over seeds; `best_by_validation` is, for each seed, at its epoch of
        the best validation figure, which `select_by` names. `steps` and `epochs` are those that
        were trained. `figures` holds mean and deviation of whatever was measured of the test
        splits. `commit` holds several hashes joined by "+" where there were some.
    """
    select_by, dataset = run.config.train.select_by, run.dataset
    tests = ("test", *dataset.extra)
    per_seed = [_of_seed(seed, records, select_by, tests) for seed in seeds]
    devices, last = jax.devices(), records[-1]
    splits = {name: getattr(dataset, name) for name in ("train", "validation", "test")}
    return {
        "steps": last["step"],
        "epochs": round(last["epoch"]),
        "stopped_early": last["step"] < run.method.total_steps,
        "select_by": select_by,
        "test_accuracy": {
            which: mean_and_std([seed[which]["test/accuracy"] for seed in per_seed])
            for which in WHICH
        },
        "figures": {which: _figures([seed[which] for seed in per_seed]) for which in WHICH},
        "per_seed": per_seed,
        "teacher": teacher,
        "seconds": last["time/seconds"],
        "epoch_seconds": _epoch_seconds([r for r in records if r["seed"] == seeds[0]]),
        "dataset": {
            "name": run.config.data.name,
            "digest": dataset.digest(),
            **{name: len(split) for name, split in {**splits, **dataset.extra}.items()},
            "mean": list(dataset.mean),
            "std": list(dataset.std),
            # Of a stream, what this process met since it started.
            "corrupt": list(dataset.corrupt),
        },
        "device": f"{len(devices)} x {devices[0].device_kind}",
        "commit": "+".join(commits),
        "finished": datetime.datetime.now(datetime.UTC).strftime("%FT%TZ"),
        "versions": {
            "tgeo_jax": __version__,
            "jax": jax.__version__,
            "python": platform.python_version(),
        },
        **({"confusion": confusion} if confusion else {}),
    }


def _epoch_seconds(own: list[dict[str, Any]]) -> list[float]:
    """Seconds of training for an epoch, without evaluation, between every two records."""
    epochs = [0.0, *(record["epoch"] for record in own)]
    spans = [after - before for before, after in itertools.pairwise(epochs)]
    # A run that an older version began lacks the seconds of its first epochs.
    return [
        record["time/train_seconds"] / span
        for record, span in zip(own, spans, strict=True)
        if "time/train_seconds" in record
    ]


def _of_seed(
    seed: int, records: list[dict[str, Any]], select_by: str, tests: tuple[str, ...]
) -> dict[str, Any]:
    own = [record for record in records if record["seed"] == seed]
    # The first of equals, as in the checkpoint.
    best = max(own, key=lambda record: selection.score(record, select_by, "validation/"))
    names = ["step", "epoch", "validation/accuracy"]
    names += [] if select_by == "accuracy" else [f"validation/{select_by}"]
    names += [f"{split}/{figure}" for split in tests for figure in _FIGURES]
    names += [name for name in own[-1] if name.startswith("verification/")]
    return {
        "seed": seed,
        "last": {name: own[-1][name] for name in names if name in own[-1]},
        "best_by_validation": {name: best[name] for name in names if name in best},
    }


def _figures(per_seed: list[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Mean and deviation over the seeds of what every one of them has."""
    names = [n for n in per_seed[0] if "/" in n and all(n in own for own in per_seed)]
    return {name: mean_and_std([own[name] for own in per_seed]) for name in names}


def of_teacher(
    run: Run, asked: evaluate.Evaluator, variables: PyTree, splits: Mapping[str, Any]
) -> dict[str, Any]:
    """What a result says of the teacher.

    Args:
        run: what was trained.
        asked: of the teacher.
        variables: of the frozen teacher; with a leading seed axis, if it trained along.
        splits: placed, by name.

    Returns:
        Its accuracy on each split, of one that trained along the mean over the seeds; of a frozen
        one, a fingerprint, and which file it was converted from.
    """
    about: dict[str, Any] = {}
    for name, split in splits.items():
        found = asked.metrics(variables, split)["accuracy"]
        about[f"{name}_accuracy"] = float(np.mean(found.total / found.count))
    if run.method.role.peer is None:
        about["fingerprint"] = fingerprints.of(parallel.fetch(variables))
        about["converted"] = origins.converted(run.config)
    return about


def mean_and_std(values: list[float]) -> dict[str, float | None]:
    """Mean and sample standard deviation over seeds; no deviation of a single one.

    Examples:
        >>> mean_and_std([1.0, 3.0])["mean"], mean_and_std([1.0])["std"]
        (2.0, None)
    """
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "std": std}


def commit(folder: pathlib.Path = pathlib.Path(__file__).parent) -> str:
    """The git commit of the code in a folder, with "-dirty" where it was changed since.

    Args:
        folder: in a checkout, or not; this package by default.

    Returns:
        The hash; outside of a checkout what TGEO_JAX_COMMIT says, as in a container, or "unknown".

    Examples:
        >>> commit(pathlib.Path("/"))
        'unknown'
    """

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(folder), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    found = git("rev-parse", "HEAD")
    # A folder installed inside somebody's repository is not that repository's code.
    if found is None or not git("ls-files", "--", "."):
        return os.environ.get("TGEO_JAX_COMMIT", "") or "unknown"
    # Of the code alone: notes and results beside it change no number.
    changed = git("status", "--porcelain", "--", ".")
    return found if changed == "" else f"{found}-dirty"
