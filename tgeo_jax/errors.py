"""What the package raises when its user has to change something."""

from __future__ import annotations

import difflib
from typing import Any


class TgeoError(Exception):
    """A problem whose message says what to do about it; commands print it without a traceback."""


class ConfigError(TgeoError, ValueError):
    """A configuration that cannot run; the message names field, value and fix."""


class DataError(TgeoError):
    """Data that is missing or cannot be used."""


class CheckpointError(TgeoError):
    """A checkpoint that is missing or does not fit."""


class TrainingError(TgeoError):
    """A run that had to stop; what it had trained is saved."""


class Interrupted(TgeoError):
    """A run that was told to stop; what it had trained is saved.

    Attributes:
        signal: which told it.
    """

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.signal = signal


def nearest(name: str, known: Any) -> str:
    """End of a message about an unknown name: `; did you mean 'x'?`, or all known ones.

    Examples:
        >>> nearest("tmperature", ["temperature", "alpha"])
        "; did you mean 'temperature'?"
        >>> nearest("zzz", ["temperature", "alpha"])
        '; known: temperature, alpha'
    """
    near = difflib.get_close_matches(str(name), list(known), n=1)  # a key may be a number
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
