"""Part 5: the share of a step that goes into input, beside a step on one constant batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measure
from benchmarks.subjects import SUBJECTS, Training, method, wants_no_loops
from benchmarks.table import Row, compared
from tgeo_jax.data import sources, streaming, views
from tgeo_jax.dispatch import Dispatcher, Resident
from tgeo_jax.errors import DataError
from tgeo_jax.randomness import Purpose
from tgeo_jax.state import Batch, TrainState

PART = "input"
_PREPARED = {"cnn": "digits", "resnet20": "cifar100"}  # which real images a subject sees streamed


class _Constant(Dispatcher):
    """Every step gets the same batch, which lies on the device as it is used."""

    def _order(
        self, state: TrainState, split: Batch, num_steps: int, batch_size: int, purpose: Purpose
    ) -> Any:
        zeros = jnp.zeros((num_steps, *state.seed.shape, batch_size), jnp.int32)
        return zeros + jnp.minimum(state.step, 0)  # zeros, unknown to the compiler

    def _batch(self, split: Batch, indices_SxB: Any) -> Batch:
        count = indices_SxB.shape[-1]
        # Never true, but the compiler cannot know: it would compute what depends on the batch
        # alone, such as the teacher's answer, once for all steps.
        other = indices_SxB[0, 0] < 0
        own = jax.tree.map(lambda values: values[None, :count], split)
        return jax.tree.map(lambda values: values + other.astype(values.dtype), own)


def rows(names: tuple[str, ...], batch: int, rounds: int) -> Iterator[Row]:
    """Resident and streamed input, for each subject.

    Args:
        names: of `SUBJECTS`.
        batch: B.
        rounds: of timing.
    """
    for name in names:
        subject = SUBJECTS[name]
        steps = 1 if wants_no_loops(subject) else 100
        clean = method(subject).clean_view
        augmented = views.augment(clean, crop_padding=4 if subject.shape[0] > 8 else 1, flip=True)
        cases: dict[str, Any] = {
            "constant": Training(name, method(subject), batch, steps=steps, dispatcher=_Constant),
            "chosen by index": Training(name, method(subject), batch, steps=steps),
            "and cropped and flipped": Training(
                name, method(subject, augmented=augmented), batch, steps=steps
            ),
        }
        streamed = _streamed(name, batch, steps)
        if streamed is not None:
            cases["streamed by threads"] = streamed
        times = measure.side_by_side(cases, rounds, dict.fromkeys(cases, steps))
        for case in list(cases)[1:]:
            yield compared(
                PART,
                f"{name}, batch {batch}: {case}",
                "a constant batch",
                (times[case], times["constant"]),
                expected="<= 1.03" if case != "streamed by threads" else "",
            )


class _Streamed:
    """Steps on batches that threads read and decode; the held-out ones as well."""

    def __init__(self, training: Training, train: Iterator, held_out: Iterator):
        self._training, self._streams = training, (train, held_out)

    def __call__(self) -> Any:
        training = self._training
        parts = [self._read(stream, training.steps) for stream in self._streams]
        training.data = Resident(*parts)
        return training()

    def _read(self, stream: Iterator, count: int) -> Batch:
        images, labels = zip(*(next(stream) for _ in range(count)), strict=True)
        return Batch(*map(jax.device_put, (np.stack(images), np.stack(labels))))


class _OfStream(Dispatcher):
    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, streamed=True, **options)


def _streamed(name: str, batch: int, steps: int) -> _Streamed | None:
    """None where the real images are not prepared on this machine."""
    dataset = _PREPARED.get(name)
    if dataset is None:
        return None
    whole = sources.builder(dataset)
    try:
        sources.check_prepared(whole, dataset, "")
    except DataError:
        return None
    side, _, channels = SUBJECTS[name].shape
    positions = np.arange(whole.info.splits["train"].num_examples)
    records = streaming.Records(dataset, "", "train", positions)
    stream = streaming.Stream(records, side, channels, 0)
    opened = [stream.batches(seed, 0, batch, crop=not seed) for seed in (0, 1)]
    training = Training(name, method(SUBJECTS[name]), batch, steps=steps, dispatcher=_OfStream)
    return _Streamed(training, *opened)
