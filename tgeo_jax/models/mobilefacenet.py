"""MobileFaceNet: about a million parameters for faces."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax

from tgeo_jax import numeric
from tgeo_jax.models.cosine import FaceNetwork, PReLU
from tgeo_jax.models.layers import Dtype, conv_norm, norm, recomputed

Array = jax.Array
# Expansion, channels, repeats, first stride.
_GROUPS = (
    (2, 64, 5, 2),
    (4, 128, 1, 2),
    (2, 128, 6, 1),
    (4, 128, 1, 2),
    (2, 128, 2, 1),
)
_LAST = 512


class _Inverted(nn.Module):
    """Expand 1x1, depthwise 3x3, project 1x1 without activation; added to its input if it fits."""

    features: int
    strides: int
    expansion: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x_BxHxWxC: Array, train: bool) -> Array:
        layer = functools.partial(conv_norm, train=train, dtype=self.dtype)
        width = x_BxHxWxC.shape[-1] * self.expansion
        x = layer(x_BxHxWxC, width, 1, names=("expand", "expand_bn"))
        x = PReLU(self.dtype, name="expand_prelu")(x)
        names = ("depthwise", "depthwise_bn")
        x = layer(x, width, 3, self.strides, names=names, groups=width)
        x = PReLU(self.dtype, name="depthwise_prelu")(x)
        x = layer(x, self.features, 1, names=("project", "project_bn"))
        fits = self.strides == 1 and x_BxHxWxC.shape[-1] == self.features
        return x + x_BxHxWxC if fits else x


class _Backbone(nn.Module):
    embedding: int
    dtype: Dtype
    remat: bool

    @nn.compact
    def __call__(self, images_BxHxWxC: Array, train: bool) -> Array:
        layer = functools.partial(conv_norm, train=train, dtype=self.dtype)
        x = layer(images_BxHxWxC, 64, 3, 2, names=("conv1", "conv1_bn"))
        x = PReLU(self.dtype, name="conv1_prelu")(x)
        x = layer(x, 64, 3, names=("conv2", "conv2_bn"), groups=64)
        x = PReLU(self.dtype, name="conv2_prelu")(x)
        block = recomputed(_Inverted, self.remat)
        for group, (expansion, features, repeats, first) in enumerate(_GROUPS):
            for repeat in range(repeats):
                strides = first if repeat == 0 else 1
                name = f"blocks_{group}_{repeat}"
                x = block(features, strides, expansion, self.dtype, name=name)(x, train)
        x = layer(x, _LAST, 1, names=("conv3", "conv3_bn"))
        x = PReLU(self.dtype, name="conv3_prelu")(x)
        # One weight for each position and channel, without an activation: 7x7 for 112x112 pixels.
        x = nn.Conv(
            _LAST,
            x.shape[1:3],
            padding="VALID",
            feature_group_count=_LAST,
            use_bias=False,
            dtype=self.dtype,
            name="pool",
        )(x)
        x = norm(train, name="pool_bn", dtype=self.dtype)(x)
        x_BxC = numeric.at_least_float32(x[:, 0, 0])
        embeddings_BxD = nn.Dense(self.embedding, use_bias=False, name="embedding_fc")(x_BxC)
        return nn.BatchNorm(not train, momentum=0.9, name="embedding_bn")(embeddings_BxD)


class MobileFaceNet(FaceNetwork):
    """MobileFaceNet (Chen et al. 2018, arXiv 1804.07573, table 1) for any image.

    Inverted bottlenecks with PReLU, and a depthwise convolution over all that is left of the image
    in place of a mean. The paper's embedding has 128 numbers.

    Attributes:
        num_classes, embedding, soft_scale, dtype, remat: as in `cosine.FaceNetwork`.

    Examples:
        >>> images = jax.numpy.zeros((2, 112, 112, 3))
        >>> net = MobileFaceNet(10, embedding=128)
        >>> jax.eval_shape(net.init_with_output, jax.random.key(0), images)[0].shape
        (2, 10)
    """

    def backbone(self) -> nn.Module:
        """See `cosine.FaceNetwork`."""
        return _Backbone(self.embedding, self.dtype, self.remat)
