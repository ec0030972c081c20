"""The table of networks and the one function that makes them."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from tgeo_jax.errors import nearest
from tgeo_jax.models import click, mobilenet, shufflenet
from tgeo_jax.models.cnn import CNN
from tgeo_jax.models.iresnet import IResNet
from tgeo_jax.models.mlp import MLP
from tgeo_jax.models.mobilefacenet import MobileFaceNet
from tgeo_jax.models.resnet import ResNet
from tgeo_jax.models.row_encoder import RowEncoder
from tgeo_jax.models.vgg import VGG
from tgeo_jax.models.vit import ViT
from tgeo_jax.models.wrn import WideResNet

PRECISIONS = {"float32": None, "bfloat16": jnp.bfloat16}
_fixed = functools.partial
_THIN, _TIMES_4 = (16, 16, 32, 64), (32, 64, 128, 256)
_FULL = (64, 64, 128, 256, 512)
_VGG = {
    "vgg8": (1, 1, 1, 1, 1),
    "vgg11": (1, 1, 2, 2, 2),
    "vgg13": (2, 2, 2, 2, 2),
    "vgg16": (2, 2, 3, 3, 3),
    "vgg19": (2, 2, 4, 4, 4),
}
_IMAGENET_DEPTHS = {
    "resnet18": (2, 2, 2, 2),
    "resnet34": (3, 4, 6, 3),
    "resnet50": (3, 4, 6, 3),
    "resnet101": (3, 4, 23, 3),
    "resnet152": (3, 8, 36, 3),
}


def _thin(depth: int, widths: tuple[int, ...]) -> Callable[..., nn.Module]:
    return _fixed(ResNet, depths=((depth - 2) // 6,) * 3, widths=widths)


# Networks without options for images of 32x32, by the names of the CIFAR distillation literature.
SMALL: Mapping[str, Callable[..., nn.Module]] = {
    **{f"resnet{depth}": _thin(depth, _THIN) for depth in (8, 14, 20, 32, 44, 56, 110)},
    **{f"resnet{depth}x4": _thin(depth, _TIMES_4) for depth in (8, 32)},
    **{
        f"wrn_{depth}_{widening}": _fixed(WideResNet, depth=depth, widening=widening)
        for depth in (16, 40)
        for widening in (1, 2)
    },
    **{name: _fixed(VGG, depths=depths) for name, depths in _VGG.items()},
    "MobileNetV2": mobilenet.SmallMobileNetV2,
    "ShuffleV1": shufflenet.ShuffleNetV1,
    "ShuffleV2": shufflenet.ShuffleNetV2,
    **{
        name: _fixed(
            ResNet,
            depths=_IMAGENET_DEPTHS[name.lower()],
            widths=_FULL,
            bottleneck=name == "ResNet50",
            shortcut="shortcut",
            last="linear",
        )
        for name in ("ResNet18", "ResNet50")
    },
}
# And those of ImageNet.
LARGE: Mapping[str, Callable[..., nn.Module]] = {
    **{
        name: _fixed(
            ResNet,
            depths=depths,
            widths=_FULL,
            bottleneck=name not in ("resnet18", "resnet34"),
            stem="7x7",
        )
        for name, depths in _IMAGENET_DEPTHS.items()
    },
    "mobilenetv1": mobilenet.MobileNetV1,
    "mobilenetv2": mobilenet.MobileNetV2,
    "deit_tiny": _fixed(ViT, width=192, depth=12, heads=3),
    "deit_small": _fixed(ViT, width=384, depth=12, heads=6),
    "vit_base": _fixed(ViT, width=768, depth=12, heads=12),
}
# For the rows of tables; those for the click-through rate read categories alone.
TABLES: Mapping[str, type[nn.Module]] = {
    "row_encoder": RowEncoder,
    "wide_deep": click.WideDeep,
    "deepfm": click.DeepFM,
    "dcn_v2": click.DCNv2,
}
_IRESNET = _fixed(IResNet, widths=_FULL)
# Those of faces, which end in a cosine head; see `cosine.FaceNetwork`.
FACES: Mapping[str, Callable[..., nn.Module]] = {
    "iresnet": IResNet,
    "iresnet18": _fixed(_IRESNET, depths=(2, 2, 2, 2), stem_strides=1),
    "iresnet50": _fixed(_IRESNET, depths=(3, 4, 14, 3), stem_strides=1),
    "mobilefacenet": MobileFaceNet,
}
_WITH_OPTIONS: Mapping[str, Callable[..., nn.Module]] = {
    "mlp": MLP,
    "cnn": CNN,
    **TABLES,
    **FACES,
}
MODELS: Mapping[str, Callable[..., nn.Module]] = {**_WITH_OPTIONS, **SMALL, **LARGE}


def build(
    name: str,
    num_classes: int,
    *,
    precision: str = "float32",
    remat: bool = False,
    vocabulary: Sequence[int] = (),
    **options: Any,
) -> nn.Module:
    """Makes a network by name.

    `module.apply(variables, images_BxHxWxC, train=False) -> logits_BxK`; those for tables take rows
    [B, F], float32 numbers or int32 indices of categories.

    Args:
        name: a key of `MODELS`. `ResNet50` and `MobileNetV2` are the literature's nets for 32x32
            images, `resnet50` and `mobilenetv2` those of ImageNet.
        num_classes: K >= 2.
        precision: of the computation, a key of `PRECISIONS`; parameters, running statistics and
            logits are float32 either way.
        remat: whether the backward pass recomputes the inside of every block instead of keeping
            it: less memory for one more forward pass. Variables are the same either way.
        vocabulary: of a dataset of categories, the number of values of each field, of which 0 is
            the unknown one; empty for numbers and images.
        **options: the network's own fields, as its class documents them; only `mlp`, `cnn` and
            those for tables and faces have some.

    Returns:
        A Linen module.

    Raises:
        ValueError: an unknown name, precision or option, with the nearest known one, fewer than
            2 classes, `remat` for a network without blocks, or a vocabulary for one that has no
            use for it.

    Examples:
        >>> build("mlp", 10, hidden=(8,))
        MLP(
            # attributes
            num_classes = 10
            hidden = (8,)
            dtype = None
        )
    """
    if name not in MODELS:
        raise ValueError(f"model {name!r} is unknown{nearest(name, MODELS)}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r}: unknown{nearest(precision, PRECISIONS)}")
    if num_classes < 2:
        raise ValueError(f"num_classes={num_classes}: a classifier needs at least 2 classes")
    if remat and not has_blocks(name):
        raise ValueError(
            f"remat=True: model {name!r} has no blocks to recompute; use remat=False, or a network "
            "with blocks such as 'resnet20'"
        )
    if vocabulary and "vocabulary" not in inspect.signature(MODELS[name]).parameters:
        raise ValueError(
            f"model {name!r} computes with numbers, and this dataset holds indices of categories; "
            f"use one of {', '.join(TABLES)}"
        )
    fields = default_options(name)
    for option in options:
        if option not in fields:
            known = nearest(option, fields) if fields else ": it has none"
            raise ValueError(f"model {name!r} has no option {option!r}{known}")
    if remat:
        options["remat"] = True
    if vocabulary:
        options["vocabulary"] = tuple(vocabulary)
    return MODELS[name](num_classes=num_classes, dtype=PRECISIONS[precision], **options)


def has_blocks(name: str) -> bool:
    """Whether a network repeats a block, so that it can be built with `remat`.

    Args:
        name: a key of `MODELS`.

    Examples:
        >>> has_blocks("resnet20"), has_blocks("vgg8")
        (True, False)
    """
    return "remat" in inspect.signature(MODELS[name]).parameters


def default_options(name: str) -> dict[str, Any]:
    """The options of a network with their defaults; none for most.

    Args:
        name: a key of `MODELS`.

    Examples:
        >>> default_options("mlp"), default_options("resnet20")
        ({'hidden': (64,)}, {})
    """
    if name not in _WITH_OPTIONS:
        return {}
    made: Any = _WITH_OPTIONS[name]
    fixed = getattr(made, "keywords", {})
    not_options = ("parent", "name", "num_classes", "dtype", "vocabulary", "held", "remat", *fixed)
    fields = [
        f for f in dataclasses.fields(getattr(made, "func", made)) if f.name not in not_options
    ]
    return {field.name: field.default for field in fields}
