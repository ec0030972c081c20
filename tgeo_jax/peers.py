"""Notices when another process of the run is gone, and ends this one with the reason.

A collective waits for everybody: without this, a run whose process 2 was killed hangs, or dies with
a message of the network library. Every process tells the coordination service of JAX now and then
that it lives; one that has been silent for `timeout` seconds, or said why it stopped, is named.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import itertools
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any, NoReturn

import jax
from jax._src import distributed  # the service's client has no public name; Orbax takes it so too

from tgeo_jax.errors import Interrupted, TgeoError

# EX_TEMPFAIL, "try again": what a preempted process and the peers of a dead one exit with.
RESTART = 75
_MEETINGS = itertools.count()  # of one process as many as of another
_KEPT: list[Any] = []  # what C calls must not be collected
_ALIVE, _STOPPED = "tgeo_jax/alive/", "tgeo_jax/stopped/"


@contextlib.contextmanager
def watched(timeout: float) -> Iterator[None]:
    """Trains with other processes: if one is gone or stops, this one ends with the reason.

    Without others, errors go their usual way.

    Args:
        timeout: seconds of silence after which a process counts as dead.
    """
    if jax.process_count() == 1:
        yield
        return
    watch = Watch(timeout)
    _explain_aborts()
    try:
        yield
    except Interrupted:  # all processes stop at this step
        raise
    except TgeoError as error:
        if isinstance(error.__cause__, jax.errors.JaxRuntimeError):  # a peer's end, perhaps
            watch.wait_for_verdict()
        print(f"error: process {jax.process_index()}: {error}", file=sys.stderr)
        watch.stop(str(error), 2)
    except BaseException as error:
        traceback.print_exc()
        if isinstance(error, Exception):  # of a collective, perhaps, whose other end is gone
            watch.wait_for_verdict()
        watch.stop(f"{type(error).__name__}: {error}", 1)
    finally:
        watch.close()


def meet(name: str, seconds: float = 600) -> None:
    """Waits for all processes at the coordination service, which needs no device.

    Args:
        name: of the place.
        seconds: after which it is an error not to have met.
    """
    if jax.process_count() > 1:
        place = f"tgeo_jax/{name}/{next(_MEETINGS)}"
        client: Any = distributed.global_state.client
        client.wait_at_barrier(place, int(1000 * seconds))


class Watch:
    """Watches the other processes until closed.

    Args:
        timeout: seconds of silence after which a process counts as dead.
    """

    def __init__(self, timeout: float = 60):
        self._client: Any = distributed.global_state.client
        self._timeout, self._closed = timeout, threading.Event()
        self._period = min(5.0, timeout / 8)
        now = time.monotonic()
        self._told: dict[int, str] = {}
        self._heard = dict.fromkeys(range(jax.process_count()), now)
        self._stopped: dict[int, str] = {}
        self._names: dict[int, str] = {}
        for work in (self._talk, self._judge):
            threading.Thread(target=work, daemon=True, name=f"peers{work.__name__}").start()

    def stop(self, reason: str, code: int) -> NoReturn:
        """Ends this process, and tells the others why; they end too."""
        self.close()
        try:
            said = f"{socket.gethostname()}\n{reason}"
            self._client.key_value_set(f"{_STOPPED}{jax.process_index()}", said, True)
            if jax.process_index() == 0:  # the service lives here: until everybody has read it
                time.sleep(3 * self._period)
        except Exception as error:  # the service is gone; the others will see that by themselves
            print(f"could not tell the other processes: {error}", file=sys.stderr)
        _leave(code)

    def wait_for_verdict(self) -> None:
        """After an error that a dead peer may have caused: this process ends here if one did."""
        time.sleep(self._timeout + 3 * self._period)

    def close(self) -> None:
        """Ends the watch."""
        self._closed.set()

    def _talk(self) -> None:
        """Says that this process lives, hears who else does. A call may hang with its server."""
        beat, own = 0, jax.process_index()
        while not self._closed.wait(self._period if beat else 0):
            beat += 1
            try:
                said = f"{socket.gethostname()}\n{beat}"
                self._client.key_value_set(f"{_ALIVE}{own}", said, True)
                alive = self._client.key_value_dir_get(_ALIVE)
                stopped = self._client.key_value_dir_get(_STOPPED)
            except Exception:  # process 0, where the service is, stays unheard
                continue
            self._hear(alive, stopped)

    def _hear(self, alive: list[tuple[str, str]], stopped: list[tuple[str, str]]) -> None:
        now = time.monotonic()
        for key, said in alive:
            process = int(key.rpartition("/")[2])
            self._names[process] = said.partition("\n")[0]
            if self._told.get(process) != said:
                self._told[process], self._heard[process] = said, now
        self._stopped |= {int(key.rpartition("/")[2]): said for key, said in stopped}

    def _judge(self) -> None:
        while not self._closed.wait(self._period / 2):
            for process, said in self._stopped.items():
                host, _, reason = said.partition("\n")
                self._end(f"process {process} ({host}) stopped: {reason}", 1)
            now = time.monotonic()
            silent = [p for p, heard in self._heard.items() if now - heard > self._timeout]
            if 0 in silent:  # nobody can be heard without it
                silent = [0]
            if silent:
                names = " and ".join(f"{p} ({self._names.get(p, 'unknown host')})" for p in silent)
                self._end(
                    f"process {names} of {jax.process_count()} has been silent for "
                    f"{self._timeout:g} s: it died, or its network did. This process stops; "
                    "start all of them again, and the run goes on from its newest checkpoint",
                    RESTART,
                )

    def _end(self, message: str, code: int) -> None:
        if not self._closed.is_set():
            print(f"error: process {jax.process_index()}: {message}", file=sys.stderr, flush=True)
            _leave(code)


def _explain_aborts() -> None:
    """Says that process 0 is gone where JAX, which notices at once, would only abort this process.

    Its client aborts in a thread of its own, at a place where no lock is held, so that Python can
    still speak there.
    """

    def last_words(number: int) -> None:
        if jax.process_index() == 0 or _reachable(distributed.global_state.coordinator_address):
            faulthandler.dump_traceback(all_threads=True)  # an abort of another kind
            libc.signal(number, None)
            return
        print(
            f"error: process {jax.process_index()}: process 0 of {jax.process_count()} is gone, "
            "and with it what connects the others. This process stops; start all of them again, "
            "and the run goes on from its newest checkpoint",
            file=sys.stderr,
            flush=True,
        )
        os._exit(RESTART)

    libc = ctypes.CDLL(None)
    libc.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(last_words)
    _KEPT.append(handler)
    libc.signal(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p))


def _reachable(address: str | None) -> bool:
    host, _, port = (address or "").rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except (OSError, ValueError):
        return False
    return True


def _leave(code: int) -> NoReturn:
    """At once: an orderly exit would wait for the others in JAX's own shutdown."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
