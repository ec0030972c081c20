"""Where trained networks come from: how to get one that is missing, and those trained elsewhere."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from tgeo_jax import checkpoint, convert, models, storage, workdir
from tgeo_jax.data import options, sources, streaming, tables
from tgeo_jax.errors import CheckpointError, ConfigError

PyTree = Any
Dataset = sources.Dataset | streaming.StreamedDataset
# What a network's run and the one that uses it must agree in, and what was so before it was said.
_AGREE: dict[str, Any] = {
    "name": None,
    "validation_fraction": None,
    "split_seed": None,
    "pipeline": "resident",  # a stream's split is not stratified
    "min_count": 1,  # of a categorical table, what an id means
    "hash_buckets": options.HASH_BUCKETS,  # likewise, of a streamed one
}
_WHY, _SAME_SPLIT = (
    {"min_count": "ids mean", "hash_buckets": "ids mean"},
    "the held-out examples are",
)
# What the configs of teachers say, by dataset; what differs must be said on the command line.
_USUAL: dict[str, dict[str, Any]] = {
    "digits": {},
    "cifar10": dict(zip(("mean", "std"), sources.CIFAR10_NORMALISATION, strict=True)),
    "cifar100": dict(zip(("mean", "std"), sources.CIFAR100_NORMALISATION, strict=True)),
    "imagenet2012": {"validation_fraction": 0.02, "pipeline": "stream"},
}
# The config of a dataset's teacher, a network named {0}, where it is not in configs/teachers/.
_CONFIGS = {
    "digits": "configs/digits/teacher.py",
    "orl_faces": "configs/faces/orl.py:teacher",
    "face_folder": "configs/faces/casia.py:{0}-{0},plain",
}
_OTHERWISE = {
    "dir": "",
    "validation_fraction": 0.1,
    "split_seed": 0,
    "pipeline": "resident",
    "mean": (),
    "std": (),
    "imbalance": 1.0,
    "part": "all",
    "teacher_fraction": 0.7,
    "min_count": 1,
    "hash_buckets": options.HASH_BUCKETS,
}


def how_to_get(config: ConfigDict, role: str, path: str) -> str:
    """How a user comes by the trained network that a configuration names.

    Args:
        config: of the run that needs it.
        role: the field that names it: `teacher.workdir`, `role.several.workdirs` or
            `role.trikd.anchor`.
        path: its value.

    Examples:
        >>> from tgeo_jax.config import default
        >>> print(how_to_get(default(), "teacher.workdir", "runs/teacher"))
        train one with
          python -m experiments.main --config=configs/digits/teacher.py --workdir=runs/teacher
    """
    if role == "role.trikd.anchor":
        return (
            "train this run's student alone, by the same command with\n"
            f"  --config.role.name=alone --workdir={path}"
        )
    name = "NAME" if role == "role.several.workdirs" else config.teacher.name
    ways = [f"train one with\n  {_training(config, name)} --workdir={path}"]
    own = config.data.name == "digits" or config.data.name in tables.LAYOUTS
    if name in (*models.SMALL, *models.LARGE, "NAME") and not own:
        ways.append(
            f"convert a PyTorch checkpoint{_download(config, name)} with\n"
            f"  python -m experiments.convert --name={name} --checkpoint=FILE"
            f"{_conversion(config)} --workdir={path}"
        )
    return "\nor ".join(ways)


def _training(config: ConfigDict, name: str) -> str:
    data, file = config.data.name, f"configs/teachers/{config.data.name}.py:{name}"
    changes: dict[str, Any] = {}
    if data in _CONFIGS:
        file = _CONFIGS[data].format(name)
    elif data in tables.LAYOUTS:
        file = _config_of_table(data, name)
    elif name not in (*models.SMALL, *models.LARGE, "NAME"):
        file = file.partition(":")[0]
        changes["student.name"] = name
    for field, otherwise in _OTHERWISE.items():
        value = config.data[field]
        value = tuple(value) if isinstance(value, tuple | list) else value
        if field == "part" and value == "student":
            value = "teacher"
        if value != _USUAL.get(data, {}).get(field, otherwise):
            changes[f"data.{field}"] = f'"{value}"' if isinstance(value, tuple) else value
    if data in tables.LAYOUTS and config.data.pipeline == "stream":
        changes["data.oversample"] = False  # which those configs set, and streams refuse
    told = "".join(f" --config.{field}={value}" for field, value in changes.items())
    return f"python -m experiments.main --config={file}{told}"


def _config_of_table(data: str, name: str) -> str:
    if tables.LAYOUTS[data].kind == "categorical":
        return f"configs/ctr/clicks.py:{data},teacher"
    which = "row_encoder,teacher" if name == "row_encoder" else "teacher"
    family, _, variant = data.partition("attack_")
    if variant:
        return f"configs/attack/{family}attack.py:{variant},{which}"
    return f"configs/attack/{data}.py:{which}"


def _download(config: ConfigDict, name: str) -> str:
    classes = {"cifar100": models.SMALL, "imagenet2012": models.LARGE}.get(config.data.name, ())
    return f" ({convert.DOWNLOADS[name]})" if name in convert.DOWNLOADS and name in classes else ""


def _conversion(config: ConfigDict) -> str:
    if config.data.name != "cifar10":
        return ""
    mean, std = (",".join(map(str, values)) for values in sources.CIFAR10_NORMALISATION)
    return f" --num_classes=10 --mean={mean} --std={std}"


def check_agrees(config: ConfigDict, dataset: Dataset, folder: workdir.Workdir, field: str) -> None:
    """Checks that a trained network saw nothing that a run holds out, and the same input.

    Args:
        config: of the run.
        dataset: of the run.
        folder: of the network.
        field: the configuration's field that names it, with its value, for messages.

    Raises:
        CheckpointError: it was trained on another split, or with another normalisation.
    """
    there, result = folder.config(), folder.result() or {}
    if "converted" in there:
        _check_normalisation(there["converted"], dataset, field)
        return
    for name, absent in _AGREE.items():
        found, here = there["data"].get(name, absent), config.data[name]
        if found != here:
            raise CheckpointError(
                f"{field}: that network was trained with data.{name}={found!r}, this run has "
                f"{here!r}; they must agree, so that {_WHY.get(name, _SAME_SPLIT)} the same"
            )
    if "mean" in result.get("dataset", {}):  # runs of before this was written had the default
        _check_normalisation(result["dataset"], dataset, field)


def _check_normalisation(there: dict[str, Any], dataset: Dataset, field: str) -> None:
    for name, here in (("mean", dataset.mean), ("std", dataset.std)):
        found = tuple(there[name])
        if len(found) != len(here) or not np.allclose(found, here, atol=5e-4):
            raise CheckpointError(
                f"{field}: that network's inputs are normalised by {name} {found}, this run's by "
                f"{tuple(here)}; set data.{name} so that both see the same input (or, of a "
                f"converted checkpoint, convert it again with --{name})"
            )


def converted(config: ConfigDict) -> list[dict[str, Any]]:
    """What is known of those of a run's frozen teachers that were trained elsewhere."""
    paths = [config.teacher.workdir]
    if config.role.name == "several":
        paths = list(config.role.several.workdirs)
    found = (workdir.Workdir(storage.path(path)).config().get("converted") for path in paths)
    return [{name: about[name] for name in ("file", "sha256")} for about in found if about]


def save_converted(
    folder: storage.Path,
    name: str,
    variables: PyTree,
    *,
    source: pathlib.Path,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> None:
    """Makes a folder that `teacher.workdir` can name of a network trained elsewhere.

    Args:
        folder: to be made; it appears when it is whole.
        name: of the network, a key of `models.MODELS`.
        variables: from `convert.from_torch`.
        source: the file that they came from; its name and SHA-256 are kept.
        mean: of its input normalisation, by channel.
        std: likewise.

    Raises:
        ConfigError: the folder exists already.
    """
    with storage.told_plainly(folder, "read"):
        taken = folder.is_dir() and any(folder.iterdir())
    if taken:
        raise ConfigError(f"--workdir={folder}: exists already; name another folder")
    storage.make_folder(folder.parent)
    half_made = workdir.Workdir(folder.with_name(f".{folder.name}.{os.getpid()}"))
    checkpoint.save_network(half_made.checkpoints, variables)
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    converted = {"file": source.name, "sha256": digest, "mean": list(mean), "std": list(std)}
    described = {"student": {"name": name}, "converted": converted}
    text = json.dumps(described, indent=2) + "\n"
    storage.write_atomically(half_made.path / "config.json", text)
    half_made.write_result({"converted": converted})
    storage.move(half_made.path, folder)
