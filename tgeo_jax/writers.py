"""Where logged numbers go: JSON lines, TensorBoard, a progress bar; process 0 alone writes."""

from __future__ import annotations

import json
import pathlib
import shutil
import sys
import tempfile
from typing import Any

import jax
from tqdm import tqdm

from tgeo_jax import storage
from tgeo_jax.errors import DataError


class Writers:
    """The writers of one run.

    A record is one seed at one step: `{"step": ..., "seed": ..., "train/hard_loss": ..., ...}`.

    Args:
        workdir: metrics.jsonl and tensorboard/ are made there.
        step: records after this step are from an interrupted attempt and are removed; what is
            repeated from here on is written again.
        total_steps: length of the progress bar.
        title: its label.
        progress: whether to show it.
    """

    def __init__(
        self, workdir: storage.Path, *, step: int, total_steps: int, title: str, progress: bool
    ):
        self._active = jax.process_index() == 0
        if not self._active:
            return
        path = workdir / "metrics.jsonl"
        kept = "".join(_line(r) for r in read_records(path) if r["step"] <= step)
        storage.write_atomically(path, kept)
        self._lines = storage.Appended(path, kept)
        self._tensorboard: dict[int, Any] = {}
        self._events = _Events(workdir / "tensorboard")
        self._first_step = step
        self._bar = tqdm(
            total=total_steps, initial=step, desc=title, unit="step", disable=not progress,
            mininterval=0.5, dynamic_ncols=True,
        )  # fmt: skip

    def write(self, records: list[dict[str, Any]]) -> None:
        """Appends records and waits until they are on disk."""
        if not self._active:
            return
        self._lines.append("".join(map(_line, records)))
        for record in records:
            writer = self._of_seed(record["seed"])
            for name, value in record.items():
                if name not in ("step", "seed") and not isinstance(value, list):
                    writer.add_scalar(name, value, record["step"])
        for writer in self._tensorboard.values():
            writer.flush()
        self._events.publish()

    def progress(self, step: int, **shown: str) -> None:
        """Moves the progress bar to a step."""
        if self._active:
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update(step - self._bar.n)

    def say(self, text: str) -> None:
        """Prints a line where the progress bar is, if it is shown."""
        if self._active and not self._bar.disable:
            self._bar.write(text, file=sys.stderr)

    def close(self) -> None:
        """Closes files and bar."""
        if self._active:
            self._lines.close()
            for writer in self._tensorboard.values():
                writer.close()
            self._events.close()
            self._bar.close()

    def _of_seed(self, seed: int) -> Any:
        # Not before the first step, which need not wait the seconds that this takes.
        from tensorboardX import SummaryWriter

        if seed not in self._tensorboard:
            self._tensorboard[seed] = SummaryWriter(
                str(self._events.directory / f"seed_{seed}"), purge_step=self._first_step + 1
            )
        return self._tensorboard[seed]


class _Events:
    """TensorBoard's folder; that of a bucket is filled from a local one, since events append."""

    def __init__(self, target: storage.Path):
        self._target = target
        self._temporary = tempfile.mkdtemp(prefix="events_") if storage.is_bucket(target) else None
        self.directory = target if self._temporary is None else pathlib.Path(self._temporary)

    def publish(self) -> None:
        """Shows what has been written so far."""
        if self._temporary is not None:
            for path in self.directory.rglob("events.*"):
                target = self._target / path.relative_to(self.directory).as_posix()
                storage.write_atomically(target, path.read_bytes())

    def close(self) -> None:
        """After the writers."""
        if self._temporary is not None:
            self.publish()
            shutil.rmtree(self._temporary)


def read_records(path: storage.Path) -> list[dict[str, Any]]:
    """Records of a metrics.jsonl; none if it is missing, a torn last line is left out.

    Raises:
        DataError: another line is damaged: what it said is in no other place.

    Examples:
        >>> read_records(pathlib.Path("/nonexistent"))
        []
    """
    if not storage.exists(path):
        return []
    records = []
    lines = storage.read_bytes(path).splitlines()
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if not (isinstance(record["step"], int) and isinstance(record["seed"], int)):
                raise ValueError("neither step nor seed")
        except (LookupError, RecursionError, TypeError, ValueError) as error:
            if number == len(lines):  # of a run that was killed while it wrote
                break
            raise DataError(
                f"{path}, line {number}: damaged; restore the file from a copy, or train the run "
                "again in a new workdir"
            ) from error
        records.append(record)
    return records


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record) + "\n"
