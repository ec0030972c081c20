"""Chains of runs: TriKD's generations, each anchored by the student of the one before.

    A_0 = the student's architecture trained alone
    for g = 1..G:  fresh teacher and student, trained together against A_(g-1);  A_g = that student

Every generation is a run of its own in `generation_<g>`, with its checkpoints, metrics and result;
so an interrupted chain resumes where it stopped, and every student is kept.
"""

from __future__ import annotations

import copy

from ml_collections import ConfigDict

from tgeo_jax import choices, storage, train
from tgeo_jax import config as configs
from tgeo_jax.assemble import assemble
from tgeo_jax.errors import Interrupted
from tgeo_jax.interruption import Interruption
from tgeo_jax.workdir import Workdir


def is_chain(config: ConfigDict) -> bool:
    """Whether a configuration asks for a chain of runs, not for one.

    Examples:
        >>> config = configs.default()
        >>> config.role.name = "trikd"
        >>> is_chain(config)
        True
        >>> config.role.trikd.anchor = "runs/anchor"
        >>> is_chain(config)
        False
    """
    if config.role.name != "trikd" or config.role.trikd.anchor:
        return False
    return choices.any_role(config.role).anchored


def run(config: ConfigDict, folder: str | storage.Path, *, progress: bool = True) -> dict:
    """Trains what a configuration says: one run, or all generations of a chain.

    Args:
        config: from `config.default()` or a file in configs/.
        folder: the run's folder, or that of its generations; created, resumed, or found finished.
        progress: whether to show a progress bar.

    Returns:
        The result, of a chain that of its last generation, with the test accuracies of all of them
        in `generations`.

    Raises:
        ConfigError, DataError, CheckpointError, TrainingError: as `train.run`.
    """
    configs.check(config)
    if not is_chain(config):
        return train.run(config, folder, progress=progress)
    whole = Workdir(storage.absolute(storage.path(folder)))  # so are the anchors that it names
    whole.check_same(config)
    finished = whole.result()
    if finished is not None:
        return finished
    assemble(config, anchor_comes_later=True)  # what is wrong with it shows now, not after A_0
    whole.claim(config)
    interruption = Interruption()
    try:
        results = _all(config, whole, progress, interruption)
    finally:
        interruption.close()
    result = {**results[-1], "generations": [found["test_accuracy"] for found in results]}
    result["seconds"] = sum(found["seconds"] for found in results)
    whole.write_result(result)
    return result


def _all(
    config: ConfigDict, whole: Workdir, progress: bool, interruption: Interruption
) -> list[dict]:
    results = []
    for number in range(config.role.trikd.generations + 1):
        own = whole.generation(number)
        # A finished one counts even if the folder was moved and its anchor's path is the old one.
        found = own.result()
        if found is None:
            if interruption.reached():  # in the last moments of the one before
                raise Interrupted(
                    f"{whole.path}: stopped before generation {number}; the same command goes on",
                    interruption.signal,
                )
            found = train.run(
                _of_generation(config, whole, number),
                own.path,
                progress=progress,
                interruption=interruption,
            )
        results.append(found)
    return results


def _of_generation(config: ConfigDict, whole: Workdir, number: int) -> ConfigDict:
    own = copy.deepcopy(config)
    own.generation = config.generation + number
    if number == 0:
        own.role.name = "alone"
    else:
        own.role.trikd.anchor = str(whole.generation(number - 1).path)
    return own
