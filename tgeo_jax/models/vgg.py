"""VGG with BatchNorm and one linear layer, for 32x32 images."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
from jax.nn import initializers

from tgeo_jax.models.layers import Dtype, conv_norm, head, pooled

Array = jax.Array
_WIDTHS = (64, 128, 256, 512, 512)
_POOLED = 3  # after so many blocks the resolution is halved: 4x4 is left of 32x32


class VGG(nn.Module):
    """3x3 convolutions with biases in five blocks (Simonyan and Zisserman 2014, arXiv 1409.1556).

    Attributes:
        num_classes: K.
        depths: convolutions of each block.
        dtype: of the computation.

    Examples:
        >>> images = jax.numpy.zeros((2, 32, 32, 3))
        >>> net = VGG(100, (1, 1, 1, 1, 1))
        >>> jax.eval_shape(net.init_with_output, jax.random.key(0), images)[0].shape
        (2, 100)
    """

    num_classes: int
    depths: Sequence[int]
    dtype: Dtype = None

    @nn.compact
    def __call__(self, images_BxHxWxC: Array, train: bool = False) -> Array:
        layer = functools.partial(conv_norm, train=train, dtype=self.dtype)
        x = images_BxHxWxC
        if min(x.shape[1:3]) < 2**_POOLED:
            raise ValueError(
                f"images of {x.shape[1]}x{x.shape[2]} pixels: too small, use 8x8 or more"
            )
        for block, (depth, width) in enumerate(zip(self.depths, _WIDTHS, strict=True)):
            for index in range(depth):
                # The original counts convolution, norm and activation in one sequence.
                names = (f"block{block}_{3 * index}", f"block{block}_{3 * index + 1}")
                x = nn.relu(layer(x, width, 3, names=names, bias=True))
            if block < _POOLED:
                x = nn.max_pool(x, (2, 2), (2, 2))
        normal = initializers.normal(0.01)
        return head(self.num_classes, x.shape[-1], name="classifier", init=normal)(pooled(x))
