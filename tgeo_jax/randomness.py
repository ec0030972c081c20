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
    TEACHER_INIT = 7
    TEACHER_DROPOUT = 8
    TEACHER_OUTER_DROPOUT = 9
    CACHED_VIEW = 10
    GENERATION = 11


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


def example_keys(seed: Array | int, view: Array | int, ids_B: Array) -> Array:
    """A key for each example in one of its augmented views, the same whoever asks.

    Args:
        seed: the augmentation's seed.
        view: which view, 0, 1, ...
        ids_B: index of each example in its dataset.

    Returns:
        Keys, [B].

    Examples:
        >>> import jax.numpy as jnp
        >>> a, b = example_keys(0, 1, jnp.array([7, 3])), example_keys(0, 1, jnp.array([3]))
        >>> bool((jax.random.key_data(a[1]) == jax.random.key_data(b[0])).all())
        True
    """
    of_view = key(seed, view, Purpose.CACHED_VIEW)
    return jax.vmap(lambda example: jax.random.fold_in(of_view, example))(ids_B)


def of_generation(seed: int, generation: int) -> int:
    """The seed that a generation trains with: fresh random numbers for each.

    Args:
        seed: of the chain, in [0, 2**32).
        generation: 0 for the seed itself.

    Returns:
        A seed in [0, 2**32).

    Examples:
        >>> of_generation(5, 0), of_generation(5, 1) != of_generation(5, 2)
        (5, True)
    """
    if generation == 0:
        return seed
    return int(jax.random.bits(key(seed, generation, Purpose.GENERATION)))
