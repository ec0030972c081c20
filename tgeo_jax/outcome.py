"""The result of a finished run: what result.json says."""

from __future__ import annotations

import datetime
import itertools
import pathlib
import platform
import subprocess
from typing import Any

import jax
import numpy as np

from tgeo_jax import __version__
from tgeo_jax.assemble import Run

_OF_SEED = (
    "step",
    "epoch",
    "validation/accuracy",
    "test/accuracy",
    "test/top5_accuracy",
    "test/cross_entropy",
    "test/ece",
    "test/teacher_agreement",
    "test/teacher_kl",
)


def result(
    run: Run,
    records: list[dict[str, Any]],
    seeds: tuple[int, ...],
    teacher: dict | None,
    commits: list[str],
) -> dict[str, Any]:
    """Puts a result together.

    Args:
        run: what was trained.
        records: of metrics.jsonl, to the last step.
        seeds: that were trained.
        teacher: what is known of it, where one taught.
        commits: of the code that trained, more than one if the run was resumed by other code.

    Returns:
        JSON values. Means are over seeds; `best_by_validation` is, for each seed, at its epoch of
        best validation accuracy. `commit` holds several hashes joined by "+" where there were some.
    """
    per_seed = [_of_seed(seed, records) for seed in seeds]
    verified = [name for name in records[-1] if name.startswith("verification/")]
    devices, dataset = jax.devices(), run.dataset
    splits = ("train", "validation", "test")
    return {
        "steps": run.method.total_steps,
        "epochs": run.config.train.epochs,
        "test_accuracy": {
            which: mean_and_std([seed[which]["test/accuracy"] for seed in per_seed])
            for which in ("last", "best_by_validation")
        },
        **(
            {
                "verification": {
                    name.partition("/")[2]: mean_and_std([seed["last"][name] for seed in per_seed])
                    for name in verified
                }
            }
            if verified
            else {}
        ),
        "per_seed": per_seed,
        "teacher": teacher,
        "seconds": records[-1]["time/seconds"],
        "epoch_seconds": _epoch_seconds([r for r in records if r["seed"] == seeds[0]]),
        "dataset": {
            "name": run.config.data.name,
            "digest": dataset.digest(),
            **{split: len(getattr(dataset, split)) for split in splits},
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


def _of_seed(seed: int, records: list[dict[str, Any]]) -> dict[str, Any]:
    own = [record for record in records if record["seed"] == seed]
    names = [*_OF_SEED, *(name for name in own[-1] if name.startswith("verification/"))]
    best = max(own, key=lambda record: record["validation/accuracy"])  # the first of equals
    return {
        "seed": seed,
        "last": {name: own[-1][name] for name in names if name in own[-1]},
        "best_by_validation": {name: best[name] for name in names if name in best},
    }


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
        The hash, or "unknown" outside of a checkout.

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
        return "unknown"
    # Of the code alone: notes and results beside it change no number.
    changed = git("status", "--porcelain", "--", ".")
    return found if changed == "" else f"{found}-dirty"
