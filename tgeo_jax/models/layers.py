"""What the networks share: convolutions padded as PyTorch pads them, norms, heads, initialisers.

Submodules carry the names of the PyTorch originals (`layer1_0/conv1` is `layer1.0.conv1` there), so
that `convert` needs no table. Parameters and running statistics are float32 whatever `dtype` says;
it is the dtype of the computation, None for that of the inputs.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn import initializers

from tgeo_jax.models.convolution import convolve

Array = jax.Array
Dtype = Any
he_fan_out = initializers.variance_scaling(2.0, "fan_out", "normal")
# What PyTorch draws where a network says nothing: U(-1, 1) / sqrt(fan_in), for biases too.
torch_default = initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def conv(
    features: int,
    size: int,
    strides: int = 1,
    *,
    name: str,
    dtype: Dtype,
    groups: int = 1,
    bias: bool = False,
    init: Any = he_fan_out,
) -> nn.Conv:
    """A square convolution with `size // 2` zeros on every side.

    "SAME" would pad a strided convolution on one side only, which is another network.

    Examples:
        >>> layer = conv(4, 3, 2, name="conv1", dtype=None)
        >>> layer.init_with_output(jax.random.key(0), jnp.ones((1, 8, 8, 3)))[0].shape
        (1, 4, 4, 4)
    """
    return nn.Conv(
        features,
        (size, size),
        (strides, strides),
        padding=((size // 2, size // 2),) * 2,
        feature_group_count=groups,
        use_bias=bias,
        dtype=dtype,
        kernel_init=init,
        name=name,
        conv_general_dilated=convolve,
    )


def norm(train: bool, *, name: str, dtype: Dtype) -> nn.BatchNorm:
    """Batch normalisation; a momentum of 0.9 is what PyTorch calls 0.1.

    Examples:
        >>> norm(False, name="bn1", dtype=None).use_running_average
        True
    """
    return nn.BatchNorm(
        use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=dtype, name=name
    )


def conv_norm(
    x: Array,
    features: int,
    size: int,
    strides: int = 1,
    *,
    names: tuple[str, str],
    train: bool,
    dtype: Dtype,
    **options: Any,
) -> Array:
    """A convolution and its norm; to be called inside a compact module.

    Args:
        x: [B, H, W, C].
        features: channels that come out.
        size: of the kernel.
        strides: of the convolution.
        names: of both, as in the original.
        train: whether by batch statistics.
        dtype: of the computation.
        **options: `groups`, `bias` and `init` of `conv`.

    Returns:
        Normalised features, without an activation.

    Examples: the networks of this package, `resnet.BasicBlock` for one.
    """
    x = conv(features, size, strides, name=names[0], dtype=dtype, **options)(x)
    return norm(train, name=names[1], dtype=dtype)(x)


def recomputed(block: Any, remat: bool, *, static: tuple[int, ...] = (2,)) -> Any:
    """A block that, with `remat`, keeps its input alone for the backward pass and runs again there.

    Args:
        block: a module's class, or a function whose first argument is a module. Give what comes of
            it the name that the block would have: the class has another one now.
        remat: False: the block as it is.
        static: which arguments are no arrays, the module counting as 0; by default `train`, the
            second argument of most blocks.

    Examples:
        >>> recomputed(nn.Dense, False) is nn.Dense
        True
    """
    return nn.remat(block, static_argnums=static) if remat else block


def pooled(x_BxHxWxC: Array) -> Array:
    """The mean over positions, in float32 or better.

    Examples:
        >>> print(pooled(jnp.ones((1, 2, 2, 1), jnp.bfloat16)).dtype)
        float32
    """
    dtype = jnp.promote_types(x_BxHxWxC.dtype, jnp.float32)
    return jnp.mean(x_BxHxWxC, axis=(1, 2), dtype=dtype)


def head(
    num_classes: int, fan_in: int, *, name: str, init: Any = torch_default, bias: bool | None = None
) -> nn.Dense:
    """The last layer; it computes in the dtype of its input, so that logits are never bfloat16.

    Args:
        num_classes: K.
        fan_in: width of its input.
        name: as in the original.
        init: of the kernel.
        bias: True for PyTorch's default draw, False for zeros; None: as the kernel's.

    Examples:
        >>> head(3, 4, name="fc").features
        3
    """
    drawn = init is torch_default if bias is None else bias
    bound = 1 / math.sqrt(fan_in)

    def bias_init(key: Array, shape: tuple[int, ...], dtype: Dtype = jnp.float32) -> Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return nn.Dense(
        num_classes,
        kernel_init=init,
        bias_init=bias_init if drawn else initializers.zeros,
        name=name,
    )


def channel_shuffle(x_BxHxWxC: Array, groups: int) -> Array:
    """Channels of all groups in turn: `(g, C/g)` read as `(C/g, g)`.

    Examples:
        >>> print(channel_shuffle(jnp.arange(4).reshape(1, 1, 1, 4), 2).ravel())
        [0 2 1 3]
    """
    *lead, channels = x_BxHxWxC.shape
    x = x_BxHxWxC.reshape(*lead, groups, channels // groups)
    return jnp.swapaxes(x, -1, -2).reshape(*lead, channels)
