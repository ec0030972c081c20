"""What any value of a configuration must be: of its field's kind, and of a size that a run can use.

Whatever a field means, a number is computed with in 32 bits and a text goes to the file system:
what does not fit there would otherwise show as an error from inside JAX or the system, without the
field's name.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from tgeo_jax.errors import ConfigError

_KINDS = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "text",
    tuple: "a tuple",
    type(None): "a number, or None",
}
_TEXTS = ("role.several.workdirs",)  # the other tuples hold numbers
# Seeds have 32 bits without a sign, and rules of their own.
_SEEDS = ("seed", "data.split_seed", "role.cached.augmentation_seed")
_LONGEST = 1000  # values of a tuple: more layers than that are not compiled in a day
_FLOAT32 = (2.0**-126, (2 - 2.0**-23) * 2.0**127)  # smallest normal number, largest


def check(path: str, value: Any, example: Any) -> None:
    """Checks kind and size of one value.

    Args:
        path: of the field, for the message.
        value: what it was given.
        example: its default, whose kind it must have.

    Raises:
        ConfigError: another kind, or a number or text that a run cannot use.

    Examples:
        >>> check("train.epochs", 2**40, 240)
        Traceback (most recent call last):
        ...
        tgeo_jax.errors.ConfigError: train.epochs=1099511627776: must be an integer below 2**31 in \
size
    """
    if not _same_kind(value, example):
        raise ConfigError(f"{path}={shown(value)}: must be {_KINDS[type(example)]}")
    if isinstance(value, tuple | list):
        _check_tuple(path, value)
        return
    wanted = _wanted(path, value)
    if wanted:
        raise ConfigError(f"{path}={shown(value)}: must {wanted}")


def check_finite(config: dict[str, Any], prefix: str = "") -> None:
    """Checks that no number is infinite or NaN, of whatever has no rule of its own.

    Raises:
        ConfigError: one is.

    Examples:
        >>> check_finite({"loss": {"weight": float("nan")}})
        Traceback (most recent call last):
        ...
        tgeo_jax.errors.ConfigError: loss.weight=nan: must be finite
    """
    for name, value in config.items():
        if isinstance(value, dict):
            check_finite(value, f"{prefix}{name}.")
            continue
        for each in value if isinstance(value, tuple | list) else (value,):
            if isinstance(each, float) and not math.isfinite(each):
                raise ConfigError(f"{prefix}{name}={shown(value)}: must be finite")


def shown(value: Any) -> str:
    """A value for a message, of any length.

    Examples:
        >>> shown("x" * 300)[-8:]
        "xxxx...'"
    """
    if isinstance(value, str) and len(value) > 200:
        value = f"{value[:200]}..."
    if isinstance(value, list):
        value = tuple(value)
    try:
        text = repr(value)
    except ValueError:  # Python does not write integers of thousands of digits
        text = f"an integer of {value.bit_length()} bits" if isinstance(value, int) else "..."
    return text if len(text) <= 1000 else f"{text[:1000]}..."


def _check_tuple(path: str, values: Sequence[Any]) -> None:
    kind, what = (str, "texts") if path in _TEXTS else (int | float, "numbers")
    if len(values) > _LONGEST:
        raise ConfigError(f"{path}: holds {len(values)} {what}: must hold at most {_LONGEST}")
    if not all(isinstance(v, kind) and not isinstance(v, bool) for v in values):
        raise ConfigError(f"{path}={shown(values)}: must be a tuple of {what}")
    for value in values:
        wanted = _wanted(path, value)
        if wanted:
            raise ConfigError(f"{path}={shown(values)}: each must {wanted}")


def _wanted(path: str, value: Any) -> str:
    """What a single value must be, where it is not; else nothing."""
    if isinstance(value, str):
        return "" if _is_usable(value) else "be text in Unicode, without the character NUL"
    if isinstance(value, float) and math.isfinite(value) and value:
        smallest, largest = _FLOAT32
        if not smallest <= abs(value) <= largest:
            return "be 0 or have a size from 1.2e-38 to 3.4e38, for float32 holds no other"
    limit = 64 if path in _SEEDS else 31
    if isinstance(value, int) and abs(value) >= 2**limit:
        return f"be an integer below 2**{limit} in size"
    return ""


def _is_usable(text: str) -> bool:
    try:
        return b"\0" not in text.encode()
    except UnicodeEncodeError:  # half of a character, as of an argument in another encoding
        return False


def _same_kind(value: Any, example: Any) -> bool:
    if isinstance(example, bool) or isinstance(value, bool):
        return isinstance(value, bool) and isinstance(example, bool)
    if example is None:  # "chosen for you", or a number
        return value is None or isinstance(value, int | float)
    if isinstance(example, float):
        return isinstance(value, int | float)
    if isinstance(example, tuple):
        return isinstance(value, tuple | list)
    return isinstance(value, type(example))
