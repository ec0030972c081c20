"""Shape checks that read the expected shape from the argument's own name (`logits_BxK`)."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp


def check(**arrays: Any) -> None:
    """Checks every array against the dimensions spelled after its name's last underscore.

    `logits_BxK` must have rank 2, and a letter must mean the same size wherever it occurs.
    Shapes are static, so under `jit` this runs while tracing, before anything is compiled.

    Raises:
        ValueError: a wrong rank or two sizes for one letter, with names and shapes.

    Examples:
        >>> import numpy as np
        >>> check(logits_BxK=np.zeros((4, 3)), labels_B=np.zeros(4, int))
        >>> check(logits_BxK=np.zeros((4, 3)), labels_B=np.zeros((4, 1), int))
        Traceback (most recent call last):
        ...
        ValueError: labels_B has shape (4, 1); expected rank 1, that is [B]
    """
    sizes: dict[str, tuple[int, str]] = {}
    for name, array in arrays.items():
        dims = name.rsplit("_", 1)[-1].split("x")
        shape = jnp.shape(array)
        if len(shape) != len(dims):
            raise ValueError(
                f"{name} has shape {shape}; expected rank {len(dims)}, that is [{', '.join(dims)}]"
            )
        for dim, size in zip(dims, shape, strict=True):
            known, owner = sizes.setdefault(dim, (size, name))
            if known != size:
                raise ValueError(
                    f"{name} has {dim} = {size} but {owner} has {dim} = {known} "
                    f"(shapes {shape} and {jnp.shape(arrays[owner])}); they must agree"
                )
        if name.startswith("labels") and not jnp.issubdtype(jnp.result_type(array), jnp.integer):
            raise ValueError(
                f"{name} has dtype {jnp.result_type(array)}; expected integer class indices"
            )
