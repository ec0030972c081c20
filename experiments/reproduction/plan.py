"""What a table's runs are, what of them is done, and what the rest will cost."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from experiments.reproduction.runs import DONE, MISSING, Run
from tgeo_jax import config as configs
from tgeo_jax import device_kinds, generations, models
from tgeo_jax.data import sources

UTILISATION = 0.3  # of a device's peak, where nothing has been measured yet
# Forward passes of the student that a step of each ratio costs (docs/how_it_works.md).
_FORWARDS = {"tgeo": 8.0, "bikd": 8.0, "rw": 10.0}
_PLAIN = 3.0


@dataclasses.dataclass(frozen=True)
class Planned:
    """A run with what is known of it.

    Attributes:
        run: which.
        state: a constant of `runs`.
        share: of its epochs that are trained.
        flops: of the whole run; None where the shape of the data is not known.
        seconds: that it took, or is expected to take from here; None where nothing is known.
    """

    run: Run
    state: str
    share: float
    flops: float | None
    seconds: float | None


def of_runs(runs: Mapping[str, Run], kind: device_kinds.Kind | None = None) -> list[Planned]:
    """Plans all runs of a table.

    What the finished runs of the table took tells how long the others will take: by FLOPs, where
    these are known. Before any has finished, `UTILISATION` of a device's peak is assumed.

    Args:
        runs: by name; what is not trained here is left out.
        kind: of device, for what has not been measured; None: then nothing is assumed.
    """
    states = {name: run.status() for name, run in runs.items() if run.source}
    flops = {name: _flops(runs[name]) for name in states}
    spent = {}
    for name, (state, _) in states.items():
        result = runs[name].folder.result() if state == DONE else None
        if result is not None:
            spent[name] = result["seconds"]
    measured = [(flops[name], seconds) for name, seconds in spent.items()]
    known = [(count, seconds) for count, seconds in measured if count]
    pace = sum(s for _, s in known) / sum(c for c, _ in known) if known else None
    mean = sum(spent.values()) / len(spent) if spent else None
    found = []
    for name, (state, share) in states.items():
        seconds = spent.get(name)
        if seconds is None:
            whole, count = mean, flops[name]
            if count is not None and (pace or kind):
                peak = _peak(kind, runs[name].config) if kind else 1.0
                whole = count * (pace or 1 / (UTILISATION * peak))
            seconds = None if whole is None else whole * (1 - share)
        found.append(Planned(runs[name], state, share, flops[name], seconds))
    return found


def told(planned: list[Planned], *, price: float = 0.0, commands: bool = True) -> str:
    """The plan for a person: a line for each run, then what is left.

    Args:
        planned: from `of_runs`.
        price: of a device hour, in whatever currency; 0: not told.
        commands: whether each run's command is shown under it.
    """
    width = max(len(each.run.name) for each in planned)
    lines = [f"{'run':<{width}}  state       trained      FLOPs    seconds"]
    for each in planned:
        flops = "-" if each.flops is None else f"{each.flops:.1e}"
        seconds = "-" if each.seconds is None else f"{each.seconds:.0f}"
        lines.append(
            f"{each.run.name:<{width}}  {each.state:<10}  {100 * each.share:>5.0f} %"
            f"  {flops:>9}  {seconds:>9}"
        )
        if each.state == MISSING:
            lines.append(f"    {each.run.missing}")
        elif commands and each.state != DONE:
            lines.append(f"    {shlex.join(each.run.command)}")
    return "\n".join([*lines, "", _sum(planned, price)])


def _sum(planned: list[Planned], price: float) -> str:
    left = [each for each in planned if each.state not in (DONE, MISSING)]
    cannot = sum(each.state == MISSING for each in planned)
    words = [f"{len(planned)} runs, {len(planned) - len(left) - cannot} done, {len(left)} to do"]
    if cannot:
        words.append(f"{cannot} cannot run here (see above)")
    known = [each.seconds for each in left if each.seconds is not None]
    if known:
        hours = sum(known) / 3600
        words.append(
            f"about {hours:.2f} device hours" if hours < 10 else f"about {hours:.0f} hours"
        )
        if price:
            words.append(f"{price * hours:.2f} at {price:g} an hour")
        if len(known) < len(left):
            words.append(f"{len(left) - len(known)} runs of unknown cost not counted")
    elif left:
        words.append("cost unknown: nothing has been measured; --device_kind assumes a device")
    return ", ".join(words) + "."


def _flops(run: Run) -> float | None:
    """Of all steps; evaluation is not counted."""
    config = run.config
    shape = _shape(config)
    if shape is None:
        return None
    height_width_channels, classes, examples = shape
    student = _forward(config.student, height_width_channels, classes)
    teacher = 0.0
    if config.role.name != "alone":
        teacher = _forward(config.teacher, height_width_channels, classes)
    kept = examples * (1 - config.data.validation_fraction) * config.data.fraction
    seen = kept * config.train.epochs * config.seeds
    every = max(1, config.meta.every)
    forwards = _PLAIN + (_FORWARDS.get(config.ratio.name, _PLAIN) - _PLAIN) / every
    if config.role.name == "alone":
        return seen * _PLAIN * student
    if config.role.name in ("dml", "trikd"):
        one = seen * (forwards * student + _PLAIN * teacher)
        if not generations.is_chain(config):
            return one
        chain = config.role.trikd.generations
        return seen * _PLAIN * student + chain * (one + seen * student)
    return seen * (forwards * student + (0 if config.role.name == "cached" else teacher))


def _shape(config: ConfigDict) -> tuple[tuple[int, ...], int, int] | None:
    """(image, classes, training examples); None where they are not known without reading rows."""
    try:
        info = sources.builder(config.data.name, config.data.dir).info
        image = info.features["image"].shape
        examples = info.splits["train"].num_examples
        classes = info.features["label"].num_classes
    except (AttributeError, KeyError, ValueError):
        return None
    if config.data.pipeline == "stream":
        image = (config.data.image_size, config.data.image_size, 3)
    return (image, classes, examples) if None not in image else None


_counted: dict[Any, float] = {}


def _forward(section: ConfigDict, image: tuple[int, ...], classes: int) -> float:
    """FLOPs of a forward pass for one example, as counted before compilation."""
    options = configs.options_of(section)
    key = (section.name, repr(options), image, classes)
    if key not in _counted:
        module = models.build(section.name, classes, precision="float32", **options)
        example = jax.ShapeDtypeStruct((1, *image), jnp.float32)
        variables = jax.eval_shape(module.init, jax.random.key(0), example)
        lowered = jax.jit(module.apply).lower(variables, example)
        costs: Any = lowered.cost_analysis() or {}
        _counted[key] = float(costs.get("flops", 0.0))
    return _counted[key]


def _peak(kind: device_kinds.Kind, config: ConfigDict) -> float:
    return kind.bfloat16 if config.precision == "bfloat16" else kind.float32
