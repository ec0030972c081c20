"""Vision transformers for ImageNet, strong teachers for small students."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn import initializers

from tgeo_jax.models.layers import Dtype, recomputed

Array = jax.Array
_PATCH = 16
_init = initializers.truncated_normal(0.02)


def _norm(name: str, dtype: Dtype) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=1e-6, dtype=dtype, name=name)


def _dense(features: int, name: str, dtype: Dtype) -> nn.Dense:
    return nn.Dense(features, dtype=dtype, kernel_init=_init, name=name)


class _PatchEmbed(nn.Module):
    width: int
    dtype: Dtype

    @nn.compact
    def __call__(self, images_BxHxWxC: Array) -> Array:
        size = (_PATCH, _PATCH)
        cut = nn.Conv(self.width, size, size, padding="VALID", dtype=self.dtype, name="proj")
        x = cut(images_BxHxWxC)
        return x.reshape(x.shape[0], -1, self.width)


class _Attention(nn.Module):
    heads: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x_BxNxD: Array) -> Array:
        batch, length, width = x_BxNxD.shape
        qkv = _dense(3 * width, "qkv", self.dtype)(x_BxNxD)
        q, k, v = jnp.moveaxis(qkv.reshape(batch, length, 3, self.heads, -1), 2, 0)
        x = nn.dot_product_attention(q, k, v, dtype=self.dtype)
        return _dense(width, "proj", self.dtype)(x.reshape(batch, length, width))


class _Mlp(nn.Module):
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        width = x.shape[-1]
        x = nn.gelu(_dense(4 * width, "fc1", self.dtype)(x), approximate=False)
        return _dense(width, "fc2", self.dtype)(x)


class _Block(nn.Module):
    heads: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        attend = _Attention(self.heads, self.dtype, name="attn")
        x = x + attend(_norm("norm1", self.dtype)(x))
        return x + _Mlp(self.dtype, name="mlp")(_norm("norm2", self.dtype)(x))


class ViT(nn.Module):
    """A vision transformer with 16x16 patches that reads out its class token.

    No dropout and no stochastic depth: it is here to teach. Positions are learned for one image
    size, that of the images it is initialised with.

    Attributes:
        num_classes: K.
        width: of the tokens, a multiple of `heads`.
        depth: blocks.
        heads: attention heads.
        dtype: of the computation.
        remat: whether blocks are recomputed in the backward pass instead of kept.

    References:
        ViT (Dosovitskiy et al. 2020, arXiv 2010.11929); DeiT (Touvron et al. 2020, arXiv
        2012.12877) without its distillation token.

    Examples:
        >>> images = jnp.zeros((2, 32, 32, 3))
        >>> net = ViT(10, width=12, depth=1, heads=3)
        >>> jax.eval_shape(net.init_with_output, jax.random.key(0), images)[0].shape
        (2, 10)
    """

    num_classes: int
    width: int
    depth: int
    heads: int
    dtype: Dtype = None
    remat: bool = False

    @nn.compact
    def __call__(self, images_BxHxWxC: Array, train: bool = False) -> Array:
        _, height, across, _ = images_BxHxWxC.shape
        if height % _PATCH or across % _PATCH:
            raise ValueError(f"images of {height}x{across} pixels: must be multiples of {_PATCH}")
        x = _PatchEmbed(self.width, self.dtype, name="patch_embed")(images_BxHxWxC)
        token = self.param("cls_token", _init, (1, 1, self.width))
        x = jnp.concatenate([jnp.tile(token.astype(x.dtype), (x.shape[0], 1, 1)), x], axis=1)
        x = x + self.param("pos_embed", _init, (1, *x.shape[1:])).astype(x.dtype)
        block = recomputed(_Block, self.remat, static=())
        for index in range(self.depth):
            x = block(self.heads, self.dtype, name=f"blocks_{index}")(x)
        read = _norm("norm", self.dtype)(x)[:, 0]
        read = read.astype(jnp.promote_types(read.dtype, jnp.float32))
        return nn.Dense(self.num_classes, kernel_init=_init, name="head")(read)
