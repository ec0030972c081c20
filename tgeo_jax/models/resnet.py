"""Residual networks: the thin ones for 32x32 images, the wide stem for 32x32, those of ImageNet."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax

from tgeo_jax.models.layers import Dtype, conv_norm, head, pooled, recomputed

Array = jax.Array


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, projected where shape changes."""

    planes: int
    strides: int
    shortcut: str  # what the original calls its projection
    dtype: Dtype

    @nn.compact
    def __call__(self, x_BxHxWxC: Array, train: bool) -> Array:
        layer = functools.partial(conv_norm, train=train, dtype=self.dtype)
        x = nn.relu(layer(x_BxHxWxC, self.planes, 3, self.strides, names=("conv1", "bn1")))
        x = layer(x, self.planes, 3, names=("conv2", "bn2"))
        return nn.relu(x + _projected(self, x_BxHxWxC, self.planes, train))


class Bottleneck(nn.Module):
    """1x1, 3x3 (which strides) and 1x1 convolutions; four times as wide outside as inside."""

    planes: int
    strides: int
    shortcut: str
    dtype: Dtype

    @nn.compact
    def __call__(self, x_BxHxWxC: Array, train: bool) -> Array:
        layer = functools.partial(conv_norm, train=train, dtype=self.dtype)
        x = nn.relu(layer(x_BxHxWxC, self.planes, 1, names=("conv1", "bn1")))
        x = nn.relu(layer(x, self.planes, 3, self.strides, names=("conv2", "bn2")))
        x = layer(x, 4 * self.planes, 1, names=("conv3", "bn3"))
        return nn.relu(x + _projected(self, x_BxHxWxC, 4 * self.planes, train))


def _projected(block: BasicBlock | Bottleneck, x: Array, features: int, train: bool) -> Array:
    if block.strides == 1 and x.shape[-1] == features:
        return x
    names = (f"{block.shortcut}_0", f"{block.shortcut}_1")
    return conv_norm(x, features, 1, block.strides, names=names, train=train, dtype=block.dtype)


class ResNet(nn.Module):
    """A residual network (He et al. 2015, arXiv 1512.03385).

    Attributes:
        num_classes: K.
        depths: blocks of each stage.
        widths: of the stem, then `planes` of each stage; every stage but the first halves the
            resolution.
        bottleneck: which kind of block.
        stem: `3x3`, or `7x7` (stride 2, then a 3x3 maximum with stride 2).
        shortcut: what the original calls its projections.
        last: what it calls its last layer.
        dtype: of the computation.
        remat: whether blocks are recomputed in the backward pass instead of kept.

    Examples:
        >>> images = jax.numpy.zeros((2, 32, 32, 3))
        >>> net = ResNet(100, (1, 1, 1), (16, 16, 32, 64))
        >>> jax.eval_shape(net.init_with_output, jax.random.key(0), images)[0].shape
        (2, 100)
    """

    num_classes: int
    depths: Sequence[int]
    widths: Sequence[int]
    bottleneck: bool = False
    stem: str = "3x3"
    shortcut: str = "downsample"
    last: str = "fc"
    dtype: Dtype = None
    remat: bool = False

    @nn.compact
    def __call__(self, images_BxHxWxC: Array, train: bool = False) -> Array:
        layer = functools.partial(conv_norm, train=train, dtype=self.dtype)
        size, strides = (7, 2) if self.stem == "7x7" else (3, 1)
        x = nn.relu(layer(images_BxHxWxC, self.widths[0], size, strides, names=("conv1", "bn1")))
        if self.stem == "7x7":
            x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        block = recomputed(Bottleneck if self.bottleneck else BasicBlock, self.remat)
        for stage, (depth, planes) in enumerate(zip(self.depths, self.widths[1:], strict=True)):
            for index in range(depth):
                strides = 2 if stage > 0 and index == 0 else 1
                name = f"layer{stage + 1}_{index}"
                x = block(planes, strides, self.shortcut, self.dtype, name=name)(x, train)
        return head(self.num_classes, x.shape[-1], name=self.last)(pooled(x))
