"""RandAugment-lite: random colour and geometric operations on one image, inside the jitted step.

"Lite" because it holds twelve of the paper's fourteen operations, those that are arithmetic on
single pixels or one nearest-neighbour warp; equalisation and sharpness are missing. Strengths
follow the paper's scale of 0 to 10; results are those of Pillow, see `operate`.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

Array = jax.Array
_SHEAR, _TRANSLATE, _DEGREES = 0.3, 0.45, 30.0  # at magnitude 10; translation as share of the side
_ENHANCE, _POSTERISE_BITS = 0.9, 4
_RED, _GREEN, _BLUE = 19595, 38470, 7471  # 2^16 times ITU-R 601's 0.299, 0.587 and 0.114
_GEOMETRIC = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
OPERATIONS = (
    *_GEOMETRIC,
    "identity",
    "autocontrast",
    "brightness",
    "colour",
    "contrast",
    "posterise",
    "solarise",
)


def apply(key: Array, image_HxWxC: Array, layers: int, magnitude: float) -> Array:
    """Applies random operations one after the other; each is drawn with the same probability.

    Args:
        key: of this image.
        image_HxWxC: bytes.
        layers: how many operations.
        magnitude: strength, in [0, 10]; its sign is random where an operation has one.

    Returns:
        Bytes of the same shape; warps are about the centre, and what they uncover is black.

    References:
        RandAugment (Cubuk et al. 2019, arXiv 1909.13719).

    Examples:
        >>> apply(jax.random.key(0), jnp.ones((4, 4, 3), jnp.uint8), 2, 9.0).dtype
        dtype('uint8')
    """

    def layer(index: Array, image_HxWxC: Array) -> Array:
        which_key, sign_key = jax.random.split(jax.random.fold_in(key, index))
        which = jax.random.randint(which_key, (), 0, len(OPERATIONS))
        signed = jnp.where(jax.random.bernoulli(sign_key), magnitude, -magnitude)
        return operate(which, image_HxWxC, signed)

    # Rolled: XLA fuses unrolled layers so that it computes the earlier ones over and over.
    return jax.lax.fori_loop(0, layers, layer, image_HxWxC)


def operate(which: Array | int, image_HxWxC: Array, magnitude: Array | float) -> Array:
    """One operation of `OPERATIONS`, by its index.

    Args:
        which: index; may be traced.
        image_HxWxC: bytes.
        magnitude: in [-10, 10]; its sign matters for warps and enhancements.

    Returns:
        Bytes of the same shape.

    Examples:
        >>> image = jnp.full((2, 2, 3), 100, jnp.uint8)
        >>> print(operate(OPERATIONS.index("solarise"), image, 8.0)[0, 0, 0])
        155
    """
    level = jnp.asarray(magnitude, jnp.float32) / 10
    which = jnp.asarray(which)
    warped = _warp(image_HxWxC, _matrix(which, level, image_HxWxC.shape))
    colours = [recolour(warped, level) for recolour in _RECOLOUR.values()]
    chosen = [which == OPERATIONS.index(name) for name in _RECOLOUR]
    return jnp.select(chosen, colours, warped)


def _matrix(which: Array, level: Array, shape: tuple[int, ...]) -> Array:
    """2x3: from centred output coordinates (x, y) to input coordinates; the identity for others."""
    height, width, _ = shape
    is_ = {name: (which == OPERATIONS.index(name)).astype(jnp.float32) for name in _GEOMETRIC}
    angle = is_["rotate"] * level * jnp.deg2rad(_DEGREES)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    shear_x, shear_y = (is_[name] * level * _SHEAR for name in ("shear_x", "shear_y"))
    move_x = is_["translate_x"] * level * _TRANSLATE * width
    move_y = is_["translate_y"] * level * _TRANSLATE * height
    # Stacked, for otherwise XLA computes the cosine of every pixel.
    return jnp.stack(
        [jnp.stack([cos, sin + shear_x, move_x]), jnp.stack([shear_y - sin, cos, move_y])]
    )


def _warp(image_HxWxC: Array, matrix_2x3: Array) -> Array:
    height, width, _ = image_HxWxC.shape
    centre_x, centre_y = (width - 1) / 2, (height - 1) / 2
    y, x = jnp.meshgrid(jnp.arange(height) - centre_y, jnp.arange(width) - centre_x, indexing="ij")
    # Halves go up, not to even, or a shift by half a pixel would take every other pixel twice.
    column, row = (
        jnp.floor(to_x * x + to_y * y + move + centre + 0.5).astype(jnp.int32)
        for (to_x, to_y, move), centre in zip(matrix_2x3, (centre_x, centre_y), strict=True)
    )
    # What lies outside is taken from a black frame, not masked after the gather: XLA would compute
    # the mask anew for everything that reads the warped image.
    framed = jnp.pad(image_HxWxC, ((1, 1), (1, 1), (0, 0)))
    return framed.at[jnp.clip(row, -1, height) + 1, jnp.clip(column, -1, width) + 1].get(
        mode="promise_in_bounds"
    )


def _blend(image: Array, towards: Array, level: Array) -> Array:
    """`towards + (1 + 0.9 level) (image - towards)`, the enhancements' common formula."""
    factor = 1 + _ENHANCE * level
    blended = towards + factor * (image.astype(jnp.float32) - towards)
    return jnp.clip(blended, 0, 255).astype(jnp.uint8)


def _grey(image_HxWxC: Array) -> Array:
    """Luminance [H, W, 1] by Pillow's own integers; the mean unless there are three channels."""
    if image_HxWxC.shape[-1] != 3:
        return image_HxWxC.astype(jnp.float32).mean(-1, keepdims=True)
    # One by one: XLA's reduction over so short an axis is many times slower on a CPU.
    red, green, blue = jnp.split(image_HxWxC.astype(jnp.int32), 3, axis=-1)
    return ((_RED * red + _GREEN * green + _BLUE * blue + 2**15) >> 16).astype(jnp.float32)


def _autocontrast(image_HxWxC: Array, level: Array) -> Array:
    del level
    pixels = image_HxWxC.astype(jnp.float32)
    low, high = pixels.min((0, 1), keepdims=True), pixels.max((0, 1), keepdims=True)
    stretched = (pixels - low) * 255 / jnp.maximum(high - low, 1)
    return jnp.where(high > low, stretched, pixels).astype(jnp.uint8)


def _contrast(image: Array, level: Array) -> Array:
    return _blend(image, jnp.floor(_grey(image).mean() + 0.5), level)


def _posterise(image: Array, level: Array) -> Array:
    dropped = jnp.round(_POSTERISE_BITS * jnp.abs(level)).astype(jnp.uint8)
    return (image >> dropped) << dropped


def _solarise(image: Array, level: Array) -> Array:
    threshold = 256 * (1 - jnp.abs(level))
    return jnp.where(image.astype(jnp.float32) >= threshold, 255 - image, image)


_RECOLOUR: dict[str, Callable[[Array, Array], Array]] = {
    "autocontrast": _autocontrast,
    "brightness": lambda image, level: _blend(image, jnp.zeros((1, 1, 1)), level),
    "colour": lambda image, level: _blend(image, _grey(image), level),
    "contrast": _contrast,
    "posterise": _posterise,
    "solarise": _solarise,
}
