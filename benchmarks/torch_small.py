"""PyTorch twins of our own small networks, and the way from Flax variables into PyTorch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

_LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}


class MLP(nn.Module):
    """`models.MLP` for images of `inputs` values; submodules have the names of ours."""

    def __init__(self, num_classes: int, inputs: int, hidden: Sequence[int] = (64,)):
        super().__init__()
        for index, width in enumerate([*hidden, num_classes]):
            self.add_module(f"Dense_{index}", nn.Linear(inputs, width))
            inputs = width
        self.depth = len(hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.permute(0, 2, 3, 1).flatten(1)  # channels last, as ours flattens them
        for index in range(self.depth):
            x = F.relu(self.get_submodule(f"Dense_{index}")(x))
        return self.get_submodule(f"Dense_{self.depth}")(x)


class CNN(nn.Module):
    """`models.CNN`; submodules have the names of ours."""

    def __init__(self, num_classes: int, channels: int = 1, widths: Sequence[int] = (16, 32)):
        super().__init__()
        for index, width in enumerate(widths):
            stride, padding = (2, 0) if index else (1, 1)
            layer = nn.Conv2d(channels, width, 3, stride, padding, bias=False)
            self.add_module(f"Conv_{index}", layer)
            self.add_module(f"BatchNorm_{index}", nn.BatchNorm2d(width))
            channels = width
        self.Dense_0 = nn.Linear(channels, num_classes)
        self.depth = len(widths)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index in range(self.depth):
            if index:  # "SAME" at stride 2, which PyTorch does not have: an even side gets (0, 1)
                height, width = x.shape[2:]
                x = F.pad(x, (width % 2, 1, height % 2, 1))
            x = self.get_submodule(f"Conv_{index}")(x)
            x = F.relu(self.get_submodule(f"BatchNorm_{index}")(x))
        return self.Dense_0(x.mean((2, 3)))


NETS = {"mlp": MLP, "cnn": CNN}


def as_torch(variables: Mapping[str, Any], module: nn.Module) -> dict[str, np.ndarray]:
    """Flax variables under the names and in the layouts of a PyTorch network.

    Args:
        variables: of any network here or in `models`, or gradients; collections may be missing.
        module: says whether `layer1_0` is called so or `layer1.0`.

    Returns:
        Arrays by the names of `module.state_dict()`.
    """
    names, found = set(module.state_dict()), {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(dict(variables))[0]:
        *parents, last = [str(key.key) for key in path[1:]]  # without the collection
        dotted = [re.sub(r"_(?=\d)", ".", parent) for parent in parents]
        end = _LEAVES.get(last, last)
        plain = ".".join([*parents, end])
        found[plain if plain in names else ".".join([*dotted, end])] = _torch_layout(leaf)
    return found


def copy_variables(variables: Mapping[str, Any], module: nn.Module) -> None:
    """Overwrites all parameters and running statistics of a PyTorch network by ours.

    Args:
        variables: of a Flax network with the same layers, params and batch_stats.
        module: keeps its dtype and memory format.

    Raises:
        ValueError: variables that are not those of this network.
    """
    found = as_torch(variables, module)
    wanted = {key for key in module.state_dict() if not key.endswith("num_batches_tracked")}
    if found.keys() != wanted:
        raise ValueError(f"not in both networks: {sorted(found.keys() ^ wanted)}")
    tensors = {name: torch.tensor(leaf) for name, leaf in found.items()}
    module.load_state_dict(tensors, strict=False)


def _torch_layout(leaf: Any) -> np.ndarray:
    array = np.array(leaf)
    if array.ndim == 4:  # height, width, in, out
        return array.transpose(3, 2, 0, 1)
    return array.T if array.ndim == 2 else array
