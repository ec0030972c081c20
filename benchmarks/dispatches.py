"""Parts 3 and 4: steps in a dispatch, batch, precision; several seeds in one program."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from benchmarks import measure
from benchmarks.subjects import SUBJECTS, Training, method, steps_of, wants_no_loops
from benchmarks.table import Row, compared

DISPATCH, SEEDS = "dispatch", "seeds"


def dispatch_rows(
    names: tuple[str, ...], batches: tuple[int, ...], rounds: int, peak: measure.Peak
) -> Iterator[Row]:
    """Steps in a dispatch, batch size and precision, each beside the product's default.

    Args:
        names: of `SUBJECTS`.
        batches: sizes; the first is what the others are compared with.
        rounds: of timing.
        peak: of this machine.
    """
    for name in names:
        yield from _steps_in_a_dispatch(name, batches[0], rounds)
        yield from _batches(name, batches, rounds, peak)
        yield from _precisions(name, batches[0], rounds, peak)


def _steps_in_a_dispatch(name: str, batch: int, rounds: int) -> Iterator[Row]:
    if wants_no_loops(SUBJECTS[name]):
        return  # one step a dispatch, whatever is asked for
    cases = {
        count: Training(
            name, method(SUBJECTS[name]), batch, steps=max(count, 100), per_dispatch=count
        )
        for count in (1, 10, 100, 1000)
    }
    calls = {str(count): max(count, 100) for count in cases}
    times = measure.side_by_side({str(c): t for c, t in cases.items()}, rounds, calls)
    # What a step takes when the host has nothing to do: the slope between 100 and 1,000 steps.
    own = measure.Times((1000 * times["1000"].seconds - 100 * times["100"].seconds) / 900)
    for count in cases:
        yield compared(
            DISPATCH,
            f"{name}, batch {batch}: {count} steps a dispatch",
            "a step within a dispatch",
            (times[str(count)], own),
            expected="<= 1.01" if count == 100 else "",
        )


def _batches(name: str, batches: tuple[int, ...], rounds: int, peak: measure.Peak) -> Iterator[Row]:
    subject = SUBJECTS[name]
    steps = 1 if wants_no_loops(subject) else 20
    cases = {str(b): Training(name, method(subject), b, steps=steps) for b in batches}
    times = measure.side_by_side(cases, rounds, {str(b): steps * b for b in batches})
    for b in batches:
        case = f"{name}: time of a sample in a batch of {b} (ms: of the whole step)"
        own = measure.Times(times[str(b)].seconds * b)  # of the whole step, for shares of the peak
        row = compared(DISPATCH, case, "itself", (own, own), costs=cases[str(b)].costs(), peak=peak)
        ratio = times[str(b)].over(times[str(batches[0])])
        yield Row(
            **{
                **vars(row),
                **dict(zip(("ratio", "low", "high"), ratio, strict=True)),
                "against": f"one of {batches[0]}",
            }
        )


def _precisions(name: str, batch: int, rounds: int, peak: measure.Peak) -> Iterator[Row]:
    subject = SUBJECTS[name]
    steps = steps_of(subject)
    cases = {
        precision: Training(name, method(subject, precision=precision), batch, steps=steps)
        for precision in ("float32", "bfloat16")
    }
    times = measure.side_by_side(cases, rounds, dict.fromkeys(cases, steps))
    yield compared(
        DISPATCH,
        f"{name}, batch {batch}: bfloat16",
        "float32",
        (times["bfloat16"], times["float32"]),
        costs=cases["bfloat16"].costs(),
        base_costs=cases["float32"].costs(),
        peak=peak,
        bfloat16=True,
    )


def seed_rows(
    names: tuple[str, ...], counts: tuple[int, ...], batch: int, rounds: int
) -> Iterator[Row]:
    """Several seeds in one program beside as many runs of one.

    Args:
        names: of `SUBJECTS`.
        counts: of seeds, the first 1.
        batch: B.
        rounds: of timing.
    """
    for name in names:
        subject = SUBJECTS[name]
        steps = 1 if wants_no_loops(subject) else 100
        trainings = {
            count: Training(name, method(subject), batch, steps=steps, seeds=count)
            for count in counts
        }
        cases: dict[str, Callable[[], Any]] = {str(c): t for c, t in trainings.items()}
        times = measure.side_by_side(cases, rounds, dict.fromkeys(cases, steps))
        for count in counts[1:]:
            alone = measure.Times(times[str(counts[0])].seconds * count)
            yield compared(
                SEEDS,
                f"{name}: {count} seeds in one program",
                f"{count} runs of one",
                (times[str(count)], alone),
            )
