"""What a training step reads and changes, as frozen pytrees."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
from flax import struct

Array = jax.Array
PyTree = Any


class Learner(struct.PyTreeNode):
    """A network that is being trained."""

    params: PyTree
    batch_stats: PyTree
    opt_state: PyTree


class Fusion(struct.PyTreeNode):
    """The ratio's meta-parameters; empty where nothing is learned."""

    params: PyTree
    opt_state: PyTree


class TrainState(struct.PyTreeNode):
    """Everything a step changes, and the seed that all its random numbers come from."""

    step: Array
    seed: Array
    student: Learner
    fusion: Fusion


class Batch(NamedTuple):
    """Raw images (uint8 or float) and class indices."""

    images_BxHxWxC: Array
    labels_B: Array


class Teacher(NamedTuple):
    """A frozen teacher's variables and its mean prediction for each class; both None if alone."""

    variables: PyTree
    class_means_KxK: Array | None


class Best(struct.PyTreeNode):
    """For every seed, what it was at its best validation accuracy; leaves [seeds, ...]."""

    params: PyTree
    batch_stats: PyTree
    fusion: PyTree
    validation_accuracy: Array
    step: Array
