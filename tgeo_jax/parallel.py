"""One mesh with the axes `seed` and `data`, and where each array lives on it.

State has a leading seed axis, sharded over `seed`; a batch is sharded over `data`; datasets and
the frozen teacher are on every device. The mean over the batch is taken inside the differentiated
function, so gradients, hypergradients and BatchNorm statistics are those of the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from tgeo_jax.errors import ConfigError
from tgeo_jax.state import TrainState

PyTree = Any
# The axes over which `vmap` maps a state: everything but the step, which all seeds share, so that
# "every k-th step" stays a branch instead of becoming a select of both sides.
_AXES: Any = {"step": None, "seed": 0, "student": 0, "fusion": 0, "teacher": 0, "anchor": 0}
SEED_AXES = TrainState(**_AXES)


def make_mesh(seed_devices: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices: `seed_devices` along `seed`, the rest along `data`.

    Args:
        seed_devices: size of the seed axis.
        devices: all of JAX's by default.

    Returns:
        A mesh with axes (seed, data). Its axes are of type Auto: distillation losses gather and
        transpose over the batch, which Explicit axes reject.

    Raises:
        ConfigError: a seed axis that does not divide the devices.

    Examples:
        >>> dict(make_mesh(1, jax.devices()[:1]).shape)
        {'seed': 1, 'data': 1}
    """
    devices = jax.devices() if devices is None else devices
    if len(devices) % seed_devices:
        raise ConfigError(
            f"mesh.seed={seed_devices}: must divide the number of devices, {len(devices)}"
        )
    shape = (seed_devices, len(devices) // seed_devices)
    return jax.make_mesh(shape, ("seed", "data"), (AxisType.Auto,) * 2, devices=devices)


def check_batch(mesh: Mesh, field: str, batch_size: int) -> None:
    """Checks that a batch can be cut evenly over the data axis.

    Raises:
        ConfigError: naming the field, its value and the nearest sizes that fit.

    Examples:
        >>> check_batch(make_mesh(1, jax.devices()[:1]), "data.batch_size", 63)
    """
    size = mesh.shape["data"]
    if batch_size % size:
        below = batch_size // size * size
        fitting = " or ".join(str(n) for n in (below, below + size) if n)
        raise ConfigError(
            f"{field}={batch_size}: not divisible by the {size} devices along the data axis; "
            f"use {fitting}"
        )


def replicated(mesh: Mesh) -> NamedSharding:
    """On every device, whole."""
    return NamedSharding(mesh, PartitionSpec())


def by_seed(mesh: Mesh) -> NamedSharding:
    """Leading axis cut over `seed`."""
    return NamedSharding(mesh, PartitionSpec("seed"))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """[seed, batch, ...] cut over both axes."""
    return NamedSharding(mesh, PartitionSpec("seed", "data"))


def steps_sharding(mesh: Mesh) -> NamedSharding:
    """[steps, batch, ...] with the batches cut over `data`.

    Examples:
        >>> tuple(steps_sharding(make_mesh(1, jax.devices()[:1])).spec)
        (None, 'data')
    """
    return NamedSharding(mesh, PartitionSpec(None, "data"))


def state_shardings(mesh: Mesh) -> TrainState:
    """Where each part of the state lives, as a prefix of its tree.

    Examples:
        >>> tuple(state_shardings(make_mesh(1, jax.devices()[:1])).seed.spec)
        ('seed',)
    """
    seeds: Any = by_seed(mesh)
    step: Any = replicated(mesh)
    return TrainState(
        step=step, seed=seeds, student=seeds, fusion=seeds, teacher=seeds, anchor=seeds
    )


def over_seeds(
    function: Callable, in_axes: PyTree, out_axes: PyTree, *, one_by_one: bool = False
) -> Callable:
    """A function of one seed as one of all of them.

    Args:
        function: of one seed.
        in_axes: as of `jax.vmap`; 0 or None.
        out_axes: likewise.
        one_by_one: one seed after the other in place of side by side, because a CPU is slow at the
            grouped convolutions that `vmap` makes of several networks.

    Examples:
        >>> square = over_seeds(lambda x, y: x * y, (0, None), 0, one_by_one=True)
        >>> print(square(jnp.arange(3), 2))
        [0 2 4]
    """
    mapped = jax.vmap(function, in_axes, out_axes, spmd_axis_name="seed")
    return _one_by_one(mapped, in_axes, out_axes) if one_by_one else mapped


def _one_by_one(mapped: Callable, in_axes: PyTree, out_axes: PyTree) -> Callable:
    """A function that is mapped over seeds, called for each by itself, as a map over one."""

    def of_all(*args: Any) -> Any:
        axes = _axes_of_leaves(in_axes, args)
        leaves, structure = jax.tree.flatten(args)
        size = next(len(leaf) for leaf, axis in zip(leaves, axes, strict=True) if axis == 0)
        found = []
        for seed in range(size):
            own = [
                leaf if axis is None else leaf[seed : seed + 1]
                for leaf, axis in zip(leaves, axes, strict=True)
            ]
            found.append(mapped(*jax.tree.unflatten(structure, own)))
        # Leaf by leaf: a forward pass is not the same tree as that of another trace.
        axes = _axes_of_leaves(out_axes, found[0])
        columns = zip(*map(jax.tree.leaves, found), strict=True)
        together = [
            column[0] if axis is None else jnp.concatenate(column)
            for column, axis in zip(columns, axes, strict=True)
        ]
        return jax.tree.unflatten(jax.tree.structure(found[0]), together)

    return of_all


def _axes_of_leaves(axes: PyTree, tree: PyTree) -> list[int | None]:
    """The axis of every leaf, from a prefix of the tree as `vmap` takes it."""
    flat: list[int | None] = []
    jax.tree.map(
        lambda axis, part: flat.extend([axis] * len(jax.tree.leaves(part))),
        axes,
        tree,
        is_leaf=lambda axis: axis is None,
    )
    return flat
