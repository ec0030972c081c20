"""Device-resident input: batch order by index arithmetic.

For datasets that fit on the device. Nothing is streamed: a step's batch is a function of
(seed, step), so a run that starts again at step n sees what an undisturbed run sees there.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from tgeo_jax import randomness

Array = jax.Array
_ROUNDS = 8  # an even number: both halves have their widths back


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

    Raises:
        ValueError: a batch larger than the split.

    Examples:
        >>> order = batch_indices(0, 0, 2, 2, 4, randomness.Purpose.TRAIN_ORDER)
        >>> sorted(order.ravel().tolist())
        [0, 1, 2, 3]
    """
    if not 0 < batch_size <= num_examples:
        raise ValueError(
            f"batch_size={batch_size}: must be in 1 ... {num_examples}, the split's size"
        )
    steps_per_epoch = num_examples // batch_size
    steps_S = first_step + jnp.arange(num_steps)
    start_S = steps_S % steps_per_epoch * batch_size
    position_SxB = start_S[:, None] + jnp.arange(batch_size)[None, :]
    return jax.vmap(
        lambda epoch, position_B: permuted(
            randomness.key(seed, epoch, purpose), position_B, num_examples
        )
    )(steps_S // steps_per_epoch, position_SxB)


def permuted(key: Array, position_B: Array, count: int) -> Array:
    """Where a random permutation of `count` numbers puts some of them, without making the rest.

    A Feistel network permutes the next power of two; what falls outside is permuted again until it
    does not (cycle walking), which is a permutation of the numbers inside. Sorting random keys, the
    usual way, took longer than a small network's step.

    Args:
        key: which permutation.
        position_B: integers in [0, count).
        count: how many numbers, at most 2**30.

    Returns:
        int32 [B], in [0, count).

    References:
        Luby and Rackoff 1988, "How to construct pseudorandom permutations"; Black and Rogaway 2002,
        "Ciphers with arbitrary finite domains", for cycle walking.

    Examples:
        >>> found = permuted(jax.random.key(0), jnp.arange(5), 5)
        >>> sorted(found.tolist())
        [0, 1, 2, 3, 4]
    """
    bits = max(2, (count - 1).bit_length())
    keys_R = jax.random.bits(key, (_ROUNDS,), jnp.uint32)

    def shuffle(values_B: Array) -> Array:
        low = bits // 2  # bits of the right half; the halves change places every round
        high = bits - low
        for turn in range(_ROUNDS):
            left_B, right_B = values_B >> low, values_B & ((1 << low) - 1)
            mixed_B = _mixed(right_B ^ keys_R[turn]) & ((1 << high) - 1)
            values_B = (right_B << high) | (left_B ^ mixed_B)
            low, high = high, low
        return values_B

    def again(values_B: Array) -> Array:
        return jnp.where(values_B >= count, shuffle(values_B), values_B)

    first_B = shuffle(position_B.astype(jnp.uint32))
    inside_B = jax.lax.while_loop(lambda values_B: (values_B >= count).any(), again, first_B)
    return inside_B.astype(jnp.int32)


def _mixed(values: Array) -> Array:
    """Every bit of a word depends on all of them (MurmurHash3's finaliser)."""
    values = (values ^ (values >> 16)) * jnp.uint32(0x85EBCA6B)
    values = (values ^ (values >> 13)) * jnp.uint32(0xC2B2AE35)
    return values ^ (values >> 16)
