"""Small numerical helpers of the losses: precision, safe roots, checks of options."""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


def at_least_float32(values: Array) -> Array:
    """The values in float32, or in float64 if they are.

    Examples:
        >>> at_least_float32(jnp.ones(2, jnp.bfloat16)).dtype
        dtype('float32')
    """
    values = jnp.asarray(values)
    return values.astype(jnp.promote_types(values.dtype, jnp.float32))


def safe_sqrt(values: Array) -> Array:
    """Square root whose derivative at 0 is 0, not infinite.

    Examples:
        >>> print(jax.grad(safe_sqrt)(0.0), safe_sqrt(jnp.float32(9)))
        0.0 3.0
    """
    positive = values > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, values, 1)), 0)


def check_temperature(temperature: float, field: str = "temperature") -> None:
    """Refuses a temperature that is not positive.

    Raises:
        ValueError: naming field and value.

    Examples:
        >>> check_temperature(0)
        Traceback (most recent call last):
        ...
        ValueError: temperature=0: must be > 0 (4 is usual on CIFAR)
    """
    if not temperature > 0:
        raise ValueError(f"{field}={temperature}: must be > 0 (4 is usual on CIFAR)")


def check_choice(field: str, value: str, known: tuple[str, ...]) -> None:
    """Refuses a value that is none of the known ones.

    Raises:
        ValueError: naming field, value and the known ones.

    Examples:
        >>> check_choice("direction", "up", ("none",))
        Traceback (most recent call last):
        ...
        ValueError: direction='up': use one of none
    """
    if value not in known:
        raise ValueError(f"{field}={value!r}: use one of {', '.join(known)}")
