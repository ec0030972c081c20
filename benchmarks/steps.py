"""Part 1: what learning the ratio costs, beside a plain distillation step in the same run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax

from benchmarks import measure
from benchmarks.subjects import SUBJECTS, Subject, Training, method, steps_of, wants_no_loops
from benchmarks.table import Row, compared
from tgeo_jax import distill

PART = "step"
# name -> (fields of the method, share of the batch that is held out, forward passes in theory)
_VARIANTS: dict[str, tuple[dict[str, Any], int, float]] = {
    "student_first": ({}, 1, 8),
    "fusion_first": ({"order": "fusion_first"}, 1, 10),
    "prequential": ({"order": "prequential"}, 1, 7),
    "every 4th step": ({"meta_every": 4}, 1, 4.25),
    "held-out batch B/4": ({}, 4, 5.75),
    "reverse": ({"estimator": "reverse"}, 1, 8),
    "finite_difference": ({"estimator": "finite_difference"}, 1, 9),
}


def rows(names: tuple[str, ...], batch: int, rounds: int, peak: measure.Peak) -> Iterator[Row]:
    """The table's rows for some subjects.

    Args:
        names: of `SUBJECTS`.
        batch: B.
        rounds: of timing.
        peak: of this machine.
    """
    for name in names:
        for cached in (True, False):
            yield from _of_subject(name, cached, batch, rounds, peak)


def _of_subject(
    name: str, cached: bool, batch: int, rounds: int, peak: measure.Peak
) -> Iterator[Row]:
    subject = SUBJECTS[name]
    steps = steps_of(subject)
    plain = Training(name, method(subject, learned=False, cached=cached), batch, steps=steps)
    trainings = {"plain": plain}
    # A large teacher hides what distinguishes the variants, and takes minutes on a CPU.
    variants = list(_VARIANTS) if cached or not wants_no_loops(subject) else ["student_first"]
    for variant in variants:
        changes, part, _ = _VARIANTS[variant]
        chosen = method(subject, cached=cached, **changes)
        held_out = max(1, batch // part)
        trainings[variant] = Training(name, chosen, batch, meta_batch_size=held_out, steps=steps)
    calls = dict.fromkeys(trainings, steps)
    times = measure.side_by_side(trainings, rounds, calls)
    base = plain.costs()
    where = "cached" if cached else f"in the step, T = {_teacher_forwards(name, batch):.3g} F"
    yield compared(
        PART,
        f"{name}, teacher {where}: plain",
        "itself",
        (times["plain"], times["plain"]),
        costs=base,
        peak=peak,
    )
    for variant in variants:
        forwards = _VARIANTS[variant][2]
        own = _costs(trainings[variant], variant, base)
        expected = ""
        if cached:
            expected = f"{forwards:g}F / 3F = {forwards / 3:.3f} FLOPs"
        yield compared(
            PART,
            f"{name}, teacher {'cached' if cached else 'in the step'}: {variant}",
            "plain",
            (times[variant], times["plain"]),
            costs=own,
            base_costs=base,
            peak=peak,
            expected=expected,
        )


def _costs(training: Training, variant: str, plain: measure.Costs) -> measure.Costs:
    own = training.costs()
    if variant == "every 4th step":
        between = training.costs(first_step=1)
        mean = [(a + 3 * b) / 4 for a, b in zip(own, between, strict=True)]
        return measure.Costs(mean[0], mean[1], max(own.temporary, between.temporary))
    if variant == "prequential" and training.per_dispatch > 1:
        # Of the step alone: the first forward pass is the dispatch's.
        return own._replace(flops=_prequential_flops(training))
    return own


def _prequential_flops(training: Training) -> float:
    chosen = training.dispatcher.method
    one = jax.tree.map(lambda leaf: leaf[0] if leaf.ndim else leaf, training.state)
    batch = jax.tree.map(lambda leaf: leaf[: training.dispatcher.batch_size], training.data.train)
    given = training.teacher
    start = jax.jit(lambda t, s, b: distill.prequential_start(chosen, t, s, b))
    current = jax.eval_shape(start, given, one, batch)
    step = jax.jit(lambda t, s, f, b: distill.prequential_step(chosen, t, s, f, b))
    return measure.costs(step.lower(given, one, current, batch).compile()).flops


def _teacher_forwards(name: str, batch: int) -> float:
    """A teacher's forward pass in units of its student's, by compiled FLOPs."""
    subject = SUBJECTS[name]
    modules = subject.teacher_module(), subject.student_module()
    teacher_flops, student_flops = (_forward_flops(m, subject, batch) for m in modules)
    return teacher_flops / student_flops


def _forward_flops(module: Any, subject: Subject, batch: int) -> float:
    images = jax.ShapeDtypeStruct((batch, *subject.shape), "float32")
    variables = jax.eval_shape(module.init, jax.random.key(0), images)
    apply = jax.jit(lambda v, x: module.apply(v, x, train=False))
    return measure.costs(apply.lower(variables, images).compile()).flops
