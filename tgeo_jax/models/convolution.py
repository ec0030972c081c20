"""Which of two spellings a convolution gets on a CPU. On accelerators there is one: XLA's own.

XLA's CPU backend has fast convolutions only for code outside of loops and branches, and none for
the grouped ones that `vmap` over seeds makes. A matrix product of patches is fast everywhere, as
long as the patches fit in a cache: an 8x8 network in a loop then takes 0.8 ms a step, not 11. With
larger images the patches cost more than they save, and steps leave the loop (see `dispatch`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from tgeo_jax import simulated

Array = jax.Array
_SMALL = 16_384  # numbers in the patches of one example


def convolve(
    images_BxHxWxC: Array,
    kernel: Array,
    strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    *,
    feature_group_count: int = 1,
    **options: Any,
) -> Array:
    """`jax.lax.conv_general_dilated` for NHWC images, as Flax calls it, without dilation.

    Args:
        images_BxHxWxC: [B, H, W, C].
        kernel: [height, width, C / groups, features].
        strides: of rows and columns.
        padding: as there.
        feature_group_count: as there; grouped ones are always XLA's.
        **options: what else Flax passes on; XLA's spelling gets it.

    Returns:
        [B, H', W', features].

    Examples:
        >>> ones = jnp.ones((1, 4, 4, 1))
        >>> print(convolve(ones, jnp.ones((3, 3, 1, 1)), (1, 1), "VALID")[0, :, :, 0])
        [[9. 9.]
         [9. 9.]]
    """
    pads = _pads(images_BxHxWxC, kernel, strides, padding)
    small = _num_patch_values(images_BxHxWxC, kernel, strides, pads) <= _SMALL
    patches = jax.default_backend() == "cpu" and not simulated.are_accelerators()
    if feature_group_count == 1 and small and patches:
        return _by_patches(images_BxHxWxC, kernel, strides, pads)
    options.setdefault("dimension_numbers", ("NHWC", "HWIO", "NHWC"))
    return jax.lax.conv_general_dilated(
        images_BxHxWxC, kernel, strides, pads, feature_group_count=feature_group_count, **options
    )


def has_convolutions(function: Callable, *args: Any) -> bool:
    """Whether XLA gets a convolution to compile; patches are none.

    Args:
        function: of arrays.
        *args: its arguments, or their shapes.

    Examples:
        >>> small, large = jnp.ones((1, 8, 8, 1)), jnp.ones((1, 64, 64, 1))
        >>> layer = lambda x: convolve(x, jnp.ones((3, 3, 1, 1)), (1, 1), "SAME")
        >>> has_convolutions(layer, large)
        True
    """
    return "conv_general_dilated" in str(jax.make_jaxpr(function)(*args))


def _pads(
    images: Array, kernel: Array, strides: Sequence[int], padding: str | Sequence[tuple[int, int]]
) -> Sequence[tuple[int, int]]:
    if not isinstance(padding, str):
        return padding
    return jax.lax.padtype_to_pads(images.shape[1:3], kernel.shape[:2], strides, padding)


@functools.cache
def compiler_options() -> dict[str, str | bool]:
    """For CPU programs with large convolutions: Eigen's, on all cores, in place of YNNPACK's.

    Measured with jax 0.10.2 on two cores: 6 to 20 % less time for a step, and a third less working
    space. With jax 0.12.0.1 they also keep bfloat16 networks from becoming NaN.

    Returns:
        Options for `compile`; none where this JAX does not know them.

    Examples:
        >>> isinstance(compiler_options(), dict)
        True
    """
    options: dict[str, str | bool] = {
        "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"
    }
    try:
        jax.jit(lambda: 0, compiler_options=options).lower().compile()
    except Exception:  # whatever a compiler says to an option that it does not know
        return {}
    return options


def _num_patch_values(
    images: Array, kernel: Array, strides: Sequence[int], pads: Sequence[tuple[int, int]]
) -> int:
    height, width = _output_size(images, kernel, strides, pads)
    return height * width * kernel.shape[0] * kernel.shape[1] * images.shape[3]


def _output_size(
    images: Array, kernel: Array, strides: Sequence[int], pads: Sequence[tuple[int, int]]
) -> list[int]:
    sizes = zip(images.shape[1:3], kernel.shape[:2], strides, pads, strict=True)
    return [(size + sum(pad) - window) // stride + 1 for size, window, stride, pad in sizes]


def _by_patches(
    images: Array, kernel: Array, strides: Sequence[int], pads: Sequence[tuple[int, int]]
) -> Array:
    height, width = _output_size(images, kernel, strides, pads)
    padded = jnp.pad(images, ((0, 0), *pads, (0, 0)))
    down, right = strides
    rows, columns, _, features = kernel.shape
    patches = [
        padded[
            :,
            row : row + down * (height - 1) + 1 : down,
            column : column + right * (width - 1) + 1 : right,
        ]
        for row in range(rows)
        for column in range(columns)
    ]
    return jnp.concatenate(patches, -1) @ kernel.reshape(-1, features)
