"""The table of networks and the one function that makes them."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn

from tgeo_jax.errors import nearest
from tgeo_jax.models.cnn import CNN
from tgeo_jax.models.mlp import MLP

MODELS: dict[str, type[nn.Module]] = {"mlp": MLP, "cnn": CNN}


def build(name: str, num_classes: int, **options: Any) -> nn.Module:
    """Makes a network by name.

    `module.apply(variables, images_BxHxWxC, train=False) -> logits_BxK`.

    Args:
        name: a key of `MODELS`.
        num_classes: K >= 2.
        **options: the network's own fields, as its class documents them.

    Returns:
        A Linen module.

    Raises:
        ValueError: an unknown name or option, with the nearest known one, or fewer than 2 classes.

    Examples:
        >>> build("mlp", 10, hidden=(8,))
        MLP(
            # attributes
            num_classes = 10
            hidden = (8,)
        )
    """
    if name not in MODELS:
        raise ValueError(f"model {name!r} is unknown{nearest(name, MODELS)}")
    if num_classes < 2:
        raise ValueError(f"num_classes={num_classes}: a classifier needs at least 2 classes")
    fields = default_options(name)
    for option in options:
        if option not in fields:
            raise ValueError(f"model {name!r} has no option {option!r}{nearest(option, fields)}")
    return MODELS[name](num_classes=num_classes, **options)


def default_options(name: str) -> dict[str, Any]:
    """The options of a network with their defaults.

    Args:
        name: a key of `MODELS`.

    Examples:
        >>> default_options("mlp")
        {'hidden': (64,)}
    """
    not_options = ("parent", "name", "num_classes")
    fields = [f for f in dataclasses.fields(MODELS[name]) if f.name not in not_options]
    return {field.name: field.default for field in fields}
