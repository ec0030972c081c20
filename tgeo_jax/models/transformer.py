"""What the transformers share: attention, feed-forward layers, blocks.

Submodules carry the names of timm's vision transformers, which convert without a table.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn import initializers

from tgeo_jax.models.layers import Dtype

Array = jax.Array
weight_init = initializers.truncated_normal(0.02)


def layer_norm(name: str, dtype: Dtype) -> nn.LayerNorm:
    """Layer normalisation with the epsilon of vision transformers.

    Examples:
        >>> layer_norm("norm", None).epsilon
        1e-06
    """
    return nn.LayerNorm(epsilon=1e-6, dtype=dtype, name=name)


def dense(features: int, name: str, dtype: Dtype) -> nn.Dense:
    """A linear layer whose weights are drawn from a truncated normal of deviation 0.02.

    Examples:
        >>> dense(3, "fc", None).features
        3
    """
    return nn.Dense(features, dtype=dtype, kernel_init=weight_init, name=name)


class Attention(nn.Module):
    """Multi-head self-attention, [B, N, D] -> [B, N, D].

    Attributes:
        heads: must divide D.
        dtype: of the computation.

    Examples:
        >>> layer = Attention(heads=2)
        >>> layer.init_with_output(jax.random.key(0), jnp.ones((1, 3, 4)))[0].shape
        (1, 3, 4)
    """

    heads: int
    dtype: Dtype = None

    @nn.compact
    def __call__(self, x_BxNxD: Array) -> Array:
        batch, length, width = x_BxNxD.shape
        if width % self.heads:
            raise ValueError(f"heads={self.heads}: must divide the width of the tokens, {width}")
        qkv = dense(3 * width, "qkv", self.dtype)(x_BxNxD)
        q, k, v = jnp.moveaxis(qkv.reshape(batch, length, 3, self.heads, -1), 2, 0)
        x = nn.dot_product_attention(q, k, v, dtype=self.dtype)
        return dense(width, "proj", self.dtype)(x.reshape(batch, length, width))


class FeedForward(nn.Module):
    """Dense 4 D, GELU (exact), Dense D, of every token by itself.

    Examples:
        >>> FeedForward().init_with_output(jax.random.key(0), jnp.ones((1, 3, 4)))[0].shape
        (1, 3, 4)
    """

    dtype: Dtype = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        width = x.shape[-1]
        x = nn.gelu(dense(4 * width, "fc1", self.dtype)(x), approximate=False)
        return dense(width, "fc2", self.dtype)(x)


class Block(nn.Module):
    """Attention and a feed-forward layer, each with a residual connection and a norm.

    Before the layer, `x + f(norm(x))`, or after the sum, `norm(x + f(x))`.

    Attributes:
        heads: of the attention.
        dtype: of the computation.
        dropout: share of the values of f that are dropped in training.
        norm_first: whether the norm comes before.

    Examples:
        >>> block = Block(heads=2, norm_first=False)
        >>> out, _ = block.init_with_output(jax.random.key(0), jnp.ones((1, 3, 4)), False)
        >>> out.shape
        (1, 3, 4)
    """

    heads: int
    dtype: Dtype = None
    dropout: float = 0.0
    norm_first: bool = True

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        layers = (
            (layer_norm("norm1", self.dtype), Attention(self.heads, self.dtype, name="attn")),
            (layer_norm("norm2", self.dtype), FeedForward(self.dtype, name="mlp")),
        )
        for norm, layer in layers:
            out = layer(norm(x) if self.norm_first else x)
            x = x + nn.Dropout(self.dropout, deterministic=not train)(out)
            x = x if self.norm_first else norm(x)
        return x
