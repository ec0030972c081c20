"""Part 2: ours beside PyTorch, with the same networks, batch and device, in the same run."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from benchmarks import measure
from benchmarks.subjects import SUBJECTS, Subject, Training, data, method, wants_no_loops
from benchmarks.table import Row, compared

PART = "peers"
# kind -> whether it learns the ratio, what it is called
_KINDS = {
    "plain": (False, "plain step"),
    "create_graph": (True, "bilevel step, autograd.grad(create_graph=True)"),
    "create_graph, fusion only": (True, "the same, backward to the fusion network alone"),
    "higher": (True, "bilevel step, higher"),
}


def rows(names: tuple[str, ...], batch: int, rounds: int, peak: measure.Peak) -> Iterator[Row]:
    """PyTorch's time in units of ours, for each subject and kind of step.

    Args:
        names: of `SUBJECTS`.
        batch: B.
        rounds: of timing.
        peak: of this machine.

    Raises:
        ConfigError: PyTorch or `higher` is missing.
    """
    for name in names:
        subject = SUBJECTS[name]
        steps = 1 if wants_no_loops(subject) else 100
        ours = {
            learned: Training(name, method(subject, learned=learned), batch, steps=steps)
            for learned in (False, True)
        }
        cases: dict[str, Callable[[], Any]] = {"ours, plain": ours[False], "ours": ours[True]}
        peers = [(kind, form) for kind in _KINDS for form in _formats(subject, kind)]
        for kind, form in peers:
            cases[kind + form] = _peer(name, kind, batch, channels_last=bool(form))
        calls = {"ours, plain": steps, "ours": steps, **{k + f: _steps() for k, f in peers}}
        times = measure.side_by_side(cases, rounds, calls)
        costs = {learned: training.costs() for learned, training in ours.items()}
        yield _absolute(name, "plain", times["ours, plain"], costs[False], peak)
        yield _absolute(name, "bilevel", times["ours"], costs[True], peak)
        for kind, form in peers:
            learned, title = _KINDS[kind]
            yield compared(
                PART,
                f"{name}: PyTorch{form}, {title}",
                "our bilevel step" if learned else "our plain step",
                (times[kind + form], times["ours" if learned else "ours, plain"]),
                expected=_target(subject, kind),
            )


def _formats(subject: Subject, kind: str) -> tuple[str, ...]:
    if subject.shape[0] <= 8:
        return ("",)
    # `higher` adds its copies to what create_graph takes, in either format.
    return (", channels_last",) if kind == "higher" else ("", ", channels_last")


def _steps() -> int:
    """PyTorch's steps in one call: a GPU is waited for once in many, as ours is."""
    return 1 if jax.default_backend() == "cpu" else 20


def _absolute(
    name: str, kind: str, time: measure.Times, costs: measure.Costs, peak: measure.Peak
) -> Row:
    return compared(
        PART, f"{name}: our {kind} step", "itself", (time, time), costs=costs, peak=peak
    )


def _target(subject: Subject, kind: str) -> str:
    if subject.student[0] == "mlp":
        return ">= 2"
    if subject.shape[0] > 8 and kind.startswith("create_graph"):
        return ">= 1"
    return ""


def _peer(name: str, kind: str, batch: int, *, channels_last: bool) -> Callable[[], Any]:
    from benchmarks import torch_nets, torch_steps

    subject, split = SUBJECTS[name], data(name)
    images, labels = np.asarray(split.images_BxHxWxC) / np.float32(255), np.asarray(split.labels_B)
    means = np.full((subject.num_classes,) * 2, 1 / subject.num_classes, np.float32)
    batches = torch_steps.Batches(
        images[:batch], labels[:batch], images[-batch:], labels[-batch:], means
    )
    student, teacher = (
        torch_nets.build(net, subject.num_classes, **_options(subject, net, options))
        for net, options in (subject.student, subject.teacher)
    )
    device = "cpu" if jax.default_backend() == "cpu" else "cuda"
    setting = torch_steps.Setting(
        learning_rate=1e-3,
        only_fusion="fusion only" in kind,
        channels_last=channels_last,
        device=device,
    )
    step = torch_steps.STEPS[kind.partition(",")[0]](student, teacher, batches, setting).step
    return step if device == "cpu" else functools.partial(_on_gpu, step)


def _on_gpu(step: Callable[[], Any]) -> None:
    import torch

    torch.backends.cuda.matmul.allow_tf32 = True  # as JAX's default precision does
    torch.backends.cudnn.allow_tf32 = True
    for _ in range(_steps()):
        step()
    torch.cuda.synchronize()


def _options(subject: Subject, net: str, options: Any) -> dict[str, Any]:
    inputs = {"mlp": {"inputs": int(np.prod(subject.shape))}, "cnn": {"channels": subject.shape[2]}}
    return {**options, **inputs.get(net, {})}
