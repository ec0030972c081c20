"""A trace of a few dispatches, as xprof and Perfetto open it."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator

import jax

from tgeo_jax import storage
from tgeo_jax.errors import ConfigError

_DISPATCHES = 10


class Trace:
    """Traces some of a run's dispatches, compilation excluded.

    Those are the last ten (or fewer) before the first evaluation, so that what only happens at the
    start is not among them where there are more.

    Args:
        folder: where the trace goes, as `plugins/profile/TIME/HOST.xplane.pb`; empty for no trace.

    Raises:
        ConfigError: a folder that cannot be made.
    """

    def __init__(self, folder: str):
        self._folder = pathlib.Path(folder) if folder else None
        self._running = False
        if self._folder is None:
            return
        storage.check_folder(folder, "profile")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"profile={folder!r}: cannot be made: {error}") from error

    @contextlib.contextmanager
    def dispatch(self, step: int, left: int) -> Iterator[None]:
        """Around one dispatch.

        Args:
            step: its first.
            left: dispatches before the evaluation, this one included.
        """
        if self._folder is None:
            yield
            return
        if not self._running and left <= _DISPATCHES:
            jax.profiler.start_trace(self._folder)
            self._running = True
        with jax.profiler.StepTraceAnnotation("dispatch", step_num=step):
            yield

    def stop(self) -> pathlib.Path | None:
        """Writes the trace, if one is under way; the last dispatch must have been waited for."""
        if not self._running:
            return None
        written, self._folder, self._running = self._folder, None, False
        jax.profiler.stop_trace()
        return written
