"""One mesh with the axes `seed`, `data` and `model`, and where each array lives on it.

State has a leading seed axis, sharded over `seed`; a batch is sharded over `data` and `model`;
datasets are on every device, and so is the frozen teacher unless it is cut over `model`, as the
student's embedding tables are. The mean
over the batch is taken inside the differentiated function, so gradients, hypergradients and
BatchNorm statistics are those of the whole batch. All of it holds for devices of several processes:
each of them runs the same program and holds its part of every array.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from tgeo_jax.errors import ConfigError
from tgeo_jax.state import TrainState, is_table

PyTree = Any
BATCH = ("data", "model")  # the axes that share a batch
# The axes over which `vmap` maps a state: everything but the step, which all seeds share, so that
# "every k-th step" stays a branch instead of becoming a select of both sides.
_AXES: Any = {"step": None, "seed": 0, "student": 0, "fusion": 0, "teacher": 0, "anchor": 0}
SEED_AXES = TrainState(**_AXES)


def make_mesh(
    seed_devices: int = 1,
    devices: Sequence[jax.Device] | None = None,
    model_devices: int = 1,
) -> Mesh:
    """A mesh over all devices of all processes; what the other axes leave is along `data`.

    Args:
        seed_devices: size of the seed axis.
        devices: all of JAX's by default.
        model_devices: size of the model axis, over which a frozen teacher's parameters and a
            student's embedding tables are cut; its devices share the batch too.

    Returns:
        A mesh with axes (seed, data, model). They are of type Auto: distillation losses gather and
        transpose over the batch, which Explicit axes reject.

    Raises:
        ConfigError: axes that do not divide the devices.

    Examples:
        >>> dict(make_mesh(1, jax.devices()[:1]).shape)
        {'seed': 1, 'data': 1, 'model': 1}
    """
    devices = jax.devices() if devices is None else devices
    if len(devices) % seed_devices:
        raise ConfigError(
            f"mesh.seed={seed_devices}: must divide the number of devices, {len(devices)}"
        )
    rest = len(devices) // seed_devices
    if rest % model_devices:
        raise ConfigError(
            f"mesh.model={model_devices}: must divide the {rest} devices of each part of the seed "
            "axis"
        )
    shape = (seed_devices, rest // model_devices, model_devices)
    names, types = ("seed", *BATCH), (AxisType.Auto,) * 3
    if jax.process_count() == 1:
        return jax.make_mesh(shape, names, types, devices=devices)
    # The rows of a batch are those of the processes in their order, which `make_mesh` changes on
    # some TPUs; it also refuses devices of several slices.
    ordered = sorted(devices, key=lambda device: (device.process_index, device.id))
    return Mesh(np.asarray(ordered).reshape(shape), names, axis_types=types)


def batch_parts(mesh: Mesh) -> int:
    """Over how many devices a batch is cut.

    Examples:
        >>> batch_parts(make_mesh(1, jax.devices()[:1]))
        1
    """
    return mesh.shape["data"] * mesh.shape["model"]


def check_batch(mesh: Mesh, field: str, batch_size: int) -> None:
    """Checks that a batch can be cut evenly over its devices.

    Raises:
        ConfigError: naming the field, its value and the nearest sizes that fit.

    Examples:
        >>> check_batch(make_mesh(1, jax.devices()[:1]), "data.batch_size", 63)
    """
    size = batch_parts(mesh)
    if batch_size % size:
        below = batch_size // size * size
        fitting = " or ".join(str(n) for n in (below, below + size) if n)
        raise ConfigError(
            f"{field}={batch_size}: not divisible by the {size} devices that share a batch; "
            f"use {fitting}"
        )


def put(tree: PyTree, sharding: Any) -> PyTree:
    """Host arrays, the same in every process, as global arrays.

    `jax.device_put` would compare the processes' copies by a broadcast of all of them.

    Args:
        tree: of arrays.
        sharding: one for all leaves, or a tree of them.

    Examples:
        >>> mesh = make_mesh(1, jax.devices()[:1])
        >>> put(np.ones(2), replicated(mesh)).sharding == replicated(mesh)
        True
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)

    def of_leaf(leaf: Any, where: Any) -> jax.Array:
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, where, lambda index: host[index])

    if isinstance(sharding, NamedSharding):
        return jax.tree.map(lambda leaf: of_leaf(leaf, sharding), tree)
    return jax.tree.map(of_leaf, tree, sharding)


def fetch(tree: PyTree) -> PyTree:
    """Whole arrays on the host of every process, wherever their parts are.

    Examples:
        >>> fetch({"w": jnp.ones(2)})
        {'w': array([1., 1.], dtype=float32)}
    """

    def of_leaf(leaf: Any) -> Any:
        if getattr(leaf, "is_fully_addressable", True) or leaf.is_fully_replicated:
            return jax.device_get(leaf)
        return multihost_utils.process_allgather(leaf, tiled=True)

    return jax.tree.map(of_leaf, tree)


def from_first(text: str) -> str:
    """A text of process 0, in every process.

    Examples:
        >>> from_first("{}")
        '{}'
    """
    if jax.process_count() == 1:
        return text
    own = np.frombuffer(text.encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(own))))
    given = own if jax.process_index() == 0 else np.zeros(size, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(given)).tobytes().decode()


def together(name: str) -> None:
    """Waits until every process of the run is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def replicated(mesh: Mesh) -> NamedSharding:
    """On every device, whole."""
    return NamedSharding(mesh, PartitionSpec())


def by_seed(mesh: Mesh) -> NamedSharding:
    """Leading axis cut over `seed`."""
    return NamedSharding(mesh, PartitionSpec("seed"))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """[seed, batch, ...] cut over all axes."""
    return NamedSharding(mesh, PartitionSpec("seed", BATCH))


def examples_sharding(mesh: Mesh) -> NamedSharding:
    """[batch, ...] that all seeds see, cut over the axes of a batch."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


def weight_shardings(mesh: Mesh, variables: PyTree) -> PyTree:
    """A frozen network's: each array cut over `model` along its largest dimension that divides.

    What divides nowhere, such as a bias of 10 classes over 8 devices, is on every device.

    Examples:
        >>> mesh = make_mesh(1, jax.devices()[:1])
        >>> tuple(weight_shardings(mesh, {"kernel": np.ones((3, 64))})["kernel"].spec)
        (None, 'model')
    """
    parts = mesh.shape["model"]

    def of_leaf(leaf: Any) -> NamedSharding:
        fitting = [axis for axis, size in enumerate(leaf.shape) if size % parts == 0 and size]
        axis = max(fitting, key=lambda axis: leaf.shape[axis], default=None)
        spec = () if axis is None else (*(None,) * axis, "model")
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(of_leaf, variables)


def steps_sharding(mesh: Mesh) -> NamedSharding:
    """[steps, batch, ...] with the batches cut over their axes.

    Examples:
        >>> tuple(steps_sharding(make_mesh(1, jax.devices()[:1])).spec)
        (None, ('data', 'model'))
    """
    return NamedSharding(mesh, PartitionSpec(None, BATCH))


def table_shardings(mesh: Mesh, tree: PyTree) -> PyTree:
    """A student's, leaves [seeds, ...]: embedding tables cut over `model`, the rest by seed alone.

    A table [seeds, V, D], and what an optimiser keeps for it, is cut along V, or along D where
    only that divides; where neither does it is whole on every device of its seed.

    Args:
        mesh: whose axes they are.
        tree: of arrays or their shapes.

    Returns:
        A prefix of the tree.

    Examples:
        >>> mesh = make_mesh(1, jax.devices()[:1])
        >>> tuple(table_shardings(mesh, {"table": {"rows": np.ones((1, 6, 2))}}).spec)
        ('seed',)
    """
    parts, seeds = mesh.shape["model"], by_seed(mesh)
    if parts == 1:
        return seeds

    def of_leaf(path: tuple, leaf: Any) -> NamedSharding:
        if not is_table(path):
            return seeds
        axis = next((axis for axis in (1, 2) if leaf.shape[axis] % parts == 0), None)
        spec = () if axis is None else (*(None,) * (axis - 1), "model")
        return NamedSharding(mesh, PartitionSpec("seed", *spec))

    return jax.tree_util.tree_map_with_path(of_leaf, tree)


def state_shardings(mesh: Mesh, state: TrainState | None = None) -> TrainState:
    """Where each part of the state lives, as a prefix of its tree.

    Args:
        mesh: whose axes they are.
        state: with its shapes, embedding tables are cut over `model`; None: by seed alone.

    Examples:
        >>> tuple(state_shardings(make_mesh(1, jax.devices()[:1])).seed.spec)
        ('seed',)
    """
    seeds: Any = by_seed(mesh)
    step: Any = replicated(mesh)
    student = seeds if state is None else table_shardings(mesh, state.student)
    return TrainState(
        step=step, seed=seeds, student=student, fusion=seeds, teacher=seeds, anchor=seeds
    )


def bytes_on_one(shardings: PyTree, tree: PyTree) -> int:
    """What one device holds of arrays that are cut in these ways.

    Args:
        shardings: a prefix of the tree; one alone is that of all leaves.
        tree: of arrays or their shapes.

    Examples:
        >>> mesh = make_mesh(1, jax.devices()[:1])
        >>> bytes_on_one(replicated(mesh), {"w": jnp.ones((3, 4))})
        48
    """

    def of_part(cut: NamedSharding, part: PyTree) -> list[int]:
        return [
            math.prod(cut.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(part)
        ]

    return sum(jax.tree.leaves(jax.tree.map(of_part, shardings, tree)))


def over_seeds(
    function: Callable,
    in_axes: PyTree,
    out_axes: PyTree,
    *,
    mesh: Mesh | None = None,
    one_by_one: bool = False,
) -> Callable:
    """A function of one seed as one of all of them.

    `vmap` makes grouped convolutions of several networks. Those are slow on a CPU, and where
    devices share a batch or the seeds, XLA gathers their inputs from all devices: there each device
    is told to stay with its own seeds, and takes them one after the other.

    Args:
        function: of one seed.
        in_axes: as of `jax.vmap`; 0 or None.
        out_axes: likewise.
        mesh: the devices; None: one.
        one_by_one: one seed after the other in place of side by side, also on one device.

    Examples:
        >>> square = over_seeds(lambda x, y: x * y, (0, None), 0, one_by_one=True)
        >>> print(square(jnp.arange(3), 2))
        [0 2 4]
    """
    mapped = jax.vmap(function, in_axes, out_axes)
    if one_by_one or (mesh is not None and batch_parts(mesh) > 1):
        mapped = _one_by_one(mapped, in_axes, out_axes)
    if mesh is None or mesh.shape["seed"] == 1:
        return mapped
    return jax.shard_map(
        mapped,
        mesh=mesh,
        in_specs=_specs(in_axes),
        out_specs=_specs(out_axes),
        axis_names={"seed"},  # the others are left to the compiler
        check_vma=False,
    )


def _specs(axes: PyTree) -> PyTree:
    def of_axis(axis: int | None) -> PartitionSpec:
        return PartitionSpec() if axis is None else PartitionSpec("seed")

    return jax.tree.map(of_axis, axes, is_leaf=lambda axis: axis is None)


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
