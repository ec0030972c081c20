"""Where every random number comes from: `fold_in(seed, step, purpose)`.

Nothing is carried from step to step, so restarting at step n draws exactly what an undisturbed
run draws there.
"""

from __future__ import annotations

import enum

import jax

Array = jax.Array


class Purpose(enum.IntEnum):
    """What a random number is for. Numbers are part of every result: add, never renumber."""

    STUDENT_INIT = 0
    FUSION_INIT = 1
    TRAIN_ORDER = 2
    VALIDATION_ORDER = 3
    AUGMENT = 4
    DROPOUT = 5
    OUTER_DROPOUT = 6


def key(seed: Array | int, step: Array | int, purpose: Purpose) -> Array:
    """The key for one purpose at one step (or epoch) of one seed.

    Args:
        seed: the run's seed, a scalar.
        step: step or epoch, a scalar; 0 for what happens once.
        purpose: what it is for.

    Returns:
        A typed PRNG key.

    Examples:
        >>> a, b = key(0, 1, Purpose.AUGMENT), key(0, 1, Purpose.DROPOUT)
        >>> bool((jax.random.key_data(a) == jax.random.key_data(b)).all())
        False
    """
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), int(purpose))
