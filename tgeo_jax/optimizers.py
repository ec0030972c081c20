"""Optimisers and learning-rate schedules from a configuration section. All of them are optax."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

OPTIMIZERS = ("sgd", "adam", "adamw")
SCHEDULES = ("constant", "step", "cosine")


def schedule(section: Any, steps_per_epoch: int, epochs: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up, then constant, step drops or a cosine to zero.

    Args:
        section: an optimizer section of the configuration (`config.optimizer`).
        steps_per_epoch: converts its epochs into steps.
        epochs: length of training.

    Returns:
        step -> learning rate.

    Examples:
        >>> from tgeo_jax import config
        >>> section = config.default().optimizer
        >>> section.update(schedule="step", drop_epochs=(2,), learning_rate=0.1)
        >>> rate = schedule(section, steps_per_epoch=10, epochs=3)
        >>> print(rate(19), rate(20))
        0.1 0.01
    """
    rate = section.learning_rate
    warmup = round(section.warmup_epochs * steps_per_epoch)
    if section.schedule == "cosine":
        main = optax.cosine_decay_schedule(rate, max(epochs * steps_per_epoch - warmup, 1))
    elif section.schedule == "step":
        drops = {e * steps_per_epoch - warmup: section.drop_factor for e in section.drop_epochs}
        main = optax.piecewise_constant_schedule(rate, drops)
    else:
        main = optax.constant_schedule(rate)
    if not warmup:
        return main
    return optax.join_schedules([optax.linear_schedule(0.0, rate, warmup), main], [warmup])


def build(
    section: Any, steps_per_epoch: int, epochs: int, every: int = 1
) -> optax.GradientTransformation:
    """Optimiser with clipping, weight decay and schedule.

    Weight decay is added to the gradient before momentum, as PyTorch's SGD and Adam do, except
    for `adamw`, where it is decoupled.

    Args:
        section: an optimizer section of the configuration.
        steps_per_epoch: for the schedule.
        epochs: for the schedule.
        every: training steps from one update to the next; the schedule follows training steps.

    Returns:
        An optax transformation. Adam has `eps_root > 0`: its derivative is NaN without, where
        gradient and second moment are zero.

    Examples:
        >>> import jax.numpy as jnp
        >>> from tgeo_jax import config
        >>> section = config.default().optimizer
        >>> section.update(learning_rate=0.5, momentum=0.0, weight_decay=0.1)
        >>> sgd, grad, param = build(section, 1, 1), jnp.array(1.0), jnp.array(2.0)
        >>> print(sgd.update(grad, sgd.init(param), param)[0])    # -0.5 (1 + 0.1 * 2)
        -0.6
    """
    by_step = schedule(section, steps_per_epoch, epochs)

    def rate(updates: jax.typing.ArrayLike) -> jax.typing.ArrayLike:
        return by_step(updates * every)

    parts = []
    if section.clip_norm > 0:
        parts.append(_clip_by_global_norm(section.clip_norm))
    if section.name == "adamw":
        parts.append(optax.adamw(rate, eps_root=1e-16, weight_decay=section.weight_decay))
        return optax.chain(*parts)
    if section.weight_decay > 0:
        parts.append(optax.add_decayed_weights(section.weight_decay))
    if section.name == "adam":
        parts.append(optax.adam(rate, eps_root=1e-16))
    else:
        parts.append(optax.sgd(rate, section.momentum or None, section.nesterov))
    return optax.chain(*parts)


def _clip_by_global_norm(largest: float) -> optax.GradientTransformation:
    """As optax's, but with a derivative where the gradient is zero: hypergradients pass through."""

    bound = float(largest)  # of an integer JAX would want 32 bits

    def update(grads: optax.Updates, state: optax.OptState, params: Any = None) -> tuple:
        del params
        squares = optax.tree.sum(jax.tree.map(lambda g: jnp.sum(jnp.square(g)), grads))
        # The derivative of sqrt at 0 is infinite: below the bound the norm is not even formed.
        clips = squares > bound * bound
        scale = jnp.where(clips, bound / jnp.sqrt(jnp.where(clips, squares, 1)), 1)
        return jax.tree.map(lambda g: g * scale.astype(g.dtype), grads), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
