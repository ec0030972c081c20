"""What the networks see: normalisation or scaling, and augmentation inside the training step.

    bytes -> RandAugment-lite -> random crop -> random flip -> normalised float32 -> Cutout

Everything is a function of the image and its key, so a step's views depend on (seed, step) alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from tgeo_jax.data import randaugment

Array = jax.Array


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


def scale(minimum: tuple[float, ...], span: tuple[float, ...]) -> Callable[[Array], Array]:
    """The clean view of a numeric table: training rows lie in [0, 1]; others may lie outside.

    Args:
        minimum: by feature.
        span: maximum less minimum by feature, > 0.

    Returns:
        rows_BxF (float32) -> (rows - minimum) / span.

    Examples:
        >>> print(scale((1.0, 0.0), (2.0, 1.0))(jnp.array([[3.0, 0.5]])))
        [[1.  0.5]]
    """

    def view(rows_BxF: Array) -> Array:
        minimum_1xF, span_1xF = (
            jnp.asarray(values, jnp.float32)[None] for values in (minimum, span)
        )
        return (rows_BxF - minimum_1xF) / span_1xF

    return view


def clean(dataset: Any) -> Callable[[Array], Array]:
    """The clean view of a dataset: of images, of a numeric table, or ids as they are.

    Args:
        dataset: `sources.Dataset` or `streaming.StreamedDataset`.

    Returns:
        What is stored -> network input: float32, of a categorical table int32.

    Examples:
        >>> from types import SimpleNamespace
        >>> rows = jnp.array([[3.0, 0.5]])
        >>> table = SimpleNamespace(vocabulary=(), example=rows, mean=(1.0, 0.0), std=(2.0, 1.0))
        >>> print(clean(table)(rows))
        [[1.  0.5]]
    """
    if dataset.vocabulary:
        return lambda ids_BxF: ids_BxF
    is_table = dataset.example.ndim == 2
    return (scale if is_table else normalise)(dataset.mean, dataset.std)


def augment(
    clean_view: Callable[[Array], Array],
    *,
    crop_padding: int,
    flip: bool,
    cutout: int = 0,
    randaugment_layers: int = 0,
    randaugment_magnitude: float = 9.0,
) -> Callable[[Array, Array], Array]:
    """The training view: what is chosen of the augmentations around the clean view.

    Args:
        clean_view: from `normalise`.
        crop_padding: pixels of zero padding on every side, 0 for no crop. Padding happens before
            normalisation, as in the CIFAR recipe (black, not mean grey).
        flip: whether to mirror half of the images.
        cutout: side in pixels of a square that is set to the mean colour (DeVries and Taylor 2017,
            arXiv 1708.04552); its centre is any pixel, so part of it may fall outside; 0 for none.
        randaugment_layers: random operations on each image, see `randaugment`; 0 for none.
        randaugment_magnitude: their strength, in [0, 10].

    Returns:
        (keys_B, images_BxHxWxC) -> network input; each image has its own key.

    Examples:
        >>> view = augment(lambda images: images, crop_padding=1, flip=True)
        >>> view(jax.random.split(jax.random.key(0), 2), jnp.ones((2, 8, 8, 1))).shape
        (2, 8, 8, 1)
    """

    def view(keys_B: Array, images_BxHxWxC: Array) -> Array:
        split = functools.partial(jax.random.split, num=4)
        crop_B, flip_B, layers_B, cutout_B = jax.vmap(split, out_axes=1)(keys_B)
        images = images_BxHxWxC
        if randaugment_layers:
            images = jax.vmap(
                lambda key, image: randaugment.apply(
                    key, image, randaugment_layers, randaugment_magnitude
                )
            )(layers_B, images)
        if crop_padding:
            images = jax.vmap(lambda key, image: _random_crop(key, image, crop_padding))(
                crop_B, images
            )
        if flip:
            images = jax.vmap(_random_flip)(flip_B, images)
        inputs = clean_view(images)
        if cutout:
            inputs = jax.vmap(lambda key, image: _cutout(key, image, cutout))(cutout_B, inputs)
        return inputs

    return view


def _random_crop(key: Array, image_HxWxC: Array, padding: int) -> Array:
    corner = jax.random.randint(key, (2,), 0, 2 * padding + 1)
    padded = jnp.pad(image_HxWxC, ((padding, padding), (padding, padding), (0, 0)))
    return jax.lax.dynamic_slice(padded, (*corner, 0), image_HxWxC.shape)


def _random_flip(key: Array, image_HxWxC: Array) -> Array:
    return jnp.where(jax.random.bernoulli(key), image_HxWxC[:, ::-1], image_HxWxC)


def _cutout(key: Array, image_HxWxC: Array, side: int) -> Array:
    """Zeros, which after normalisation are the mean colour, in a square."""
    height, width, _ = image_HxWxC.shape
    first = jax.random.randint(key, (2,), 0, jnp.array([height, width])) - side // 2
    rows, columns = (
        (jnp.arange(size) >= start) & (jnp.arange(size) < start + side)
        for size, start in zip((height, width), first, strict=True)
    )
    inside_HxWx1 = rows[:, None, None] & columns[None, :, None]
    return jnp.where(inside_HxWx1, jnp.zeros((), image_HxWxC.dtype), image_HxWxC)
