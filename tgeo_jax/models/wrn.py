"""Wide residual networks for 32x32 images."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax

from tgeo_jax.models.layers import Dtype, conv, conv_norm, head, norm, pooled, recomputed

Array = jax.Array


class _Block(nn.Module):
    """Pre-activation; where the width changes, the shortcut starts from the activated input."""

    planes: int
    strides: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x_BxHxWxC: Array, train: bool) -> Array:
        layer = functools.partial(conv_norm, train=train, dtype=self.dtype)
        dtype = self.dtype
        activated = nn.relu(norm(train, name="bn1", dtype=dtype)(x_BxHxWxC))
        x = nn.relu(layer(activated, self.planes, 3, self.strides, names=("conv1", "bn2")))
        x = conv(self.planes, 3, name="conv2", dtype=dtype)(x)
        if x_BxHxWxC.shape[-1] == self.planes:
            return x + x_BxHxWxC
        project = conv(self.planes, 1, self.strides, name="convShortcut", dtype=dtype)
        return x + project(activated)


class _Group(nn.Module):
    """Blocks of one width, the first of which may stride."""

    depth: int
    planes: int
    strides: int
    dtype: Dtype
    remat: bool

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        block = recomputed(_Block, self.remat)
        for index in range(self.depth):
            strides = self.strides if index == 0 else 1
            x = block(self.planes, strides, self.dtype, name=f"layer_{index}")(x, train)
        return x


class WideResNet(nn.Module):
    """A wide residual network (Zagoruyko and Komodakis 2016, arXiv 1605.07146), without dropout.

    Attributes:
        num_classes: K.
        depth: 6n + 4.
        widening: factor over 16, 32, 64 channels.
        dtype: of the computation.
        remat: whether blocks are recomputed in the backward pass instead of kept.

    Examples:
        >>> images = jax.numpy.zeros((2, 32, 32, 3))
        >>> net = WideResNet(100, 10, 1)
        >>> jax.eval_shape(net.init_with_output, jax.random.key(0), images)[0].shape
        (2, 100)
    """

    num_classes: int
    depth: int
    widening: int
    dtype: Dtype = None
    remat: bool = False

    @nn.compact
    def __call__(self, images_BxHxWxC: Array, train: bool = False) -> Array:
        x = conv(16, 3, name="conv1", dtype=self.dtype)(images_BxHxWxC)
        for index, (width, strides) in enumerate(((16, 1), (32, 2), (64, 2)), start=1):
            planes, depth = width * self.widening, (self.depth - 4) // 6
            group = _Group(depth, planes, strides, self.dtype, self.remat, name=f"block{index}")
            x = group(x, train)
        x = nn.relu(norm(train, name="bn1", dtype=self.dtype)(x))
        return head(self.num_classes, x.shape[-1], name="fc", bias=False)(pooled(x))
