"""Device-resident input: batch order by index arithmetic.

For datasets that fit on the device. Nothing is streamed: a step's batch is a function of
(seed, step), so a run that starts again at step n sees what an undisturbed run sees there.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from tgeo_jax import randomness

Array = jax.Array


def batch_indices(
    seed: Array,
    first_step: Array,
    num_steps: int,
    batch_size: int,
    num_examples: int,
    purpose: randomness.Purpose,
) -> Array:
    """Which examples the batches of some consecutive steps hold.

    Every epoch is a fresh permutation, cut into `num_examples // batch_size` batches; the
    remainder of each permutation is dropped.

    Args:
        seed: the run's seed, scalar.
        first_step: scalar, may be traced.
        num_steps: how many steps.
        batch_size: B <= num_examples.
        num_examples: N.
        purpose: separates the order of the training split from that of the validation split.

    Returns:
        indices, int32 [num_steps, B].

    Examples:
        >>> order = batch_indices(0, 0, 2, 2, 4, randomness.Purpose.TRAIN_ORDER)
        >>> sorted(order.ravel().tolist())
        [0, 1, 2, 3]
    """
    steps_per_epoch = num_examples // batch_size
    steps = first_step + jnp.arange(num_steps)
    first_epoch = first_step // steps_per_epoch
    epochs = first_epoch + jnp.arange((num_steps - 1) // steps_per_epoch + 2)
    orders = jax.vmap(
        lambda epoch: jax.random.permutation(randomness.key(seed, epoch, purpose), num_examples)
    )(epochs)
    start = (steps % steps_per_epoch) * batch_size
    position = start[:, None] + jnp.arange(batch_size)[None, :]
    return orders[(steps // steps_per_epoch - first_epoch)[:, None], position]
