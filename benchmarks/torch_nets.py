"""The networks whose PyTorch checkpoints users convert, as far as a conversion depends on them.

Keys and shapes of `state_dict()`, and the logits in evaluation mode, are those of the originals:
here the 32x32 networks of RepDistiller, whose names mdistiller shares; in `torch_imagenet` the
others, in `torch_small` the twins of our own small networks. Features and initialisation are left
out. The tests convert them; `torch_steps` trains them, as what our own steps are timed against.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)


def conv_bn(*shape: int, activation: type[nn.Module] = nn.ReLU) -> list[nn.Module]:
    """A convolution of that shape, its BatchNorm, and an activation (`nn.Identity`: none)."""
    layer = conv(*shape)
    return [layer, nn.BatchNorm2d(layer.out_channels), activation()]


def named(**modules: nn.Module) -> nn.Sequential:
    """A sequence whose keys are names instead of numbers."""
    sequence = nn.Sequential()
    for name, module in modules.items():
        sequence.add_module(name, module)
    return sequence


def global_mean() -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())


class Block(nn.Module):
    """Convolutions conv1, conv2, ... and their BatchNorms bn1, bn2, ..."""

    def __init__(self, *convs: nn.Conv2d):
        super().__init__()
        for number, layer in enumerate(convs, 1):
            self.add_module(f"conv{number}", layer)
            self.add_module(f"bn{number}", nn.BatchNorm2d(layer.out_channels))

    def layer(self, number: int, x: torch.Tensor) -> torch.Tensor:
        """BN(convolution(x))."""
        return self.get_submodule(f"bn{number}")(self.get_submodule(f"conv{number}")(x))


class Residual(Block):
    """A ResNet's block: ReLU between its convolutions and after the sum."""

    def __init__(self, shortcut: str, projection: list[nn.Module], *convs: nn.Conv2d):
        super().__init__(*convs)
        self.depth = len(convs)
        self.add_module(shortcut, nn.Sequential(*projection))
        self.shortcut_name = shortcut

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.layer(1, x)
        for number in range(2, self.depth + 1):
            out = self.layer(number, F.relu(out))
        return F.relu(out + self.get_submodule(self.shortcut_name)(x))


def residual(inputs: int, width: int, stride: int, bottleneck: bool, shortcut: str) -> Residual:
    outputs = 4 * width if bottleneck else width
    if bottleneck:
        convs = [conv(inputs, width, 1), conv(width, width, 3, stride), conv(width, outputs, 1)]
    else:
        convs = [conv(inputs, width, 3, stride), conv(width, width, 3)]
    project = stride != 1 or inputs != outputs
    projection = [conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs)] if project else []
    return Residual(shortcut, projection, *convs)


def residual_layers(
    inputs: int, widths: Sequence[int], repeats: list[int], bottleneck: bool, shortcut: str
) -> dict[str, nn.Module]:
    """layer1, layer2, ...: all but the first halve the image."""
    layers: dict[str, nn.Module] = {}
    for number, (width, repeat) in enumerate(zip(widths, repeats, strict=True), 1):
        blocks = []
        for index in range(repeat):
            stride = 2 if number > 1 and index == 0 else 1
            blocks.append(residual(inputs, width, stride, bottleneck, shortcut))
            inputs = 4 * width if bottleneck else width
        layers[f"layer{number}"] = nn.Sequential(*blocks)
    return layers


def resnet(num_classes: int, depth: int, widths: tuple[int, ...] = (16, 16, 32, 64)) -> nn.Module:
    stem, *later = widths
    return named(
        conv1=conv(3, stem, 3),
        bn1=nn.BatchNorm2d(stem),
        relu=nn.ReLU(),
        **residual_layers(stem, later, [(depth - 2) // 6] * 3, False, "downsample"),
        avgpool=global_mean(),
        fc=nn.Linear(later[-1], num_classes),
    )


def wide_stem_resnet(num_classes: int, repeats: list[int], bottleneck: bool) -> nn.Module:
    return named(
        conv1=conv(3, 64, 3),
        bn1=nn.BatchNorm2d(64),
        relu=nn.ReLU(),
        **residual_layers(64, [64, 128, 256, 512], repeats, bottleneck, "shortcut"),
        avgpool=global_mean(),
        linear=nn.Linear(2048 if bottleneck else 512, num_classes),
    )


class WideBlock(nn.Module):
    """BatchNorm and ReLU come first; a projection starts from behind them, an identity not."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), conv(inputs, outputs, 3, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(outputs), conv(outputs, outputs, 3)
        self.convShortcut = conv(inputs, outputs, 1, stride) if inputs != outputs else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        active = F.relu(self.bn1(x))
        out = self.conv2(F.relu(self.bn2(self.conv1(active))))
        return out + (x if self.convShortcut is None else self.convShortcut(active))


def wrn(num_classes: int, depth: int, factor: int) -> nn.Module:
    inputs, stages = 16, {}
    for number, width in enumerate((16 * factor, 32 * factor, 64 * factor), 1):
        blocks = []
        for index in range((depth - 4) // 6):
            blocks.append(WideBlock(inputs, width, 2 if number > 1 and index == 0 else 1))
            inputs = width
        stages[f"block{number}"] = named(layer=nn.Sequential(*blocks))
    return named(
        conv1=conv(3, 16, 3),
        **stages,
        bn1=nn.BatchNorm2d(inputs),
        relu=nn.ReLU(),
        avgpool=global_mean(),
        fc=nn.Linear(inputs, num_classes),
    )


class VGG(nn.Module):
    """The pool between the last two blocks is for 64x64 images only."""

    def __init__(self, num_classes: int, repeats: tuple[int, ...]):
        super().__init__()
        inputs = 3
        for number, width in enumerate((64, 128, 256, 512, 512)):
            layers = []
            for _ in range(repeats[number]):
                # Unlike the other networks' convolutions, these have biases.
                layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
                inputs = width
            self.add_module(f"block{number}", nn.Sequential(*layers))
        self.classifier = nn.Linear(512, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        num_pools = 4 if x.shape[2] == 64 else 3
        for number in range(5):
            x = self.get_submodule(f"block{number}")(x)
            x = F.max_pool2d(x, 2) if number < num_pools else x
        return self.classifier(x.mean((2, 3)))


class Inverted(nn.Module):
    """MobileNetV2's block: its branch, and a sum where the shape stays."""

    def __init__(self, branch: nn.Sequential, identity: bool):
        super().__init__()
        self.conv = branch
        self.identity = identity

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x) if self.identity else self.conv(x)


def mobile_half(num_classes: int) -> nn.Module:
    """Expansion 6, half the widths; a block's expansion of 1 has its convolution, too."""
    inputs, stages = 16, []
    settings = [(1, 8, 1, 1), (6, 12, 2, 1), (6, 16, 3, 2), (6, 32, 4, 2)]
    settings += [(6, 48, 3, 1), (6, 80, 3, 2), (6, 160, 1, 1)]
    for expansion, width, repeat, first_stride in settings:
        blocks = []
        for index in range(repeat):
            stride, middle = first_stride if index == 0 else 1, expansion * inputs
            branch = conv_bn(inputs, middle, 1) + conv_bn(middle, middle, 3, stride, middle)
            branch += conv_bn(middle, width, 1, activation=nn.Identity)
            blocks.append(Inverted(nn.Sequential(*branch), stride == 1 and inputs == width))
            inputs = width
        stages.append(nn.Sequential(*blocks))
    return named(
        conv1=nn.Sequential(*conv_bn(3, 16, 3, 2)),
        blocks=nn.Sequential(*stages),
        conv2=nn.Sequential(*conv_bn(inputs, 1280, 1)),
        avgpool=global_mean(),
        classifier=nn.Sequential(nn.Linear(1280, num_classes)),
    )


class Shuffle1(Block):
    """ShuffleNetV1's unit; one that halves the image appends its pooled input."""

    def __init__(self, inputs: int, outputs: int, halve: bool):
        branch = outputs - inputs if halve else outputs
        middle, groups = branch // 4, 1 if inputs == 24 else 3
        super().__init__(
            conv(inputs, middle, 1, 1, groups),
            conv(middle, middle, 3, 2 if halve else 1, middle),
            conv(middle, branch, 1, 1, 3),
        )
        self.shuffle = nn.ChannelShuffle(groups)
        self.halve = halve

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.shuffle(F.relu(self.layer(1, x)))
        out = self.layer(3, F.relu(self.layer(2, out)))
        if self.halve:
            return F.relu(torch.cat([out, F.avg_pool2d(x, 3, 2, 1)], 1))
        return F.relu(out + x)


def shuffle_v1(num_classes: int) -> nn.Module:
    inputs, layers = 24, {}
    for number, (width, repeat) in enumerate([(240, 4), (480, 8), (960, 4)], 1):
        units = [Shuffle1(inputs, width, True)]
        units += [Shuffle1(width, width, False) for _ in range(repeat - 1)]
        layers[f"layer{number}"] = nn.Sequential(*units)
        inputs = width
    return named(
        conv1=conv(3, 24, 1),
        bn1=nn.BatchNorm2d(24),
        relu=nn.ReLU(),
        **layers,
        avgpool=global_mean(),
        linear=nn.Linear(inputs, num_classes),
    )


class Shuffle2(Block):
    """ShuffleNetV2's unit: the first half of the channels passes by."""

    def __init__(self, width: int):
        half = width // 2
        super().__init__(conv(half, half, 1), conv(half, half, 3, 1, half), conv(half, half, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bypass, out = x.chunk(2, 1)
        out = self.layer(2, F.relu(self.layer(1, out)))
        return F.channel_shuffle(torch.cat([bypass, F.relu(self.layer(3, out))], 1), 2)


class Shuffle2Halving(Block):
    """ShuffleNetV2's unit that halves the image: conv1, conv2 and conv3 to conv5 are branches."""

    def __init__(self, inputs: int, width: int):
        half = width // 2
        left = [conv(inputs, inputs, 3, 2, inputs), conv(inputs, half, 1)]
        right = [conv(inputs, half, 1), conv(half, half, 3, 2, half), conv(half, half, 1)]
        super().__init__(*left, *right)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left = F.relu(self.layer(2, self.layer(1, x)))
        right = F.relu(self.layer(5, self.layer(4, F.relu(self.layer(3, x)))))
        return F.channel_shuffle(torch.cat([left, right], 1), 2)


def shuffle_v2(num_classes: int) -> nn.Module:
    inputs, layers = 24, {}
    for number, (width, repeat) in enumerate([(116, 3), (232, 7), (464, 3)], 1):
        units = [Shuffle2Halving(inputs, width), *(Shuffle2(width) for _ in range(repeat))]
        layers[f"layer{number}"] = nn.Sequential(*units)
        inputs = width
    return named(
        conv1=conv(3, 24, 1),
        bn1=nn.BatchNorm2d(24),
        relu=nn.ReLU(),
        **layers,
        conv2=conv(inputs, 1024, 1),
        bn2=nn.BatchNorm2d(1024),
        relu2=nn.ReLU(),
        avgpool=global_mean(),
        linear=nn.Linear(1024, num_classes),
    )


NETS = {
    **{
        f"resnet{depth}": functools.partial(resnet, depth=depth)
        for depth in (8, 14, 20, 32, 44, 56, 110)
    },
    **{
        f"resnet{depth}x4": functools.partial(resnet, depth=depth, widths=(32, 64, 128, 256))
        for depth in (8, 32)
    },
    **{
        f"wrn_{depth}_{factor}": functools.partial(wrn, depth=depth, factor=factor)
        for depth in (16, 40)
        for factor in (1, 2)
    },
    "vgg8": functools.partial(VGG, repeats=(1, 1, 1, 1, 1)),
    "vgg11": functools.partial(VGG, repeats=(1, 1, 2, 2, 2)),
    "vgg13": functools.partial(VGG, repeats=(2, 2, 2, 2, 2)),
    "vgg16": functools.partial(VGG, repeats=(2, 2, 3, 3, 3)),
    "vgg19": functools.partial(VGG, repeats=(2, 2, 4, 4, 4)),
    "MobileNetV2": mobile_half,
    "ShuffleV1": shuffle_v1,
    "ShuffleV2": shuffle_v2,
    "ResNet18": functools.partial(wide_stem_resnet, repeats=[2, 2, 2, 2], bottleneck=False),
    "ResNet50": functools.partial(wide_stem_resnet, repeats=[3, 4, 6, 3], bottleneck=True),
}


def build(name: str, num_classes: int, **options: Any) -> Any:
    """Makes a network of any file, initialised by PyTorch; `image_side` is for `randomised`."""
    from benchmarks import torch_imagenet, torch_small  # which need this file's blocks

    makers: dict[str, Any] = {**NETS, **torch_imagenet.NETS, **torch_small.NETS}
    module = makers[name](num_classes, **options)
    module.image_side = torch_imagenet.image_side(name, **options)
    return module


def randomised(module: Any, seed: int) -> Any:
    """In evaluation mode, with all tensors as if trained: none could be left out unnoticed.

    On random images each layer's outputs have deviation 1, and a running mean is near that of what
    its BatchNorm gets: so logits are of order 1, and depend on the image, however deep the network.
    """
    random = torch.Generator().manual_seed(seed)
    module.eval().requires_grad_(False)
    for name, tensor in module.state_dict().items():
        if name.endswith("num_batches_tracked"):
            tensor.fill_(1000)
        elif name.endswith("running_var") or (name.endswith("weight") and tensor.ndim == 1):
            tensor.uniform_(0.5, 1.5, generator=random)
        elif name.endswith("weight"):
            tensor.normal_(0, tensor[0].numel() ** -0.5, generator=random)
        else:  # biases, running means, a class token, embeddings of positions
            tensor.normal_(0, 0.3, generator=random)
    for block in module.modules():
        if isinstance(block, Residual):  # else rounding grows through 152 layers to visible errors
            last: Any = block.get_submodule(f"bn{block.depth}")
            last.weight *= 0.4

    def scale(layer, _, out):
        spatial = isinstance(layer, nn.Conv2d)
        deviation = out.var((0, 2, 3)).mean().sqrt() if spatial else out.std()
        for parameter in layer.parameters():
            parameter /= deviation
        return out / deviation

    def centre(norm, inputs):
        norm.running_mean += inputs[0].mean((0, 2, 3))

    hooks = []
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            hooks.append(layer.register_forward_hook(scale))
        elif isinstance(layer, nn.BatchNorm2d):
            hooks.append(layer.register_forward_pre_hook(centre))
    module(torch.randn((4, 3, module.image_side, module.image_side), generator=random))
    for hook in hooks:
        hook.remove()
    return module
