"""Small convolutional network with BatchNorm, for small images and for tests of the real path."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax

from tgeo_jax.models.convolution import convolve
from tgeo_jax.models.layers import Dtype, norm, pooled


class CNN(nn.Module):
    """(3x3 convolution, BatchNorm, ReLU) for each width -> global average -> Dense K.

    Every convolution after the first halves the resolution.

    Attributes:
        num_classes: K.
        widths: channels of the convolutions.
        dtype: of the computation.

    Examples:
        >>> images = jax.numpy.zeros((2, 8, 8, 1))
        >>> variables = CNN(num_classes=10).init(jax.random.key(0), images)
        >>> sorted(variables)
        ['batch_stats', 'params']
    """

    num_classes: int
    widths: Sequence[int] = (16, 32)
    dtype: Dtype = None

    @nn.compact
    def __call__(self, images_BxHxWxC: jax.Array, train: bool = False) -> jax.Array:
        x = images_BxHxWxC
        for index, width in enumerate(self.widths):
            strides = (1, 1) if index == 0 else (2, 2)
            x = nn.Conv(
                width,
                (3, 3),
                strides,
                use_bias=False,
                dtype=self.dtype,
                conv_general_dilated=convolve,
            )(x)
            x = nn.relu(norm(train, name=f"BatchNorm_{index}", dtype=self.dtype)(x))
        return nn.Dense(self.num_classes)(pooled(x))
