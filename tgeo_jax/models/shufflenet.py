"""ShuffleNets V1 and V2 for 32x32 images, as the CIFAR distillation literature has them."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from tgeo_jax.models.layers import (
    Dtype,
    channel_shuffle,
    conv_norm,
    head,
    pooled,
    recomputed,
    torch_default,
)

Array = jax.Array
_STEM = 24
_GROUPS = 3  # of ShuffleNet V1
_STAGES_V1 = ((240, 4), (480, 8), (960, 4))  # channels, blocks
_STAGES_V2 = ((116, 4), (232, 8), (464, 4))
_LAST_V2 = 1024


class _Grouped(nn.Module):
    """V1's block: grouped 1x1, shuffle, depthwise 3x3, grouped 1x1; striding, it concatenates."""

    features: int
    strides: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x_BxHxWxC: Array, train: bool) -> Array:
        layer = functools.partial(conv_norm, train=train, dtype=self.dtype, init=torch_default)
        shortcut = x_BxHxWxC
        features, groups = self.features, _GROUPS
        if self.strides == 2:
            features -= x_BxHxWxC.shape[-1]  # what the shortcut brings along
        if x_BxHxWxC.shape[-1] == _STEM:
            groups = 1
        inside = features // 4
        x = nn.relu(layer(x_BxHxWxC, inside, 1, names=("conv1", "bn1"), groups=groups))
        x = channel_shuffle(x, groups)
        x = nn.relu(layer(x, inside, 3, self.strides, names=("conv2", "bn2"), groups=inside))
        x = layer(x, features, 1, names=("conv3", "bn3"), groups=_GROUPS)
        if self.strides == 1:
            return nn.relu(x + shortcut)
        shortcut = nn.avg_pool(shortcut, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        return nn.relu(jnp.concatenate([x, shortcut], axis=-1))


class ShuffleNetV1(nn.Module):
    """ShuffleNet with 3 groups (Zhang et al. 2017, arXiv 1707.01083), its stem a 1x1 convolution.

    Attributes:
        num_classes: K.
        dtype: of the computation.
        remat: whether blocks are recomputed in the backward pass instead of kept.

    Examples:
        >>> images = jnp.zeros((2, 32, 32, 3))
        >>> net = ShuffleNetV1(10)
        >>> jax.eval_shape(net.init_with_output, jax.random.key(0), images)[0].shape
        (2, 10)
    """

    num_classes: int
    dtype: Dtype = None
    remat: bool = False

    @nn.compact
    def __call__(self, images_BxHxWxC: Array, train: bool = False) -> Array:
        layer = functools.partial(conv_norm, train=train, dtype=self.dtype, init=torch_default)
        x = nn.relu(layer(images_BxHxWxC, _STEM, 1, names=("conv1", "bn1")))
        block = recomputed(_Grouped, self.remat)
        for stage, (features, depth) in enumerate(_STAGES_V1, start=1):
            for index in range(depth):
                strides, name = (2 if index == 0 else 1), f"layer{stage}_{index}"
                x = block(features, strides, self.dtype, name=name)(x, train)
        return head(self.num_classes, x.shape[-1], name="linear")(pooled(x))


class _Down(nn.Module):
    """V2's striding block: two branches that both see the whole input."""

    features: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        layer = functools.partial(conv_norm, train=train, dtype=self.dtype, init=torch_default)
        half, width = self.features // 2, x.shape[-1]
        left = layer(x, width, 3, 2, names=("conv1", "bn1"), groups=width)
        left = nn.relu(layer(left, half, 1, names=("conv2", "bn2")))
        right = nn.relu(layer(x, half, 1, names=("conv3", "bn3")))
        right = layer(right, half, 3, 2, names=("conv4", "bn4"), groups=half)
        right = nn.relu(layer(right, half, 1, names=("conv5", "bn5")))
        return channel_shuffle(jnp.concatenate([left, right], axis=-1), 2)


class _Split(nn.Module):
    """V2's block: half of the channels pass by, the other half is transformed."""

    dtype: Dtype

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        layer = functools.partial(conv_norm, train=train, dtype=self.dtype, init=torch_default)
        half = x.shape[-1] // 2
        kept, x = x[..., :half], x[..., half:]
        x = nn.relu(layer(x, half, 1, names=("conv1", "bn1")))
        x = layer(x, half, 3, names=("conv2", "bn2"), groups=half)
        x = nn.relu(layer(x, half, 1, names=("conv3", "bn3")))
        return channel_shuffle(jnp.concatenate([kept, x], axis=-1), 2)


class ShuffleNetV2(nn.Module):
    """ShuffleNet V2 1x (Ma et al. 2018, arXiv 1807.11164), its stem a 1x1 convolution.

    Attributes:
        num_classes: K.
        dtype: of the computation.
        remat: whether blocks are recomputed in the backward pass instead of kept.

    Examples:
        >>> images = jnp.zeros((2, 32, 32, 3))
        >>> net = ShuffleNetV2(10)
        >>> jax.eval_shape(net.init_with_output, jax.random.key(0), images)[0].shape
        (2, 10)
    """

    num_classes: int
    dtype: Dtype = None
    remat: bool = False

    @nn.compact
    def __call__(self, images_BxHxWxC: Array, train: bool = False) -> Array:
        layer = functools.partial(conv_norm, train=train, dtype=self.dtype, init=torch_default)
        x = nn.relu(layer(images_BxHxWxC, _STEM, 1, names=("conv1", "bn1")))
        down, split = recomputed(_Down, self.remat), recomputed(_Split, self.remat)
        for stage, (features, depth) in enumerate(_STAGES_V2, start=1):
            x = down(features, self.dtype, name=f"layer{stage}_0")(x, train)
            for index in range(1, depth):
                x = split(self.dtype, name=f"layer{stage}_{index}")(x, train)
        x = nn.relu(layer(x, _LAST_V2, 1, names=("conv2", "bn2")))
        return head(self.num_classes, x.shape[-1], name="linear")(pooled(x))
