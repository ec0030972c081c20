"""Whether the CPU devices of this process stand for accelerators that are elsewhere.

Programs are then to be looked at and not to be run: they are an accelerator's, and what this
machine has of memory says nothing of them. See `dry_run`.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

_ACCELERATORS = contextvars.ContextVar("_ACCELERATORS", default=False)


@contextlib.contextmanager
def accelerators() -> Iterator[None]:
    """Inside, they do.

    Examples:
        >>> with accelerators():
        ...     print(are_accelerators())
        True
        >>> are_accelerators()
        False
    """
    before = _ACCELERATORS.set(True)
    try:
        yield
    finally:
        _ACCELERATORS.reset(before)


def are_accelerators() -> bool:
    """Whether they do now."""
    return _ACCELERATORS.get()
