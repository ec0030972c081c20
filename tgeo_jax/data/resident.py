"""Device-resident input: batch order by index arithmetic, augmentation inside the step.

For datasets that fit on the device. Nothing is streamed: a step's batch is a function of
(seed, step), so a run that starts again at step n sees what an undisturbed run sees there.
"""

from __future__ import annotations

from collections.abc import Callable

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


def normalise(mean: tuple[float, ...], std: tuple[float, ...]) -> Callable[[Array], Array]:
    """The clean view: bytes to float32 with zero mean and unit variance by channel.

    Args:
        mean: of pixels in [0, 1], by channel.
        std: likewise, > 0.

    Returns:
        images_BxHxWxC (uint8) -> float32 of the same shape.

    Examples:
        >>> print(normalise((0.5,), (0.5,))(jnp.full((1, 1, 1, 1), 255, jnp.uint8)).ravel())
        [1.]
    """

    def view(images_BxHxWxC: Array) -> Array:
        mean_1x1x1xC, std_1x1x1xC = (
            jnp.asarray(values, jnp.float32).reshape(1, 1, 1, -1) for values in (mean, std)
        )
        return (images_BxHxWxC.astype(jnp.float32) / 255 - mean_1x1x1xC) / std_1x1x1xC

    return view


def augment(
    clean_view: Callable[[Array], Array], *, crop_padding: int, flip: bool
) -> Callable[[Array, Array], Array]:
    """The training view: random crop after zero padding and random flip, then the clean view.

    Args:
        clean_view: from `normalise`.
        crop_padding: pixels of zero padding on every side, 0 for no crop. Padding happens before
            normalisation, as in the CIFAR recipe (black, not mean grey).
        flip: whether to mirror half of the images.

    Returns:
        (keys_B, images_BxHxWxC) -> network input; each image has its own key.

    Examples:
        >>> view = augment(lambda images: images, crop_padding=1, flip=True)
        >>> view(jax.random.split(jax.random.key(0), 2), jnp.ones((2, 8, 8, 1))).shape
        (2, 8, 8, 1)
    """

    def one(key: Array, image_HxWxC: Array) -> Array:
        crop_key, flip_key = jax.random.split(key)
        if crop_padding:
            padding = ((crop_padding, crop_padding), (crop_padding, crop_padding), (0, 0))
            corner = jax.random.randint(crop_key, (2,), 0, 2 * crop_padding + 1)
            image_HxWxC = jax.lax.dynamic_slice(
                jnp.pad(image_HxWxC, padding), (*corner, 0), image_HxWxC.shape
            )
        if flip:
            mirrored = jax.random.bernoulli(flip_key)
            image_HxWxC = jnp.where(mirrored, image_HxWxC[:, ::-1], image_HxWxC)
        return image_HxWxC

    def view(keys_B: Array, images_BxHxWxC: Array) -> Array:
        if not crop_padding and not flip:
            return clean_view(images_BxHxWxC)
        return clean_view(jax.vmap(one)(keys_B, images_BxHxWxC))

    return view
