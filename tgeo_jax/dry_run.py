"""What a step would need of devices that are not here: memory, FLOPs, collectives, time.

The step is lowered and compiled for simulated CPU devices, whose number is free; what the compiler
says of it is about one of them. Every argument is only a shape: nothing is allocated or trained.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from tgeo_jax import abstract, collectives, generations, memory, models, parallel, simulated
from tgeo_jax import config as configs
from tgeo_jax.assemble import assemble
from tgeo_jax.collectives import Collective
from tgeo_jax.data import streaming
from tgeo_jax.device_kinds import Kind
from tgeo_jax.dispatch import Dispatcher, Resident
from tgeo_jax.errors import ConfigError
from tgeo_jax.models import convolution

STATE, BEST, TEACHER, DATA, WORKING = "state", "best so far", "teacher", "data", "working space"
_HOST_GPUS = 8  # that NVLink connects


class Bounds(NamedTuple):
    """Seconds that a step takes at least."""

    compute: float
    memory: float
    links: float

    @property
    def step(self) -> float:
        """As if links waited for the rest, and nothing else for anything."""
        return max(self.compute, self.memory) + self.links


@dataclasses.dataclass(frozen=True)
class Plan:
    """One step as its compiler planned it; all figures are of one device.

    Attributes:
        config: what was planned.
        mesh: sizes of its axes.
        memory: bytes by what they are for; see the constants of this module.
        flops: of the step.
        traffic: bytes that its operations read and write.
        collectives: what it says to the other devices.
        learns: whether the step takes the hypergradient.
    """

    config: ConfigDict
    mesh: dict[str, int]
    memory: dict[str, int]
    flops: float
    traffic: float
    collectives: list[Collective]
    learns: bool

    @property
    def devices(self) -> int:
        """In the whole mesh."""
        return math.prod(self.mesh.values())

    @property
    def total(self) -> int:
        """Bytes of memory."""
        return sum(self.memory.values())

    @property
    def sent(self) -> float:
        """Bytes that the collectives make a device send."""
        return sum(one.sent(self.devices) for one in self.collectives)

    def bounds(self, kind: Kind) -> Bounds:
        """How long the step takes on such devices at their peak."""
        peak = kind.bfloat16 if self.config.precision == "bfloat16" else kind.float32
        return Bounds(self.flops / peak, self.traffic / kind.bandwidth, self.sent / kind.links)


def simulate(devices: int) -> None:
    """Gives this process so many CPU devices; call it before anything asks JAX for a device.

    Args:
        devices: how many.

    Raises:
        RuntimeError: JAX has devices already.
    """
    jax.config.update("jax_num_cpu_devices", devices)
    jax.config.update("jax_platforms", "cpu")
    # A program that was loaded from there would no longer say all that its compiler knew.
    jax.config.update("jax_enable_compilation_cache", False)


def plan(config: ConfigDict) -> Plan:
    """Plans one step on all devices of this process; of a chain of runs that of a later one.

    Args:
        config: from `config.default()` or a file in configs/.

    Raises:
        ConfigError, DataError, CheckpointError: as a run would, before anything is compiled.
    """
    configs.check(config)
    with simulated.accelerators():
        run = assemble(config, anchor_comes_later=generations.is_chain(config))
        state, best = abstract.state(run)
        teacher, teacher_bytes = abstract.teacher(run)
        data, data_bytes = abstract.data(run)
        dispatcher = Dispatcher(
            run.method,
            run.mesh,
            config.data.batch_size,
            config.meta.batch_size,
            streamed=isinstance(run.dataset, streaming.StreamedDataset),
        )
        # Steps whose number is a multiple of meta.every cost most, and the first one is.
        lowered = dispatcher.lower(state, teacher, data, 1, 0)
        # Nobody runs it, so that its machine code may be slow.
        options: Any = {**convolution.compiler_options(), "xla_backend_optimization_level": 0}
        program = lowered.compile(compiler_options=options)
    costs, text = program.cost_analysis() or {}, program.as_text() or ""
    return Plan(
        config=config,
        mesh=dict(run.mesh.shape),
        memory={
            STATE: parallel.bytes_on_one(parallel.state_shardings(run.mesh, state), state),
            BEST: parallel.bytes_on_one(parallel.table_shardings(run.mesh, best), best),
            TEACHER: teacher_bytes,
            DATA: data_bytes,
            WORKING: memory.needed(program).working,
        },
        flops=float(costs.get("flops", 0.0)),
        traffic=max(0.0, float(costs.get("bytes accessed", 0.0)) - _not_read(text, data)),
        collectives=collectives.collectives(text),
        learns=run.method.meta_learned,
    )


def told(plan: Plan, kinds: Sequence[Kind]) -> str:
    """The plan for a person, with a row for each kind of device."""
    mesh = " x ".join(f"{name} {size}" for name, size in plan.mesh.items())
    step = "one step with the hypergradient" if plan.learns else "one step"
    rows = {
        "bytes of memory": None,
        **plan.memory,
        "together": plan.total,
        step: None,
        "FLOPs": plan.flops,
        "bytes read and written": plan.traffic,
        "collectives": len(plan.collectives),
        "bytes of their results": sum(one.bytes for one in plan.collectives),
        "bytes sent for them": plan.sent,
    }
    said = {
        WORKING: "(estimated)",
        DATA: "" if plan.config.data.pipeline == "resident" else "(batches of two dispatches)",
        "collectives": f"({collectives.kinds(plan.collectives)})",
    }
    lines = [f"dry run for {plan.devices} devices: {mesh}; figures of each device"]
    for name, value in rows.items():
        row = f"  {name:<24}{value:>22,.0f}  {said.get(name, '')}" if value is not None else name
        lines.append(row.rstrip())
    lines += ["", *_table(plan, kinds), "", *_caveats(plan, kinds)]
    return "\n".join(lines)


def verdict(plan: Plan, kinds: Sequence[Kind]) -> str:
    """One sentence: where the step fits, and what to change where it does not.

    Raises:
        ConfigError: it fits on no kind.
    """
    missing = [kind for kind in kinds if plan.total > kind.usable]
    if not missing:
        return f"It fits on {', '.join(kind.name for kind in kinds)}."
    where = ", ".join(f"{kind.name} ({kind.usable / 1e9:.0f} GB)" for kind in missing)
    field, cures = _cures(plan)
    problem = f"needs {plan.total / 1e9:.1f} GB on each device"
    if len(missing) == len(kinds):
        raise ConfigError(f"{field}: a step {problem} and does not fit on {where}; {cures}")
    return f"It {problem} and does not fit on {where}; {cures}."


def _not_read(program: str, data: Resident) -> int:
    """Bytes that the compiler counts as read though only a batch of them is.

    It knows what a gather reads, but not what one inside of a fused kernel does: there it counts
    all examples.
    """
    whole = {
        f"{'s' if leaf.dtype.kind == 'i' else leaf.dtype.kind}{8 * leaf.dtype.itemsize}"
        f"[{','.join(map(str, leaf.shape))}]": math.prod(leaf.shape) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(data)
    }
    fused = set(re.findall(r" fusion\(.*calls=%?([\w.-]+)", program))
    heads = re.findall(r"^%?([\w.-]+) \((.*)\) -> ", program, re.MULTILINE)
    return sum(
        size * parameters.count(shape)
        for name, parameters in heads
        for shape, size in whole.items()
        if name in fused
    )


def _table(plan: Plan, kinds: Sequence[Kind]) -> list[str]:
    """Rows of text, right-aligned under their headings."""
    names = ("bfloat16", "float32", "compute", "memory", "links", "step", "needed", "there", "fits")
    rows: list[tuple[str, ...]] = [("device", *names)]
    for kind in kinds:
        bounds = plan.bounds(kind)
        times = (bounds.compute, bounds.memory, bounds.links, bounds.step)
        rows.append(
            (
                kind.name,
                *(f"{peak / 1e12:.0f}" for peak in (kind.bfloat16, kind.float32)),
                *(_short(1e3 * seconds) for seconds in times),
                _short(plan.total / 1e9),
                f"{kind.usable / 1e9:.0f}",
                "yes" if plan.total <= kind.usable else "NO",
            )
        )
    return [
        "peak TFLOP/s of two precisions, least milliseconds of a step, GB of memory",
        *(f"  {row[0]:<8}" + "".join(f"{cell:>10}" for cell in row[1:]) for row in rows),
    ]


def _short(value: float) -> str:
    """Examples:
    >>> _short(0.0000678123), _short(0.0123456), _short(12.3456), _short(1234.5), _short(0.0)
    ('<0.001', '0.0123', '12.3', '1234', '0')
    """
    if 0 < value < 1e-3:
        return "<0.001"
    if value >= 1000:
        return f"{value:.0f}"
    return np.format_float_positional(value, precision=3, fractional=False, trim="-")


def _caveats(plan: Plan, kinds: Sequence[Kind]) -> list[str]:
    lines = [
        "Compiled for CPU: an accelerator fuses, pads and schedules otherwise, so working space",
        "and bytes read and written are estimates; evaluation is not counted. The time of a step",
        "is max(compute, memory) + links at those peaks: a bound and not a measurement, since the",
        "time to start small kernels is not in it.",
    ]
    if plan.config.precision == "bfloat16":
        lines.append("A CPU computes bfloat16 in float32: both estimates are up to twice too high.")
    if any(kind.share < 1 for kind in kinds):
        lines.append("Of a GPU's memory JAX takes 75 % (XLA_PYTHON_CLIENT_MEM_FRACTION).")
        if plan.devices > _HOST_GPUS:
            lines.append(f"Links of GPUs are NVLink's, as if more than {_HOST_GPUS} shared it.")
    return lines


def _cures(plan: Plan) -> tuple[str, str]:
    """The field to look at first, with its value, and all that would help."""
    config = plan.config
    batch, pipeline = config.data.batch_size, config.data.pipeline
    working = [f"lower data.batch_size={batch} or use more devices"]
    if not config.remat and models.has_blocks(config.student.name):
        working.append("set remat=True")
    if config.precision == "float32":
        working.append("set precision='bfloat16'")
    splits = "set data.pipeline='stream'"
    if pipeline == "stream":
        splits = f"lower train.steps_per_dispatch={config.train.steps_per_dispatch}"
    network = f"choose a smaller student.name={config.student.name!r}"
    if config.seeds > 1:
        network = f"train fewer seeds={config.seeds}, or more devices along mesh.seed; {network}"
    of_part = {
        WORKING: (f"data.batch_size={batch}", ", ".join(working)),
        TEACHER: (
            f"mesh.model={config.mesh.model}",
            "keep the teacher in more parts (mesh.model) or only its logits (role.name='cached')",
        ),
        DATA: (f"data.pipeline={pipeline!r}", splits),
        STATE: (f"student.name={config.student.name!r}", network),
    }
    sizes = {**plan.memory, STATE: plan.memory[STATE] + plan.memory[BEST]}
    order = sorted(of_part, key=lambda part: -sizes[part])
    said = [
        f"{sizes[part] / 1e9:.1f} GB are {part}: {of_part[part][1]}"
        for part in order
        if 5 * sizes[part] >= plan.total
    ]
    return of_part[order[0]][0], "; ".join(said)
