"""The methods as settings of the three axes, with the values they were published with.

`apply(config, "dkd", ...)` changes `loss`, `ratio`, `role` and what they need, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable

from ml_collections import ConfigDict

from tgeo_jax.errors import ConfigError, nearest

# DKD's weight of the non-target part, by teacher-student pair; 8 for the others.
_DKD_BETA = {
    "resnet56-resnet20": 2.0,
    "resnet110-resnet32": 2.0,
    "wrn_40_2-wrn_16_2": 6.0,
    "wrn_40_2-wrn_40_1": 6.0,
    "vgg13-vgg8": 6.0,
    "vgg13-MobileNetV2": 6.0,
}
_IMAGENET_DKD_BETA = 0.5


def apply(config: ConfigDict, method: str, pair: str, *, imagenet: bool = False) -> None:
    """Chooses a method.

    Args:
        config: with student, teacher and recipe; changed in place.
        method: a key of `METHODS`.
        pair: `teacher-student`, for values that were published by pair.
        imagenet: whether to take the values published for ImageNet, not those for CIFAR.

    Raises:
        ConfigError: an unknown method, with the nearest name.
    """
    if method not in METHODS:
        raise ConfigError(f"method {method!r}: unknown{nearest(method, METHODS)}")
    config.loss.kl.temperature = 1.0 if imagenet else 4.0
    METHODS[method](config, pair, imagenet)


def _plain(config: ConfigDict, pair: str, imagenet: bool) -> None:
    config.role.name = "alone"
    config.teacher.workdir = ""


def _kd(config: ConfigDict, pair: str, imagenet: bool) -> None:
    config.ratio.constant.alpha = 0.5 if imagenet else 0.9


def _ratio(name: str) -> Callable[[ConfigDict, str, bool], None]:
    def choose(config: ConfigDict, pair: str, imagenet: bool) -> None:
        config.ratio.name = name

    return choose


def _wls(config: ConfigDict, pair: str, imagenet: bool) -> None:
    config.ratio.name = "wls"
    config.ratio.wls.beta = 2.5 if imagenet else 2.25
    config.loss.kl.temperature = 2.0 if imagenet else 4.0


def _bikd(config: ConfigDict, pair: str, imagenet: bool) -> None:
    config.ratio.name = "bikd"
    config.meta.accumulate = 5
    config.meta.optimizer.update(name="adam", learning_rate=1e-3, weight_decay=1e-4)
    if config.optimizer.schedule == "step":
        config.meta.optimizer.update(
            schedule="step", drop_epochs=config.optimizer.drop_epochs, drop_factor=0.8
        )


def _weighted(config: ConfigDict, loss: str, hard: float, soft: float, warmup: int = 0) -> None:
    config.loss.name = loss
    config.ratio.name = "weighted"
    config.ratio.weighted.update(hard=hard, soft=soft, warmup_epochs=warmup)


def _dkd(config: ConfigDict, pair: str, imagenet: bool) -> None:
    _weighted(config, "dkd", 1.0, 1.0, 1 if imagenet else 20)
    beta = _IMAGENET_DKD_BETA if imagenet else _DKD_BETA.get(pair, 8.0)
    config.loss.dkd.update(temperature=1.0 if imagenet else 4.0, beta=beta)


def _dist(config: ConfigDict, pair: str, imagenet: bool) -> None:
    _weighted(config, "dist", 1.0, 2.0)
    config.loss.dist.temperature = 1.0 if imagenet else 4.0


def _logit_std(config: ConfigDict, pair: str, imagenet: bool) -> None:
    _weighted(config, "logit_std", 0.1, 9.0)


def _cmkd(config: ConfigDict, pair: str, imagenet: bool) -> None:
    _weighted(config, "cmkd", 1.0, 2.0)
    config.loss.cmkd.temperature = 1.0 if imagenet else 4.0


def _online(name: str) -> Callable[[ConfigDict, str, bool], None]:
    def choose(config: ConfigDict, pair: str, imagenet: bool) -> None:
        config.role.name = name
        config.teacher.workdir = ""
        config.loss.kl.temperature = 1.0
        config.ratio.name = "weighted"

    return choose


METHODS: dict[str, Callable[[ConfigDict, str, bool], None]] = {
    "plain": _plain,
    "kd": _kd,
    "annealed": _ratio("annealed"),
    "ada": _ratio("ada"),
    "wls": _wls,
    "rw": _ratio("rw"),
    "bikd": _bikd,
    "tgeo": _ratio("tgeo"),
    "dkd": _dkd,
    "dist": _dist,
    "logit_std": _logit_std,
    "cmkd": _cmkd,
    "dml": _online("dml"),
    "trikd": _online("trikd"),
}
