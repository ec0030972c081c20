"""SIGTERM and Ctrl-C: a run saves what it has trained and ends; its next start goes on from there.

With several processes, one that is told to stop is enough: JAX's coordination service lets all of
them stop before the same dispatch.
"""

from __future__ import annotations

import itertools
import os
import signal
import threading
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

# JAX's service lives as long as the process, and wants numbers that grow by one.
_CHECKS = itertools.count(1)


class Interruption:
    """Whether somebody wants this run to end early.

    Signals are caught until `close`; only Python's main thread can do that.
    """

    def __init__(self) -> None:
        self._asked: int | None = None
        self._before: dict[int, Any] = {}
        # With several processes, JAX's own service has SIGTERM.
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)

    @property
    def signal(self) -> int:
        """What asked for it; SIGTERM where another process was asked."""
        return self._asked or signal.SIGTERM

    def reached(self) -> bool:
        """Whether to save and stop now; to be asked before every dispatch, by all processes."""
        if jax.process_count() == 1:
            return self._asked is not None
        return multihost_utils.reached_preemption_sync_point(next(_CHECKS))

    def close(self) -> None:
        """Gives the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _ask(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self._asked is not None and number == signal.SIGINT:  # twice: at once
            raise KeyboardInterrupt
        self._asked = number
        os.write(2, b"\nstopping: what is trained will be saved (Ctrl-C again: at once)\n")
