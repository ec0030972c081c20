"""Which epoch is the best, and when to stop looking for a better one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tgeo_jax import metrics
from tgeo_jax.errors import ConfigError, DataError
from tgeo_jax.state import Best, TrainState

Array = jax.Array
# Of the validation split; -1: the lower, the better.
FIGURES = {"accuracy": 1, "macro_f1": 1, "auc": 1, "cross_entropy": -1}


def check(select_by: str, labels_N: np.ndarray | None, num_classes: int) -> None:
    """Checks that a dataset has the figure that is to choose the epoch.

    Args:
        select_by: a key of `FIGURES`.
        labels_N: of the validation split; None where they are not known yet.
        num_classes: K.

    Raises:
        ConfigError: it has not, and why.
        DataError: the validation split lacks one of two classes.

    Examples:
        >>> check("auc", None, 10)
        Traceback (most recent call last):
        ...
        tgeo_jax.errors.ConfigError: train.select_by='auc': the area under the ROC curve is that \
of two classes, and this dataset has 10; use 'macro_f1' or 'accuracy'
    """
    field = f"train.select_by={select_by!r}"
    if select_by == "auc" and num_classes != 2:
        raise ConfigError(
            f"{field}: the area under the ROC curve is that of two classes, and this dataset has "
            f"{num_classes}; use 'macro_f1' or 'accuracy'"
        )
    if select_by == "macro_f1" and num_classes > metrics.MOST_CONFUSED:
        raise ConfigError(
            f"{field}: measured of up to {metrics.MOST_CONFUSED} classes, and this dataset has "
            f"{num_classes}; use 'accuracy'"
        )
    if select_by == "auc" and labels_N is not None and len(np.unique(labels_N)) < 2:
        raise _one_class()


def score(validation: Mapping[str, float], select_by: str, prefix: str = "") -> np.float32:
    """A figure as a number of which more is better, in the precision of the state that keeps it.

    Args:
        validation: figures by name.
        select_by: a key of `FIGURES`.
        prefix: before the names.

    Returns:
        -inf for NaN, so that nothing is worse.

    Raises:
        DataError: the figure could not be measured.

    Examples:
        >>> float(score({"validation/cross_entropy": 0.5}, "cross_entropy", "validation/"))
        -0.5
    """
    if select_by == "auc" and f"{prefix}auc" not in validation:
        raise _one_class()
    value = validation[f"{prefix}{select_by}"]
    return np.float32(-np.inf if np.isnan(value) else FIGURES[select_by] * value)


@jax.jit
def update(best: Best, state: TrainState, score_S: Array) -> Best:
    """What is best after an evaluation, for each seed: the first of equals, and of all the first.

    Args:
        best: before it.
        state: that was evaluated.
        score_S: of its validation figures, one for each seed.

    Examples:
        >>> from tgeo_jax.state import Fusion, Learner
        >>> student = Learner({"w": jnp.array([3.0, 4.0])}, {}, {})
        >>> state = TrainState(step=20, seed=None, student=student, fusion=Fusion({}, {}))
        >>> params, scores = {"w": jnp.array([1.0, 2.0])}, jnp.array([0.5, 0.7])
        >>> best = Best(params, {}, {}, scores, step=jnp.array([9, 9]))
        >>> found = update(best, state, jnp.array([0.6, 0.6]))
        >>> print(found.params["w"], found.step)
        [3. 2.] [20  9]
    """
    better_S = (score_S > best.validation_score) | (best.step == 0)

    def choose(new: Array, old: Array) -> Array:
        return jnp.where(better_S.reshape((-1,) + (1,) * (new.ndim - 1)), new, old)

    candidate = Best(
        params=state.student.params,
        batch_stats=state.student.batch_stats,
        fusion=state.fusion.params,
        validation_score=score_S,
        step=jnp.full_like(best.step, state.step),
    )
    return jax.tree.map(choose, candidate, best)


def has_run_out(patience: int, best_step_S: Any, step: int, interval: int) -> bool:
    """Whether no seed has had a new best in the last `patience` evaluations.

    Evaluations are counted by steps, so that a resumed run, of whatever moment, counts as an
    undisturbed one does.

    Args:
        patience: evaluations in a row; 0: never.
        best_step_S: the step of each seed's best.
        step: now.
        interval: steps between evaluations.

    Examples:
        >>> [has_run_out(2, np.array([10, 30]), step, 10) for step in (30, 40, 49, 50)]
        [False, False, False, True]
    """
    if not patience:
        return False
    since = step // interval - int(np.max(best_step_S)) // interval
    return since >= patience


def _one_class() -> DataError:
    return DataError(
        "train.select_by='auc': the validation split holds examples of one class only, which "
        "cannot be ranked against the other; use a larger data.validation_fraction, or another "
        "figure"
    )
