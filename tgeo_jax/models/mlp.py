"""Multilayer perceptron over flattened inputs."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from tgeo_jax.models.layers import Dtype


class MLP(nn.Module):
    """Flatten -> (Dense, ReLU) for each width -> Dense K.

    Attributes:
        num_classes: K.
        hidden: widths of the hidden layers.
        dtype: of the computation; logits are float32 or better.

    Examples:
        >>> images = jax.numpy.zeros((2, 8, 8, 1))
        >>> logits, _ = MLP(num_classes=10).init_with_output(jax.random.key(0), images)
        >>> logits.shape
        (2, 10)
    """

    num_classes: int
    hidden: Sequence[int] = (64,)
    dtype: Dtype = None

    @nn.compact
    def __call__(self, images_BxHxWxC: jax.Array, train: bool = False) -> jax.Array:
        x = images_BxHxWxC.reshape((images_BxHxWxC.shape[0], -1))
        for width in self.hidden:
            x = nn.relu(nn.Dense(width, dtype=self.dtype)(x))
        return nn.Dense(self.num_classes)(x.astype(jnp.promote_types(x.dtype, jnp.float32)))
