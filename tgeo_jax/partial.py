"""What a run that stopped between two evaluations had counted since the last one."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import jax
import numpy as np

from tgeo_jax import storage
from tgeo_jax.metrics import Mean

Sums = dict[str, Mean]
_KEPT = 8  # steps; more than are ever interrupted between two checkpoints


class Partial(NamedTuple):
    """Sums over the steps since the last evaluation.

    Attributes:
        step: to which they go.
        seconds: of the run so far.
        sums: [seeds] in float64; None: of no step.
    """

    step: int
    seconds: float
    sums: Sums | None


NOTHING = Partial(-1, 0.0, None)


def add(total: Sums | None, more: Sums) -> Sums:
    """Sums of more steps.

    Examples:
        >>> add(add(None, {"loss": Mean(np.ones(1), np.ones(1))}),
        ...     {"loss": Mean(np.ones(1), np.ones(1))})["loss"].total
        array([2.])
    """
    return more if total is None else jax.tree.map(np.add, total, more)


def write(path: storage.Path, found: Partial) -> None:
    """Keeps them for the checkpoint of the same step; of several processes the first does.

    Those of earlier checkpoints stay: whether this step's will be whole is not known yet.
    """
    if jax.process_index() > 0:
        return
    sums = {
        name: [mean.total.tolist(), mean.count.tolist()]
        for name, mean in (found.sums or {}).items()
    }
    now = {"step": found.step, "seconds": found.seconds, "sums": sums}
    before = [entry for entry in _entries(path) if entry.get("step") != found.step]
    storage.write_atomically(path, json.dumps([*before[1 - _KEPT :], now]) + "\n")


def read(path: storage.Path, step: int) -> Partial:
    """Those that belong to a step; nothing where there are none, or those of another step.

    Examples:
        >>> import pathlib
        >>> read(pathlib.Path("/nowhere"), 3) == NOTHING
        True
    """
    try:
        found = next(entry for entry in _entries(path) if entry["step"] == step)
        sums: dict[str, Any] = {
            name: Mean(*(np.asarray(part, np.float64) for part in parts))  # type: ignore[arg-type]
            for name, parts in found["sums"].items()
        }
        return Partial(step, float(found["seconds"]), sums or None)
    except (AttributeError, LookupError, StopIteration, TypeError, ValueError):
        return NOTHING  # none, or damaged: only counts


def _entries(path: storage.Path) -> list[dict[str, Any]]:
    """Of each step there, the newest last; none of a damaged file."""
    try:
        found = json.loads(storage.read_bytes(path))
    except (OSError, RecursionError, ValueError):
        return []
    return [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []
