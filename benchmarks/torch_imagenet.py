"""The ImageNet networks of torchvision (ResNets, MobileNetV2), mdistiller and timm (ViTs)."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from benchmarks.torch_nets import Inverted, conv, conv_bn, global_mean, named, residual_layers


def resnet(num_classes: int, repeats: list[int], bottleneck: bool) -> nn.Module:
    return named(
        conv1=conv(3, 64, 7, 2),
        bn1=nn.BatchNorm2d(64),
        relu=nn.ReLU(),
        maxpool=nn.MaxPool2d(3, 2, 1),
        **residual_layers(64, [64, 128, 256, 512], repeats, bottleneck, "downsample"),
        avgpool=global_mean(),
        fc=nn.Linear(2048 if bottleneck else 512, num_classes),
    )


def mobilenet_v1(num_classes: int) -> nn.Module:
    """Its pool of 7x7 makes a global mean of 224x224 images only."""
    inputs, stages = 32, [nn.Sequential(*conv_bn(3, 32, 3, 2))]
    settings = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5]
    for width, stride in [*settings, (1024, 2), (1024, 1)]:
        depthwise = conv_bn(inputs, inputs, 3, stride, inputs)
        stages.append(nn.Sequential(*depthwise, *conv_bn(inputs, width, 1)))
        inputs = width
    return named(
        model=nn.Sequential(*stages, nn.AvgPool2d(7)),
        flatten=nn.Flatten(),
        fc=nn.Linear(1024, num_classes),
    )


def mobilenet_v2(num_classes: int) -> nn.Module:
    """Unlike `torch_nets.mobile_half`, an expansion of 1 has no convolution."""
    group = lambda *shape: nn.Sequential(*conv_bn(*shape, activation=nn.ReLU6))  # noqa: E731
    inputs = 32
    features: list[nn.Module] = [group(3, 32, 3, 2)]
    settings = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2)]
    settings += [(6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]
    for expansion, width, repeat, first_stride in settings:
        for index in range(repeat):
            stride, middle = first_stride if index == 0 else 1, expansion * inputs
            branch: list[nn.Module] = [group(inputs, middle, 1)] if expansion > 1 else []
            branch += [group(middle, middle, 3, stride, middle)]
            branch += [conv(middle, width, 1), nn.BatchNorm2d(width)]
            features.append(Inverted(nn.Sequential(*branch), stride == 1 and inputs == width))
            inputs = width
    features.append(group(inputs, 1280, 1))
    return named(
        features=nn.Sequential(*features),
        avgpool=global_mean(),
        classifier=nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, num_classes)),
    )


class Attention(nn.Module):
    """The dense layer's outputs are all queries, then all keys, then all values, by head."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.heads = heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        split = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = split
        weights = (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1)
        return self.proj((weights @ value).transpose(1, 2).flatten(2))


class TransformerBlock(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width, eps=1e-6), Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        fc1, fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.mlp = named(fc1=fc1, gelu=nn.GELU(), fc2=fc2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    def __init__(
        self, num_classes: int, width: int, heads: int, depth: int = 12, image_side: int = 224
    ):
        super().__init__()
        patch = 16
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (image_side // patch) ** 2, width))
        self.patch_embed = named(proj=nn.Conv2d(3, width, patch, patch))
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        patches = self.patch_embed(x).flatten(2).mT
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), patches], 1)
        return self.head(self.norm(self.blocks(tokens + self.pos_embed))[:, 0])


NETS = {
    "resnet18": functools.partial(resnet, repeats=[2, 2, 2, 2], bottleneck=False),
    "resnet34": functools.partial(resnet, repeats=[3, 4, 6, 3], bottleneck=False),
    "resnet50": functools.partial(resnet, repeats=[3, 4, 6, 3], bottleneck=True),
    "resnet101": functools.partial(resnet, repeats=[3, 4, 23, 3], bottleneck=True),
    "resnet152": functools.partial(resnet, repeats=[3, 8, 36, 3], bottleneck=True),
    "mobilenetv1": mobilenet_v1,
    "mobilenetv2": mobilenet_v2,
    "deit_tiny": functools.partial(VisionTransformer, width=192, heads=3),
    "deit_small": functools.partial(VisionTransformer, width=384, heads=6),
    "vit_base": functools.partial(VisionTransformer, width=768, heads=12),
}
ANY_SIDE = {name for name in NETS if name.startswith("resnet")} | {"mobilenetv2"}


def image_side(name: str, **options: Any) -> int:
    """A size of images that the network takes; a small one where it takes many."""
    if name not in NETS:
        return 32
    return 64 if name in ANY_SIDE else options.get("image_side", 224)
