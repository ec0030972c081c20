"""MobileNets: V2 at half width for 32x32 images, V1 and V2 for ImageNet."""

from __future__ import annotations

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
from jax.nn import initializers

from tgeo_jax.models.layers import Dtype, conv_norm, head, pooled, recomputed

Array = jax.Array
# Expansion, channels, repeats, first stride. At 32x32 the second group does not stride.
_GROUPS = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
_LAST = 1280
# Channels and stride of each depthwise-separable block.
_SEPARABLE = (
    (64, 1),
    (128, 2),
    (128, 1),
    (256, 2),
    (256, 1),
    (512, 2),
    *((512, 1),) * 5,
    (1024, 2),
    (1024, 1),
)


class _Inverted(nn.Module):
    """Expand 1x1, depthwise 3x3, project 1x1 without activation; added to its input if it fits.

    `names` are those of the (convolution, norm) pairs in the original; of two pairs there is no
    expansion.
    """

    features: int
    strides: int
    expansion: int
    activation: Callable
    names: tuple[tuple[str, str], ...]
    dtype: Dtype

    @nn.compact
    def __call__(self, x_BxHxWxC: Array, train: bool) -> Array:
        layer = functools.partial(conv_norm, train=train, dtype=self.dtype)
        x, width = x_BxHxWxC, x_BxHxWxC.shape[-1] * self.expansion
        *expand, depthwise, project = self.names
        for names in expand:
            x = self.activation(layer(x, width, 1, names=names))
        x = self.activation(layer(x, width, 3, self.strides, names=depthwise, groups=width))
        x = layer(x, self.features, 1, names=project)
        fits = self.strides == 1 and x_BxHxWxC.shape[-1] == self.features
        return x + x_BxHxWxC if fits else x


class MobileNetV2(nn.Module):
    """MobileNetV2 (Sandler et al. 2018, arXiv 1801.04381) for ImageNet, as torchvision has it.

    Attributes:
        num_classes: K.
        dtype: of the computation.
        remat: whether blocks are recomputed in the backward pass instead of kept.

    Examples:
        >>> images = jax.numpy.zeros((2, 32, 32, 3))
        >>> net = MobileNetV2(10)
        >>> jax.eval_shape(net.init_with_output, jax.random.key(0), images)[0].shape
        (2, 10)
    """

    num_classes: int
    dtype: Dtype = None
    remat: bool = False

    @nn.compact
    def __call__(self, images_BxHxWxC: Array, train: bool = False) -> Array:
        layer = functools.partial(conv_norm, train=train, dtype=self.dtype)
        x = nn.relu6(layer(images_BxHxWxC, 32, 3, 2, names=("features_0_0", "features_0_1")))
        inverted, index = recomputed(_Inverted, self.remat), 0
        for expansion, features, repeats, first in _GROUPS:
            for repeat in range(repeats):
                index += 1
                pairs = (("conv_0_0", "conv_0_1"), ("conv_1_0", "conv_1_1"), ("conv_2", "conv_3"))
                without_expansion = (("conv_0_0", "conv_0_1"), ("conv_1", "conv_2"))
                block = inverted(
                    features,
                    first if repeat == 0 else 1,
                    expansion,
                    nn.relu6,
                    without_expansion if expansion == 1 else pairs,
                    self.dtype,
                    name=f"features_{index}",
                )
                x = block(x, train)
        last = f"features_{index + 1}"
        x = nn.relu6(layer(x, _LAST, 1, names=(f"{last}_0", f"{last}_1")))
        normal = initializers.normal(0.01)
        return head(self.num_classes, _LAST, name="classifier_1", init=normal)(pooled(x))


class SmallMobileNetV2(nn.Module):
    """MobileNetV2 for 32x32 images as the CIFAR distillation literature has it.

    It strides in the stem but not in the second group, expands in the first block too (by 1), and
    activates with ReLU.

    Attributes:
        num_classes: K.
        width: factor over the channels of the blocks; the last layer keeps 1,280.
        dtype: of the computation.
        remat: whether blocks are recomputed in the backward pass instead of kept.

    Examples:
        >>> images = jax.numpy.zeros((2, 32, 32, 3))
        >>> net = SmallMobileNetV2(10)
        >>> jax.eval_shape(net.init_with_output, jax.random.key(0), images)[0].shape
        (2, 10)
    """

    num_classes: int
    width: float = 0.5
    dtype: Dtype = None
    remat: bool = False

    @nn.compact
    def __call__(self, images_BxHxWxC: Array, train: bool = False) -> Array:
        layer = functools.partial(conv_norm, train=train, dtype=self.dtype)
        x = nn.relu(layer(images_BxHxWxC, int(32 * self.width), 3, 2, names=("conv1_0", "conv1_1")))
        inverted = recomputed(_Inverted, self.remat)
        names = (("conv_0", "conv_1"), ("conv_3", "conv_4"), ("conv_6", "conv_7"))
        for group, (expansion, channels, repeats, first) in enumerate(_GROUPS):
            for repeat in range(repeats):
                strides = first if repeat == 0 and group != 1 else 1
                block = inverted(
                    int(channels * self.width),
                    strides,
                    expansion,
                    nn.relu,
                    names,
                    self.dtype,
                    name=f"blocks_{group}_{repeat}",
                )
                x = block(x, train)
        x = nn.relu(layer(x, _LAST, 1, names=("conv2_0", "conv2_1")))
        normal = initializers.normal(0.01)
        return head(self.num_classes, _LAST, name="classifier_0", init=normal)(pooled(x))


def _separable(
    net: MobileNetV1, x: Array, features: int, strides: int, name: str, train: bool
) -> Array:
    """Depthwise 3x3, then 1x1; no module of its own, because the original's names are flat."""
    layer, width = functools.partial(conv_norm, train=train, dtype=net.dtype), x.shape[-1]
    x = nn.relu(layer(x, width, 3, strides, names=(f"{name}_0", f"{name}_1"), groups=width))
    return nn.relu(layer(x, features, 1, names=(f"{name}_3", f"{name}_4")))


class MobileNetV1(nn.Module):
    """MobileNetV1 (Howard et al. 2017, arXiv 1704.04861) for ImageNet.

    Attributes:
        num_classes: K.
        dtype: of the computation.
        remat: whether blocks are recomputed in the backward pass instead of kept.

    Examples:
        >>> images = jax.numpy.zeros((2, 32, 32, 3))
        >>> net = MobileNetV1(10)
        >>> jax.eval_shape(net.init_with_output, jax.random.key(0), images)[0].shape
        (2, 10)
    """

    num_classes: int
    dtype: Dtype = None
    remat: bool = False

    @nn.compact
    def __call__(self, images_BxHxWxC: Array, train: bool = False) -> Array:
        layer = functools.partial(conv_norm, train=train, dtype=self.dtype)
        x = nn.relu(layer(images_BxHxWxC, 32, 3, 2, names=("model_0_0", "model_0_1")))
        block = recomputed(_separable, self.remat, static=(2, 3, 4, 5))
        for index, (features, strides) in enumerate(_SEPARABLE, start=1):
            x = block(self, x, features, strides, f"model_{index}", train)
        return head(self.num_classes, x.shape[-1], name="fc")(pooled(x))
