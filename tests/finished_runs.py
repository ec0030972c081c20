"""The files of finished runs, written here: what a report is made of, without training."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np

from tgeo_jax import samples
from tgeo_jax.state import Batch
from tgeo_jax.workdir import Workdir

CLASSES, COUNT, EPOCHS = 4, 40, 3


def write(
    path: pathlib.Path,
    *,
    accuracy: tuple[float, ...] = (0.81, 0.83),
    ratio: str = "tgeo",
    config: dict[str, Any] | None = None,
    **result: Any,
) -> Workdir:
    """A run of two seeds and three epochs, whose last test accuracies are given."""
    folder = Workdir(path)
    path.mkdir(parents=True)
    axes = {"loss": {"name": "kl"}, "role": {"name": "frozen"}, "ratio": {"name": ratio}}
    (path / "config.json").write_text(json.dumps({**axes, **(config or {})}))
    records = [
        {
            "step": epoch * 10,
            "epoch": float(epoch),
            "seed": seed,
            "test/accuracy": last - 0.1 * (EPOCHS - epoch),
            "time/samples_per_second": 100.0 * epoch,
            **ratio_of_epoch(epoch),
        }
        for epoch in range(1, EPOCHS + 1)
        for seed, last in enumerate(accuracy)
    ]
    write_records(folder, records)
    of_all = {
        "mean": float(np.mean(accuracy)),
        "std": float(np.std(accuracy, ddof=1)) if len(accuracy) > 1 else None,
    }
    per_seed = [
        {"seed": seed, "last": {"test/accuracy": last}} for seed, last in enumerate(accuracy)
    ]
    found = {
        "steps": 30,
        "epochs": EPOCHS,
        "per_seed": per_seed,
        "test_accuracy": {"last": of_all, "best_by_validation": of_all},
        "teacher": {"train_accuracy": 0.6, "test_accuracy": 0.7},
        "seconds": 1.6,
        "epoch_seconds": [3.0, 0.5, 0.25],
        "device": "1 x cpu",
        "commit": "0123456789abcdef-dirty",
        "dataset": {"name": "digits", "digest": "f" * 64, "train": COUNT},
        "finished": "2026-01-02T03:04:05Z",
        "versions": {"tgeo_jax": "0", "jax": "1", "python": "3"},
    }
    folder.write_result({**found, **result})
    return folder


def ratio_of_epoch(epoch: int) -> dict[str, Any]:
    """What a step logs of a ratio: half of the samples at one bin, half at another."""
    counts = [0] * 50
    counts[25 - 5 * epoch] = counts[25 + 5 * epoch] = 8
    quantiles = {"train/ratio_q05": 0.1, "train/ratio_q50": 0.5, "train/ratio_q95": 0.9}
    return {
        "train/ratio_right_large_edge": 0.6,
        "train/ratio_wrong_large_edge": 0.3,
        "train/ratio_histogram": counts,
        **quantiles,
    }


def write_records(folder: Workdir, records: list[dict[str, Any]]) -> None:
    """metrics.jsonl."""
    folder.metrics.write_text("".join(json.dumps(record) + "\n" for record in records))


def predictions(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Logits of two students, logits of a teacher, labels, and the class means."""
    random = np.random.RandomState(seed)
    student = 2 * random.randn(2, COUNT, CLASSES).astype(np.float32)
    teacher = 2 * random.randn(COUNT, CLASSES).astype(np.float32)
    means = random.dirichlet(np.ones(CLASSES), CLASSES).astype(np.float32)
    return student, teacher, random.randint(0, CLASSES, COUNT), means


def write_samples(folder: Workdir, *, rows: bool = False, old: bool = False) -> None:
    """samples.npz of pictures or of rows; an old one lacks what came later."""
    student, teacher, labels, means = predictions()
    ratio = np.linspace(0, 1, COUNT)
    pixels = np.random.RandomState(1).randint(0, 256, (COUNT, 8, 8, 1)).astype(np.uint8)
    inputs = pixels.reshape(COUNT, -1).astype(np.float32) if rows else pixels
    more = {} if old else {"student_logits_SxNxK": student, "class_means": means}
    samples.save(folder.samples, np.stack([ratio, ratio]), teacher, Batch(inputs, labels), **more)
