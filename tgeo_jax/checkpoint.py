"""Every Orbax call: asynchronous, atomic checkpoints of a run, and trained networks out of them."""

from __future__ import annotations

import pathlib
from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from tgeo_jax.errors import CheckpointError

PyTree = Any
# Should the newest turn out to be damaged, the one before is still there.
_KEEP = 2


class Checkpoints:
    """The checkpoints of one run.

    A checkpoint is one atomic unit with two items: `state`, everything training goes on from, and
    `best`, for every seed what it was at its best validation accuracy.
    """

    def __init__(self, directory: pathlib.Path):
        directory.mkdir(parents=True, exist_ok=True)
        self._checkpointer = ocp.training.Checkpointer(
            directory.absolute(),
            preservation_policy=ocp.training.preservation_policies.LatestN(_KEEP),
            cleanup_tmp_directories=True,
        )
        self._closed = False

    def save(self, step: int, state: PyTree, best: PyTree) -> None:
        """Starts saving, unless this step is saved already; returns when arrays may change."""
        self._checkpointer.wait()
        if self.latest_step() == step:
            return
        # Copied on the device: the next dispatch donates these buffers, and on CPU the writer
        # reads them in place.
        items = jax.tree.map(jnp.copy, {"state": state, "best": best})
        self._checkpointer.save_checkpointables_async(
            step, {name: flax.serialization.to_state_dict(item) for name, item in items.items()}
        )

    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint, None if there is none."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def restore(self, state: PyTree, best: PyTree) -> tuple[PyTree, PyTree]:
        """The newest checkpoint, laid out and placed like the given examples.

        Raises:
            CheckpointError: it cannot be read; what to do to go on from the one before.
        """
        examples = {"state": state, "best": best}
        abstract = {
            name: jax.tree.map(_abstract, flax.serialization.to_state_dict(item))
            for name, item in examples.items()
        }
        step = self.latest_step()
        try:
            found = self._checkpointer.load_checkpointables(step, abstract)
        except Exception as error:
            raise CheckpointError(
                f"{self._checkpointer.directory}/{step}: this checkpoint cannot be read ({error}); "
                "move that folder away, and the same command goes on from the one before"
            ) from error
        restored = {
            name: flax.serialization.from_state_dict(item, found[name])
            for name, item in examples.items()
        }
        return restored["state"], restored["best"]

    def close(self) -> None:
        """Waits for a save under way; may be called again."""
        if not self._closed:
            self._closed = True
            self._checkpointer.close()


def save_network(directory: pathlib.Path, variables: PyTree) -> None:
    """Writes a network that was trained elsewhere, where `load_network` finds it.

    Args:
        directory: the checkpoints folder.
        variables: `{"params": ..., "batch_stats": ...}`.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder) / "checkpoints"
        ...     save_network(path, {"params": {"w": np.ones(2)}, "batch_stats": {}})
        ...     load_network(path, "best")["params"]["w"].tolist()
        [1.0, 1.0]
    """
    of_one_seed = jax.tree.map(lambda leaf: np.asarray(leaf)[None], variables)
    checkpoints = Checkpoints(directory)
    checkpoints.save(0, {"student": of_one_seed}, of_one_seed)
    checkpoints.close()


def load_network(directory: pathlib.Path, which: str, seed_index: int = 0) -> PyTree:
    """Variables of a trained student, as NumPy arrays.

    Args:
        directory: the checkpoints folder of the run that trained it.
        which: `last` or `best` (by validation accuracy).
        seed_index: which of the run's seeds.

    Returns:
        `{"params": ..., "batch_stats": ...}`.

    Raises:
        CheckpointError: no complete checkpoint there, or not of that seed.
        ValueError: `which` is neither.

    Examples:
        >>> load_network(pathlib.Path("/nowhere"), "last")
        Traceback (most recent call last):
        ...
        tgeo_jax.errors.CheckpointError: /nowhere: no such folder, so no checkpoint to load
    """
    if which not in ("last", "best"):
        raise ValueError(f"which={which!r}: must be 'last' or 'best'")
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such folder, so no checkpoint to load")
    checkpointer = ocp.training.Checkpointer(directory.absolute())
    latest = checkpointer.latest
    if latest is None:
        checkpointer.close()
        raise CheckpointError(f"{directory}: holds no complete checkpoint")
    # NumPy arrays as targets: the devices that the run was trained on may not be here.
    saved = checkpointer.checkpointables_metadata(latest.step).metadata
    empty = {
        name: jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), saved[name])
        for name in ("state", "best")
    }
    found = checkpointer.load_checkpointables(latest.step, empty)
    checkpointer.close()
    network = found["best"] if which == "best" else found["state"]["student"]
    num_seeds = len(jax.tree.leaves(network["params"])[0])
    if not 0 <= seed_index < num_seeds:
        raise CheckpointError(f"{directory}: holds {num_seeds} seeds, none of index {seed_index}")
    return {
        name: jax.tree.map(lambda leaf: leaf[seed_index], network.get(name) or {})
        for name in ("params", "batch_stats")
    }


def check_fits(expected: PyTree, given: PyTree, source: str) -> None:
    """Checks that loaded variables belong to a network.

    Args:
        expected: variables of the network, arrays or shapes.
        given: the loaded ones.
        source: where they came from, for the message.

    Raises:
        CheckpointError: the first parameter that is missing, extra or of another shape.

    Examples:
        >>> check_fits({"w": np.zeros((2, 3))}, {"w": np.zeros((2, 4))}, "runs/teacher")
        Traceback (most recent call last):
        ...
        tgeo_jax.errors.CheckpointError: runs/teacher: another architecture: parameter w has shape \
(2, 4) there, the configured network needs (2, 3)
    """
    wanted = {_path(p): leaf.shape for p, leaf in jax.tree_util.tree_leaves_with_path(expected)}
    found = {_path(p): leaf.shape for p, leaf in jax.tree_util.tree_leaves_with_path(given)}
    for name in [*wanted, *(name for name in found if name not in wanted)]:
        if wanted.get(name) != found.get(name):
            there = f"has shape {found[name]} there" if name in found else "is missing there"
            here = f"needs {wanted[name]}" if name in wanted else "has no such parameter"
            raise CheckpointError(
                f"{source}: another architecture: parameter {name} {there}, the configured "
                f"network {here}"
            )


def _path(path: tuple) -> str:
    return "/".join(str(getattr(key, "key", key)) for key in path)


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
