"""What every field of a configuration must hold by itself, and what to say where it does not."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any

from tgeo_jax import bilevel, distill, losses, margins, optimizers, ratios, roles, selection
from tgeo_jax.data import options
from tgeo_jax.models.build import MODELS, PRECISIONS

# Whether a value is right, and what would be: a phrase after "must", or the known names.
Rule = tuple[Callable[[Any], bool], str | Collection[str]]


def _one_of(names: Collection[str]) -> Rule:
    """Of a table as it is when a value is checked: names may be added from outside."""
    return (lambda value: value in names), names


_POSITIVE_INT = (
    lambda v: isinstance(v, int) and not isinstance(v, bool) and v > 0,
    "be a positive integer",
)
_NOT_NEGATIVE_INT = (lambda v: isinstance(v, int) and v >= 0, "be an integer >= 0")
_SEED = (
    lambda v: isinstance(v, int) and 0 <= v < 2**32,
    "be an integer in [0, 2**32)",
)
_POSITIVE = (lambda v: v > 0 and math.isfinite(v), "be a finite number > 0")
_NOT_NEGATIVE = (lambda v: v >= 0 and math.isfinite(v), "be a finite number >= 0")
_OPTIMIZER_RULES: dict[str, Rule] = {
    "name": _one_of(optimizers.OPTIMIZERS),
    "learning_rate": _POSITIVE,
    "momentum": (lambda v: 0 <= v < 1, "lie in [0, 1)"),
    "weight_decay": _NOT_NEGATIVE,
    "clip_norm": _NOT_NEGATIVE,
    "schedule": _one_of(optimizers.SCHEDULES),
    "drop_epochs": (
        lambda v: list(v) == sorted(set(v)) and all(e > 0 and math.isfinite(e) for e in v),
        "be > 0 and increase",
    ),
    "drop_factor": _POSITIVE,
    "warmup_epochs": _NOT_NEGATIVE,
}
RULES: dict[str, Rule] = {
    "seed": _SEED,
    "seeds": _POSITIVE_INT,
    "data.validation_fraction": (lambda v: 0 < v < 1, "lie strictly in (0, 1)"),
    "data.split_seed": _SEED,
    "data.outliers": (lambda v: 0 <= v < 1, "lie in [0, 1)"),
    "data.label_noise": (lambda v: 0 <= v < 1, "lie in [0, 1)"),
    "data.fraction": (lambda v: 0 < v <= 1, "lie in (0, 1]"),
    "data.imbalance": (lambda v: v >= 1 and math.isfinite(v), "be a finite number >= 1"),
    "data.part": _one_of(options.PARTS),
    "data.teacher_fraction": (lambda v: 0 < v < 1, "lie strictly in (0, 1)"),
    "data.min_count": _POSITIVE_INT,
    "data.hash_buckets": (lambda v: v >= 2, "be an integer >= 2"),
    "data.mean": (lambda v: all(map(math.isfinite, v)), "hold finite numbers"),
    "data.std": (lambda v: all(s > 0 and math.isfinite(s) for s in v), "hold numbers > 0"),
    "data.crop_padding": _NOT_NEGATIVE_INT,
    "data.cutout": _NOT_NEGATIVE_INT,
    "data.randaugment_layers": (lambda v: 0 <= v <= 100, "be an integer in [0, 100]"),
    "data.randaugment_magnitude": (lambda v: 0 <= v <= 10, "lie in [0, 10]"),
    "data.pipeline": _one_of(("resident", "stream")),
    "data.image_size": (lambda v: 0 < v <= 2048, "be an integer in [1, 2048]"),
    "data.workers": _NOT_NEGATIVE_INT,
    "data.max_corrupt": _NOT_NEGATIVE_INT,
    "data.batch_size": _POSITIVE_INT,
    "data.eval_batch_size": _POSITIVE_INT,
    "student.name": _one_of(MODELS),
    "teacher.name": _one_of(MODELS),
    "teacher.which": _one_of(("last", "best")),
    "loss.name": (
        lambda v: all(part in losses.SOFT_LOSSES for part in v.split("+")),
        losses.SOFT_LOSSES,
    ),
    "loss.weights": (
        lambda v: all(w >= 0 and math.isfinite(w) for w in v),
        "hold finite numbers >= 0",
    ),
    "loss.hard": _one_of(margins.HARD_LOSSES),
    "ratio.name": _one_of(ratios.RATIOS),
    "role.name": _one_of(roles.ROLES),
    "meta.order": _one_of(distill.ORDERS),
    "meta.every": _POSITIVE_INT,
    "meta.accumulate": _POSITIVE_INT,
    "meta.outer_soft": (lambda v: 0 <= v <= 1, "lie in [0, 1]"),
    "meta.batch_size": _POSITIVE_INT,
    "meta.estimator": _one_of(bilevel.ESTIMATORS),
    "train.epochs": _POSITIVE_INT,
    "train.steps_per_dispatch": _POSITIVE_INT,
    "train.eval_every": _POSITIVE_INT,
    "train.checkpoint_every": _POSITIVE_INT,
    "train.select_by": _one_of(selection.FIGURES),
    "train.patience": _NOT_NEGATIVE_INT,
    "mesh.seed": _POSITIVE_INT,
    "mesh.model": _POSITIVE_INT,
    "mesh.replicas": _NOT_NEGATIVE_INT,
    "precision": _one_of(PRECISIONS),
    "profile": (lambda v: "\0" not in v, "name a folder"),
    "generation": _NOT_NEGATIVE_INT,
    **{f"optimizer.{name}": rule for name, rule in _OPTIMIZER_RULES.items()},
    **{f"meta.optimizer.{name}": rule for name, rule in _OPTIMIZER_RULES.items()},
}
