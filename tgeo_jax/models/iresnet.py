"""Residual networks for faces: the IR-ResNets of ArcFace, of any depth and width."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from tgeo_jax import numeric
from tgeo_jax.models.cosine import FaceNetwork, PReLU
from tgeo_jax.models.layers import Dtype, conv, conv_norm, norm, recomputed

Array = jax.Array


class _Block(nn.Module):
    """BatchNorm, 3x3, BatchNorm, PReLU, 3x3 (which strides), BatchNorm; beside a shortcut."""

    planes: int
    strides: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x_BxHxWxC: Array, train: bool) -> Array:
        layer = functools.partial(conv_norm, train=train, dtype=self.dtype)
        x = norm(train, name="bn1", dtype=self.dtype)(x_BxHxWxC)
        x = layer(x, self.planes, 3, names=("conv1", "bn2"))
        x = PReLU(self.dtype, name="prelu")(x)
        x = layer(x, self.planes, 3, self.strides, names=("conv2", "bn3"))
        if self.strides == 1 and x_BxHxWxC.shape[-1] == self.planes:
            return x + x_BxHxWxC
        names = ("downsample_0", "downsample_1")
        return x + layer(x_BxHxWxC, self.planes, 1, self.strides, names=names)


class _Backbone(nn.Module):
    depths: Sequence[int]
    widths: Sequence[int]
    embedding: int
    dropout: float
    stem_strides: int
    dtype: Dtype
    remat: bool

    @nn.compact
    def __call__(self, images_BxHxWxC: Array, train: bool) -> Array:
        x = conv(self.widths[0], 3, self.stem_strides, name="conv1", dtype=self.dtype)(
            images_BxHxWxC
        )
        x = PReLU(self.dtype, name="prelu")(norm(train, name="bn1", dtype=self.dtype)(x))
        block = recomputed(_Block, self.remat)
        for stage, (depth, planes) in enumerate(zip(self.depths, self.widths[1:], strict=True)):
            for index in range(depth):
                strides = 2 if index == 0 else 1
                x = block(planes, strides, self.dtype, name=f"layer{stage + 1}_{index}")(x, train)
        # The head "E": BatchNorm, dropout, all positions to the embedding, BatchNorm.
        x = norm(train, name="bn2", dtype=self.dtype)(x)
        x = numeric.at_least_float32(x)
        x_BxP = jnp.moveaxis(x, -1, 1).reshape(len(x), -1)  # flat in the original's order
        x_BxP = nn.Dropout(self.dropout, deterministic=not train)(x_BxP)
        embeddings_BxD = nn.Dense(self.embedding, name="fc")(x_BxP)
        # Its scale is fixed at 1 in the original too.
        return nn.BatchNorm(not train, momentum=0.9, use_scale=False, name="features")(
            embeddings_BxD
        )


class IResNet(FaceNetwork):
    """ArcFace's residual network (Deng et al. 2019, arXiv 1801.07698, section 3.1) for any image.

    A 3x3 stem, four stages that each halve the resolution, and the embedding "E" of all positions.
    `iresnet18` and `iresnet50` are the published ones; `iresnet` has all options.

    Attributes:
        num_classes, embedding, soft_scale, dtype, remat: as in `cosine.FaceNetwork`.
        depths: blocks of each stage.
        widths: channels of the stem, then of each stage.
        dropout: before the embedding, in [0, 1).
        stem_strides: of the first convolution; 2 quarters the cost of everything after it.

    Examples:
        >>> images = jnp.zeros((2, 112, 92, 1))
        >>> net = IResNet(10, embedding=64)
        >>> jax.eval_shape(net.init_with_output, jax.random.key(0), images)[0].shape
        (2, 10)
    """

    depths: Sequence[int] = (1, 1, 1, 1)
    widths: Sequence[int] = (16, 16, 32, 64, 128)
    dropout: float = 0.4
    stem_strides: int = 1

    def backbone(self) -> nn.Module:
        """See `cosine.FaceNetwork`."""
        return _Backbone(
            self.depths,
            self.widths,
            self.embedding,
            self.dropout,
            self.stem_strides,
            self.dtype,
            self.remat,
        )
