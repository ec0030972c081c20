"""Residual networks: the thin ones for 32x32 images, the wide stem for 32x32, those of ImageNet."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax

from tgeo_jax.models.layers import Dtype, conv, head, norm, pooled

Array = jax.Array


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, projected where shape changes."""

    planes: int
    strides: int
    shortcut: str  # what the original calls its projection
    dtype: Dtype

    @nn.compact
    def __call__(self, x_BxHxWxC: Array, train: bool) -> Array:
        dtype = self.dtype
        x = conv(self.planes, 3, self.strides, name="conv1", dtype=dtype)(x_BxHxWxC)
        x = nn.relu(norm(train, name="bn1", dtype=dtype)(x))
        x = conv(self.planes, 3, name="conv2", dtype=dtype)(x)
        x = norm(train, name="bn2", dtype=dtype)(x)
        return nn.relu(x + _projected(self, x_BxHxWxC, self.planes, train))


class Bottleneck(nn.Module):
    """1x1, 3x3 (which strides) and 1x1 convolutions; four times as wide outside as inside."""

    planes: int
    strides: int
    shortcut: str
    dtype: Dtype

    @nn.compact
    def __call__(self, x_BxHxWxC: Array, train: bool) -> Array:
        dtype = self.dtype
        x = conv(self.planes, 1, name="conv1", dtype=dtype)(x_BxHxWxC)
        x = nn.relu(norm(train, name="bn1", dtype=dtype)(x))
        x = conv(self.planes, 3, self.strides, name="conv2", dtype=dtype)(x)
        x = nn.relu(norm(train, name="bn2", dtype=dtype)(x))
        x = conv(4 * self.planes, 1, name="conv3", dtype=dtype)(x)
        x = norm(train, name="bn3", dtype=dtype)(x)
        return nn.relu(x + _projected(self, x_BxHxWxC, 4 * self.planes, train))


def _projected(block: BasicBlock | Bottleneck, x: Array, features: int, train: bool) -> Array:
    if block.strides == 1 and x.shape[-1] == features:
        return x
    name, dtype = block.shortcut, block.dtype
    x = conv(features, 1, block.strides, name=f"{name}_0", dtype=dtype)(x)
    return norm(train, name=f"{name}_1", dtype=dtype)(x)


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

    @nn.compact
    def __call__(self, images_BxHxWxC: Array, train: bool = False) -> Array:
        size, strides = (7, 2) if self.stem == "7x7" else (3, 1)
        x = conv(self.widths[0], size, strides, name="conv1", dtype=self.dtype)(images_BxHxWxC)
        x = nn.relu(norm(train, name="bn1", dtype=self.dtype)(x))
        if self.stem == "7x7":
            x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        block = Bottleneck if self.bottleneck else BasicBlock
        for stage, (depth, planes) in enumerate(zip(self.depths, self.widths[1:], strict=True)):
            for index in range(depth):
                strides = 2 if stage > 0 and index == 0 else 1
                name = f"layer{stage + 1}_{index}"
                x = block(planes, strides, self.shortcut, self.dtype, name=name)(x, train)
        return head(self.num_classes, x.shape[-1], name=self.last)(pooled(x))
