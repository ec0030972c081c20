"""Every Orbax call: asynchronous, atomic checkpoints of a run, and trained networks out of them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from orbax.checkpoint import v1 as ocp
from orbax.checkpoint._src.futures.synchronization import OperationIdGenerator  # no public name

from tgeo_jax import orbax_s3, parallel, storage
from tgeo_jax.errors import CheckpointError

PyTree = Any
# Should the newest turn out to be damaged, the one before is still there.
_KEEP = 2


class Checkpoints:
    """The checkpoints of one run.

    A checkpoint is one atomic unit with two items: `state`, everything training goes on from, and
    `best`, for every seed what it was when validation was best.
    """

    def __init__(self, directory: storage.Path):
        self._directory = directory
        storage.make_folder(directory)
        orbax_s3.enable()
        with storage.told_plainly(directory, "opened"):
            self._checkpointer = ocp.training.Checkpointer(
                storage.absolute(directory),
                preservation_policy=ocp.training.preservation_policies.LatestN(_KEEP),
                cleanup_tmp_directories=True,
            )
        if jax.process_count() > 1:
            # Orbax would ask JAX's service too whether to stop, by numbers that are not those of
            # `interruption`, after which nobody would ever be told to.
            self._checkpointer._manager.reached_preemption = lambda step: False
        self._closed = False

    def save(self, step: int, state: PyTree, best: PyTree) -> None:
        """Starts saving, unless this step is saved already; returns when arrays may change.

        Raises:
            CheckpointError: this save, or the one before, could not be written.
        """
        with self._told_plainly():
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
        return max(self._steps(), default=None)

    def restore(self, state: PyTree, best: PyTree) -> tuple[PyTree, PyTree]:
        """The newest checkpoint that can be read, laid out and placed like the given examples.

        Damaged ones that are newer are moved beside the folder, with a warning that names them.

        Raises:
            CheckpointError: none can be read, or they are of another architecture.
        """
        examples = {"state": state, "best": best}
        abstract = {
            name: jax.tree.map(_abstract, flax.serialization.to_state_dict(item))
            for name, item in examples.items()
        }
        found = self._newest_readable(abstract)
        restored = {
            name: flax.serialization.from_state_dict(item, found[name])
            for name, item in examples.items()
        }
        return restored["state"], restored["best"]

    def close(self) -> None:
        """Waits for a save under way; may be called again.

        Raises:
            CheckpointError: it could not be written.
        """
        if not self._closed:
            self._closed = True
            with self._told_plainly():
                self._checkpointer.close()

    def _steps(self) -> list[int]:
        """As process 0 sees them: another host's view of a shared folder may be old."""
        return json.loads(parallel.from_first(json.dumps(self._own_steps())))

    def _own_steps(self) -> list[int]:
        return [one.step for one in self._checkpointer.checkpoints]

    def _newest_readable(self, abstract: PyTree) -> PyTree:
        if jax.process_count() > 1:
            self._check_alone(abstract)
            return _loaded(storage.absolute(self._directory) / str(max(self._steps())), abstract)
        step, found = _first_readable(self._directory, self._own_steps(), abstract, abstract)
        self._put_aside_newer_than(step)
        return found

    def _check_alone(self, abstract: PyTree) -> None:
        """Process 0 reads all of it first: in the middle of a common load nobody can step back."""
        error = ""
        if jax.process_index() == 0:
            try:
                self._put_aside_newer_than(self._readable_by_one(abstract))
            except CheckpointError as found:
                error = str(found)
        # Orbax numbers what it does, and processes wait for the same number.
        told = json.dumps([error, OperationIdGenerator.get_current_operation_id()])
        error, number = json.loads(parallel.from_first(told))
        while OperationIdGenerator.get_current_operation_id() != number:
            OperationIdGenerator.next_operation_id()
        if error:
            raise CheckpointError(error)
        self._checkpointer.reload()

    def _readable_by_one(self, abstract: PyTree) -> int:
        """The newest step that this process can read while the others wait elsewhere."""
        of_one = ocp.options.MultiprocessingOptions(
            primary_host=0, active_processes={0}, barrier_sync_key_prefix="alone"
        )
        targets = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), abstract)
        with ocp.Context(multiprocessing_options=of_one):
            return _first_readable(self._directory, self._own_steps(), abstract, targets)[0]

    def _put_aside_newer_than(self, step: int) -> None:
        damaged = [one for one in self._own_steps() if one > step]
        for other in damaged:
            logging.warning(
                "%s: this checkpoint cannot be read; going on from the one before, of step %d. "
                "The damaged one is kept as %s",
                self._directory / str(other), step, self._put_aside(other),
            )  # fmt: skip
        if damaged and jax.process_count() == 1:
            self._checkpointer.reload()

    def _put_aside(self, step: int) -> storage.Path:
        away = self._directory.with_name(f"{self._directory.name}_damaged")
        target = away / str(step)
        storage.make_folder(away)
        number = 1
        while storage.exists(target):
            number += 1
            target = away / f"{step}.{number}"
        storage.move(self._directory / str(step), target)
        return target

    @contextlib.contextmanager
    def _told_plainly(self) -> Iterator[None]:
        try:
            yield
        except CheckpointError:
            raise
        except Exception as error:  # whatever Orbax, TensorStore or a file system says
            kept = self._own_steps()
            raise CheckpointError(
                f"{self._directory}: a checkpoint could not be written ({_reason(error)}); "
                f"{f'that of step {max(kept)} is whole' if kept else 'there is none yet'}. Make "
                "room there or mend the storage; the same command goes on from there"
            ) from error


def _first_readable(
    directory: storage.Path, steps: list[int], abstract: PyTree, targets: PyTree
) -> tuple[int, PyTree]:
    """The newest step that can be read, and what was read.

    Args:
        directory: the checkpoints folder.
        steps: what it holds.
        abstract: shapes that a checkpoint of this run has.
        targets: what to read it as, of the same shapes.

    Raises:
        CheckpointError: none can be read, or the newest is of another architecture.
    """
    damaged: dict[int, Exception] = {}
    for step in sorted(steps, reverse=True):
        path = storage.absolute(directory) / str(step)
        try:
            return step, _loaded(path, targets)
        except Exception as error:  # whatever Orbax, TensorStore or a file system says
            _check_architecture(path, abstract)
            damaged[step] = error
    names = ", ".join(str(directory / str(step)) for step in damaged)
    reason = next(iter(damaged.values()), "there is none")
    raise CheckpointError(
        f"{names}: no checkpoint can be read ({reason}); restore them from a copy, or move the "
        "folder away to begin again"
    )


def _loaded(path: storage.Path, targets: PyTree) -> PyTree:
    saved: Any = ocp.checkpointables_metadata(path).metadata
    wanted, was_called = dict(targets["best"]), "validation_accuracy"
    is_older = was_called in saved["best"]  # of a version that knew no other figure
    if is_older:
        wanted[was_called] = wanted.pop("validation_score")
    found = dict(ocp.load_checkpointables(path, {**targets, "best": wanted}))
    if is_older:
        found["best"]["validation_score"] = found["best"].pop(was_called)
    return found


def _check_architecture(path: storage.Path, abstract: PyTree) -> None:
    """What cannot be loaded may be whole, but of another network."""
    try:
        found: Any = ocp.checkpointables_metadata(path).metadata
        given = {name: found[name] for name in abstract}
    except Exception:  # damaged so far that it does not say what it is
        return
    # What is missing there may be what is damaged; what is there tells another network.
    there, wanted = (_shapes(tree) for tree in (given, abstract))
    common = there.keys() & wanted.keys()
    check_fits(
        {name: jax.ShapeDtypeStruct(wanted[name], np.float32) for name in common},
        {name: jax.ShapeDtypeStruct(there[name], np.float32) for name in common},
        str(path),
    )


def save_network(directory: storage.Path, variables: PyTree) -> None:
    """Writes a network that was trained elsewhere, where `load_network` finds it.

    Args:
        directory: the checkpoints folder.
        variables: `{"params": ..., "batch_stats": ...}`.

    Examples:
        >>> import pathlib, tempfile
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


def load_network(directory: storage.Path, which: str, seed_index: int = 0) -> PyTree:
    """Variables of a trained student, as NumPy arrays.

    Args:
        directory: the checkpoints folder of the run that trained it.
        which: `last` or `best` (by validation).
        seed_index: which of the run's seeds.

    Returns:
        `{"params": ..., "batch_stats": ...}`.

    Raises:
        CheckpointError: no complete checkpoint there, or not of that seed.
        ValueError: `which` is neither.

    Examples:
        >>> import pathlib
        >>> load_network(pathlib.Path("/nowhere"), "last")
        Traceback (most recent call last):
        ...
        tgeo_jax.errors.CheckpointError: /nowhere: no such folder, so no checkpoint to load
    """
    if which not in ("last", "best"):
        raise ValueError(f"which={which!r}: must be 'last' or 'best'")
    found = load_newest(directory)
    network = found["best"] if which == "best" else found["state"]["student"]
    num_seeds = len(jax.tree.leaves(network["params"])[0])
    if not 0 <= seed_index < num_seeds:
        raise CheckpointError(f"{directory}: holds {num_seeds} seeds, none of index {seed_index}")
    return {
        name: jax.tree.map(lambda leaf: leaf[seed_index], network.get(name) or {})
        for name in ("params", "batch_stats")
    }


def load_newest(directory: storage.Path) -> dict[str, PyTree]:
    """Everything in the newest checkpoint, `state` and `best`, as NumPy arrays.

    Args:
        directory: the checkpoints folder of a run.

    Raises:
        CheckpointError: no complete checkpoint there.
    """
    if not storage.is_dir(directory):
        raise CheckpointError(f"{directory}: no such folder, so no checkpoint to load")
    orbax_s3.enable()
    with storage.told_plainly(directory, "loaded"):
        return _newest(directory)


def _newest(directory: storage.Path) -> dict[str, PyTree]:
    with contextlib.closing(ocp.training.Checkpointer(storage.absolute(directory))) as opened:
        latest = opened.latest
        if latest is None:
            raise CheckpointError(f"{directory}: holds no complete checkpoint")
        # NumPy arrays as targets: the devices that the run was trained on may not be here.
        saved = opened.checkpointables_metadata(latest.step).metadata
        empty = {
            name: jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), saved[name])
            for name in ("state", "best")
        }
        return opened.load_checkpointables(latest.step, empty)


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
    wanted, found = _shapes(expected), _shapes(given)
    for name in [*wanted, *(name for name in found if name not in wanted)]:
        if wanted.get(name) != found.get(name):
            there = f"has shape {found[name]} there" if name in found else "is missing there"
            here = f"needs {wanted[name]}" if name in wanted else "has no such parameter"
            raise CheckpointError(
                f"{source}: another architecture: parameter {name} {there}, the configured "
                f"network {here}"
            )


def _shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
    return {_path(p): leaf.shape for p, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _reason(error: BaseException) -> str:
    """The line of an error, or of what caused it, that a person can use."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    told = [line for line in lines if "Errno" in line or "OS error" in line]
    return (told or lines)[0][:300]


def _path(path: tuple) -> str:
    return "/".join(str(getattr(key, "key", key)) for key in path)


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
