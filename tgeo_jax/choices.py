"""The three axes of a configuration: builds what is chosen, and says what is wrong with it.

Combinations that make no sense are refused here, each with its reason, before data or devices are
touched.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from tgeo_jax import losses, margins, ratios, roles
from tgeo_jax.errors import ConfigError
from tgeo_jax.fusion import FusionRatio
from tgeo_jax.models.build import FACES
from tgeo_jax.values import shown


def soft_loss(section: ConfigDict) -> losses.SoftLoss:
    """The soft loss of a configuration's `loss` section, or the weighted sum of several.

    Raises:
        ConfigError: a loss named twice, or a number of weights that is not that of the losses.

    Examples:
        >>> from tgeo_jax import config
        >>> section = config.default().loss
        >>> section.update(name="kl+cmkd", weights=(1.0,))
        >>> soft_loss(section)
        Traceback (most recent call last):
        ...
        tgeo_jax.errors.ConfigError: loss.weights=(1.0,): must hold one weight for each of the 2 \
losses of loss.name='kl+cmkd', or none
    """
    names = section.name.split("+")
    if len(set(names)) < len(names):
        raise ConfigError(f"loss.name={section.name!r}: must name each loss once; weigh it instead")
    if section.weights and len(section.weights) != len(names):
        raise ConfigError(
            f"loss.weights={tuple(section.weights)}: must hold one weight for each of the "
            f"{len(names)} losses of loss.name={section.name!r}, or none"
        )
    parts = [losses.soft_loss(name, **section[name].to_dict()) for name in names]
    if len(parts) == 1 and not section.weights:
        return parts[0]
    return losses.weighted_sum(parts, section.weights or (1.0,) * len(parts))


def hard_loss(section: ConfigDict, soft_scale: float | None) -> margins.HardLoss:
    """The hard loss of a configuration's `loss` section for a network.

    Args:
        section: of the configuration.
        soft_scale: of the network's cosine head; None: it has none.

    Raises:
        ConfigError: a margin loss for a network without a cosine head, or an option it refuses.

    Examples:
        >>> from tgeo_jax import config
        >>> section = config.default().loss
        >>> print(hard_loss(section, None)(jnp.zeros((1, 2)), jnp.array([0])).round(4))
        [0.6931]
        >>> section.hard = "arcface"
        >>> hard_loss(section, None)
        Traceback (most recent call last):
        ...
        tgeo_jax.errors.ConfigError: loss.hard='arcface': needs a network that ends in a cosine head
    """
    try:
        found = margins.hard_loss(section.hard, soft_scale, **section[section.hard].to_dict())
        jax.eval_shape(found, jnp.zeros((2, 3)), jnp.zeros(2, jnp.int32))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return found


def ratio(section: ConfigDict) -> FusionRatio:
    """The ratio of a configuration's `ratio` section.

    Raises:
        ConfigError: an option that it refuses.

    Examples:
        >>> from tgeo_jax import config
        >>> ratio(config.default().ratio).init(jax.random.key(0), 10)
        {}
    """
    try:
        return ratios.RATIOS[section.name](**section[section.name].to_dict())
    except ValueError as error:
        said = str(error)
        full = said if said.startswith("ratio.") else f"ratio.{section.name}.{said}"
        raise ConfigError(full) from error


def role(section: ConfigDict, teacher: nn.Module | None) -> roles.Role:
    """The role of a configuration's `role` section.

    Raises:
        ConfigError: an option that it refuses.

    Examples:
        >>> from tgeo_jax import config
        >>> role(config.default().role, nn.Dense(3)).needs_trained
        True
    """
    try:
        return roles.ROLES[section.name](teacher, **section[section.name].to_dict())
    except ValueError as error:
        raise ConfigError(str(error)) from error


def any_role(section: ConfigDict) -> roles.Role:
    """The role as far as it can be known without its networks.

    Raises:
        ConfigError: an option that it refuses.

    Examples:
        >>> from tgeo_jax import config
        >>> any_role(config.default().role).anchored
        False
    """
    return role(section, nn.Dense(1))


def check(config: ConfigDict) -> None:
    """Checks what is chosen on each axis, and that the choices go together.

    Raises:
        ConfigError: the first thing wrong, naming field, value and what would be right.

    Examples:
        >>> from tgeo_jax import config
        >>> chosen = config.default()
        >>> chosen.teacher.workdir, chosen.loss.name = "runs/teacher", "cmkd"
        >>> chosen.loss.cmkd.direction = "up"
        >>> check(chosen)
        Traceback (most recent call last):
        ...
        tgeo_jax.errors.ConfigError: loss.cmkd.direction='up': use one of hard_to_spearman, \
hard_to_pearson, none
    """
    for name in config.loss.name.split("+"):
        _check_numbers(f"loss.{name}", config.loss[name].to_dict())
        check_loss(name, losses.soft_loss(name, **config.loss[name].to_dict()), num_classes=3)
    soft_loss(config.loss)
    chosen_ratio = ratio(config.ratio)
    chosen_role = any_role(config.role)
    _check_teacher(config, chosen_role)
    _check_file_name(config)
    _check_widths(config)
    _check_hard(config, chosen_role)
    _check_weights(config, chosen_role)
    _check_meta(config, chosen_ratio)


def _check_hard(config: ConfigDict, chosen: roles.Role) -> None:
    """Margins are for cosines: every network that trains must have some."""
    if config.loss.hard == "cross_entropy":
        return
    trains = ["student"] + ["teacher"] * (chosen.peer is not None)
    for which in trains:
        name = config[which].name
        options = config[which].get(name, {})
        if "soft_scale" not in options:
            raise ConfigError(
                f"loss.hard={config.loss.hard!r}: needs networks that end in a cosine head, and "
                f"{which}.name={name!r} has none; use one of {', '.join(FACES)}, or "
                "loss.hard='cross_entropy'"
            )
        hard_loss(config.loss, options.soft_scale)


def check_loss(name: str, loss: losses.SoftLoss, num_classes: int) -> None:
    """Lets a soft loss say what it thinks of its options and of the number of classes.

    Raises:
        ConfigError: what it says.

    Examples:
        >>> check_loss("dkd", losses.soft_loss("dkd"), num_classes=2)
        Traceback (most recent call last):
        ...
        tgeo_jax.errors.ConfigError: loss 'dkd' with K = 2 classes: it needs more than 2, because \
it compares the classes other than the true one; use 'kl'
    """
    logits_BxK, labels_B = jnp.zeros((2, num_classes)), jnp.zeros(2, jnp.int32)
    try:
        jax.eval_shape(loss, logits_BxK, logits_BxK, labels_B)
    except ValueError as error:
        said = str(error)
        raise ConfigError(said if said.startswith("loss ") else f"loss.{name}.{said}") from error
    if num_classes == 2 and not _has_gradient(loss):
        raise ConfigError(
            f"loss {name!r} with K = 2 classes: it has no gradient, because two logits that are "
            "standardised or correlated only say which one is higher; use 'kl'"
        )


def _has_gradient(loss: losses.SoftLoss) -> bool:
    student, teacher = jnp.array([[0.5, -0.2], [-1.0, 0.1], [0.3, 1.2]]), jnp.eye(3, 2)
    pull = jax.grad(lambda logits: loss(logits, teacher, jnp.array([0, 1, 0])).sum())
    return bool(jnp.abs(pull(student)).max() > 1e-3)


def _check_numbers(path: str, options: dict[str, Any]) -> None:
    for option, value in options.items():
        if isinstance(value, bool | str) or value is None:
            continue
        positive = "temperature" in option or option == "rank_strength"
        if not (math.isfinite(value) and (value > 0 if positive else value >= 0)):
            bound = "> 0" if positive else ">= 0"
            raise ConfigError(f"{path}.{option}={value}: must be a finite number {bound}")
        if "temperature" in option and not 1e-6 <= value <= 1e6:  # float32 holds its square
            raise ConfigError(f"{path}.{option}={value}: must lie in [1e-6, 1e6]")


def _check_teacher(config: ConfigDict, chosen: roles.Role) -> None:
    if chosen.needs_trained and not config.teacher.workdir:
        raise ConfigError(
            f"teacher.workdir='': role.name={config.role.name!r} needs a trained teacher; name the "
            "folder of the run that trained it (or set role.name='alone')"
        )
    data = config.data
    augmented = data.crop_padding or data.flip or data.cutout or data.randaugment_layers
    if chosen.cached is not None and chosen.cached.views and not augmented:
        raise ConfigError(
            f"role.cached.views={chosen.cached.views}: nothing is augmented, so all views are the "
            "clean image; use role.cached.views=0 (or data.crop_padding, data.flip)"
        )


def _check_file_name(config: ConfigDict) -> None:
    name = config.role.cached.name
    if config.role.name != "cached":
        return
    # It is written beside the dataset and nowhere else.
    if "/" in name or "\\" in name or len(name.encode()) > 200:
        raise ConfigError(
            f"role.cached.name={shown(name)}: must be the name of a file, without folders and of "
            "at most 200 bytes"
        )


def _check_widths(config: ConfigDict) -> None:
    for which in ("student", "teacher"):
        section = config[which]
        options = section[section.name].to_dict() if section.name in section else {}
        for field, value in options.items():
            if isinstance(value, tuple | list) and not all(
                isinstance(width, int) and width > 0 for width in value
            ):
                path = f"{which}.{section.name}.{field}"
                raise ConfigError(f"{path}={tuple(value)}: must hold positive integers")
            if field in _OPTION_RULES and not _OPTION_RULES[field][0](value):
                path = f"{which}.{section.name}.{field}"
                raise ConfigError(f"{path}={value}: must {_OPTION_RULES[field][1]}")


# Of numbers among the options of networks: what is right, and its name.
_OPTION_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "embedding": (lambda v: v > 0, "be a positive integer"),
    "soft_scale": (lambda v: 1e-6 <= v <= 1e6, "lie in [1e-6, 1e6]; 16 is the default"),
    "dropout": (lambda v: 0 <= v < 1, "lie in [0, 1)"),
    "stem_strides": (lambda v: 1 <= v <= 16, "be an integer in [1, 16]"),
}


def _check_weights(config: ConfigDict, chosen: roles.Role) -> None:
    drops = 0
    if config.optimizer.schedule == "step":
        drops = len(config.optimizer.drop_epochs)
    for field, values in chosen.weights._asdict().items():
        if len(values) > 1 + drops:
            raise ConfigError(
                f"role.{config.role.name}.{field}={tuple(values)}: the second weight begins where "
                "the student's learning rate drops first, and so on; give it as many drops, by "
                "optimizer.schedule='step' and optimizer.drop_epochs"
            )


def _check_meta(config: ConfigDict, chosen: FusionRatio) -> None:
    meta = config.meta
    if meta.order == "prequential" and meta.estimator != "mixed":
        raise ConfigError(
            f"meta.estimator={meta.estimator!r}: must be 'mixed' with "
            "meta.order='prequential', which reuses the forward pass"
        )
    if meta.estimator == "finite_difference" and config.precision != "float32":
        raise ConfigError(
            f"precision={config.precision!r}: rounds away what meta.estimator='finite_difference' "
            "measures; use 'mixed', or float32"
        )
    if chosen.per_batch is not None and meta.accumulate > 1:
        raise ConfigError(
            f"meta.accumulate={meta.accumulate}: must be 1 with ratio.name="
            f"{config.ratio.name!r}, which learns nothing that outlives a batch"
        )
