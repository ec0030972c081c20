"""Vision transformers for ImageNet, strong teachers for small students."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from tgeo_jax.models.layers import Dtype, recomputed
from tgeo_jax.models.transformer import Block, layer_norm, weight_init

Array = jax.Array
_PATCH = 16


class _PatchEmbed(nn.Module):
    width: int
    dtype: Dtype

    @nn.compact
    def __call__(self, images_BxHxWxC: Array) -> Array:
        size = (_PATCH, _PATCH)
        cut = nn.Conv(self.width, size, size, padding="VALID", dtype=self.dtype, name="proj")
        x = cut(images_BxHxWxC)
        return x.reshape(x.shape[0], -1, self.width)


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
        token = self.param("cls_token", weight_init, (1, 1, self.width))
        x = jnp.concatenate([jnp.tile(token.astype(x.dtype), (x.shape[0], 1, 1)), x], axis=1)
        x = x + self.param("pos_embed", weight_init, (1, *x.shape[1:])).astype(x.dtype)
        block = recomputed(Block, self.remat)
        for index in range(self.depth):
            x = block(self.heads, self.dtype, name=f"blocks_{index}")(x, train)
        read = layer_norm("norm", self.dtype)(x)[:, 0]
        read = read.astype(jnp.promote_types(read.dtype, jnp.float32))
        return nn.Dense(self.num_classes, kernel_init=weight_init, name="head")(read)
