"""What a training step reads and changes, as frozen pytrees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from flax import struct

Array = jax.Array
PyTree = Any
ROWS = "rows"  # the name of an embedding table's parameter, by which all know one


class Learner(struct.PyTreeNode):
    """A network that is being trained."""

    params: PyTree
    batch_stats: PyTree
    opt_state: PyTree

    @property
    def variables(self) -> PyTree:
        """What the network is applied with."""
        return {"params": self.params, "batch_stats": self.batch_stats}


class Fusion(struct.PyTreeNode):
    """The ratio's meta-parameters; empty where nothing is learned."""

    params: PyTree
    opt_state: PyTree


class Peer(struct.PyTreeNode):
    """A teacher that trains along, and the running mean of its prediction for each class."""

    learner: Learner
    class_means_KxK: Array


class TrainState(struct.PyTreeNode):
    """Everything a step changes, the seed that all its random numbers come from, and the anchor.

    The anchor does not change; it lies here because every seed has its own.
    """

    step: Array
    seed: Array
    student: Learner
    fusion: Fusion
    teacher: Peer | None = None  # where it trains along
    anchor: PyTree = None  # variables of the anchor, where there is one


class Batch(NamedTuple):
    """Raw images (uint8 or float) and class indices; the rest where teacher logits are cached.

    Of a table, rows [B, F]: float32, or ids (int32) of a categorical one.
    """

    images_BxHxWxC: Array
    labels_B: Array
    ids_B: Array | None = None  # index of each example in the dataset's training split
    teacher_logits_BxVxK: Array | None = None  # of each view; V = 1 where it is the clean one


class Teacher(NamedTuple):
    """Frozen teachers: variables, and mean predictions for each class; None where there are none.

    Class means are [K, K], or [M, K, K] where each of M teachers has a ratio of its own.
    """

    variables: PyTree
    class_means_KxK: Array | None


class Best(struct.PyTreeNode):
    """For every seed, what it was when validation was best; leaves [seeds, ...].

    `selection` says what is best; more of its score is better.
    """

    params: PyTree
    batch_stats: PyTree
    fusion: PyTree
    validation_score: Array
    step: Array

    @property
    def variables(self) -> PyTree:
        """As of `Learner`."""
        return {"params": self.params, "batch_stats": self.batch_stats}


def is_table(path: Sequence[Any]) -> bool:
    """Whether a leaf is a table, or what an optimiser keeps for each number of one.

    Args:
        path: of the leaf, as of `jax.tree_util.tree_map_with_path`.

    Examples:
        >>> tree = {"table": {"rows": 1.0}, "head": {"kernel": 2.0}}
        >>> jax.tree_util.tree_map_with_path(lambda path, leaf: is_table(path), tree)
        {'head': {'kernel': False}, 'table': {'rows': True}}
    """
    return bool(path) and getattr(path[-1], "key", None) == ROWS
