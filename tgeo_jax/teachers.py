"""The trained networks that a run needs: teachers, anchors, their logits and class means."""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from tgeo_jax import (
    checkpoint,
    choices,
    evaluate,
    geometry,
    models,
    networks,
    origins,
    randomness,
    roles,
    storage,
    workdir,
)
from tgeo_jax import config as configs
from tgeo_jax.data import fingerprints, logits_cache, sources, streaming
from tgeo_jax.errors import CheckpointError, ConfigError
from tgeo_jax.method import Distillation
from tgeo_jax.state import Batch, Teacher

Array = jax.Array
PyTree = Any
Dataset = sources.Dataset | streaming.StreamedDataset
_DAMAGED = "its config.json or result.json is damaged, or of another program"


@dataclasses.dataclass(frozen=True)
class Trained:
    """A teacher's module and, unless it starts fresh, its variables.

    Attributes:
        module: gives logits [B, K], or [M, B, K] for several teachers.
        variables: None where there is nothing trained.
        several: whether the module is an ensemble.
    """

    module: nn.Module
    variables: PyTree | None
    several: bool = False

    def predict(self, clean_view: Any) -> evaluate.Predict:
        """Evaluation-mode logits on raw images, of several teachers those of their mean."""
        of_module = evaluate.predictor(self.module, clean_view)
        if not self.several:
            return of_module
        return lambda variables, images: roles.mean_prediction(of_module(variables, images))


def load(config: ConfigDict, dataset: Dataset) -> Trained | None:
    """The teacher, or teachers, that a configuration names; None for role `alone`.

    Args:
        config: checked.
        dataset: what the run trains on.

    Returns:
        Module and variables.

    Raises:
        CheckpointError: a teacher that is missing, of another architecture, or trained on what
            this run holds out.
    """
    if config.role.name == "alone":
        return None
    if config.role.name == "several":
        parts = [
            _trained(config, dataset, path, f"role.several.workdirs={path!r}", None)
            for path in config.role.several.workdirs
        ]
        variables: dict[str, Any] = {}
        for index, part in enumerate(parts):
            for collection, values in part.variables.items():  # type: ignore[union-attr]
                variables.setdefault(collection, {})[f"models_{index}"] = values
        ensemble = roles.Ensemble(tuple(part.module for part in parts))
        return Trained(ensemble, variables, several=True)
    # Nothing is kept for the backward pass of a teacher that has none. One that trains along has,
    # and may be without blocks: the switch is the student's.
    trains_along = choices.any_role(config.role).peer is not None
    try:
        module = networks.build(
            config.teacher.name,
            dataset,
            precision=config.precision,
            remat=config.remat and trains_along and models.has_blocks(config.teacher.name),
            **configs.options_of(config.teacher),
        )
    except ValueError as error:
        raise ConfigError(f"teacher.name={config.teacher.name!r}: {error}") from error
    needs_trained = choices.role(config.role, module).needs_trained
    if not needs_trained:
        return Trained(module, None)
    path = config.teacher.workdir
    return _trained(config, dataset, path, f"teacher.workdir={path!r}", module)


def anchors(config: ConfigDict, student: nn.Module, dataset: Dataset, seeds: int) -> PyTree | None:
    """The anchor of every seed, leaves [seeds, ...]; None where the role names none.

    A chain of runs has as many anchors as seeds, and each seed keeps its own; another run's first
    student anchors all of them.
    """
    if config.role.name != "trikd" or not config.role.trikd.anchor:
        return None
    path = config.role.trikd.anchor
    field = f"role.trikd.anchor={path!r}"
    folder = _folder(config, dataset, path, "role.trikd.anchor", field)
    there = folder.config()
    own = (there.get("seed"), there.get("seeds")) == (config.seed, config.seeds)
    found = [
        checkpoint.load_network(folder.checkpoints, "last", index if own else 0)
        for index in range(seeds)
    ]
    _check_fits(student, found[0], dataset, field)
    return jax.tree.map(lambda *leaves: np.stack(leaves), *found)


def context(
    method: Distillation,
    trained: Trained | None,
    train: Batch | evaluate.Sweep,
    num_classes: int,
    batch_size: int,
    mesh: Mesh | None = None,
) -> Teacher:
    """The frozen teachers with their mean prediction for each class, from one clean pass.

    Args:
        method: what is trained.
        trained: from `load`.
        train: the training split, with the labels that the student sees.
        num_classes: K.
        batch_size: of the pass.
        mesh: whose devices share it.

    Returns:
        Variables and class means, [K, K] or one for each teacher that has its own ratio; both None
        where no teacher is frozen, the means also where the ratio does not look at them.

    References:
        TGeo-KD (arXiv 2312.15112), T-bar: the teacher is frozen, so once is enough.
    """
    if trained is None or method.role.peer is not None:
        return Teacher(None, None)
    # Where logits are stored, the step does not need the network.
    variables = None if method.role.cached is not None else trained.variables
    if not method.ratio.reads_class_means:
        return Teacher(variables, None)
    predict = trained.predict(method.clean_view)
    if method.role.num_teachers:
        predict = evaluate.predictor(trained.module, method.clean_view)
    asked = evaluate.Evaluator(predict, batch_size, seeds=False, mesh=mesh)
    if not isinstance(train, Batch):
        means = _streamed_means(asked, trained.variables, train, num_classes)
    else:
        logits = asked.logits(trained.variables, train)
        labels_N = jnp.asarray(np.asarray(train.labels_B))  # of this process alone
        each = [
            geometry.class_mean_predictions(jax.nn.softmax(one), labels_N, num_classes)
            for one in (logits if logits.ndim == 3 else logits[None])
        ]
        means = jnp.stack(each) if method.role.num_teachers else each[0]
    return Teacher(variables, means)


def _streamed_means(
    asked: evaluate.Evaluator, variables: PyTree, train: evaluate.Sweep, num_classes: int
) -> Array:
    """As `geometry.class_mean_predictions`, summed batch by batch: nobody keeps all logits."""
    sums: Any = 0.0
    counts = np.zeros(num_classes)
    for logits, labels in asked.batches_of_logits(variables, train):
        probs = np.asarray(jax.nn.softmax(logits), np.float64)
        of_class = np.eye(num_classes)[labels]  # [B, K]
        sums += np.einsum("bc,...bk->...ck", of_class, probs)
        counts += of_class.sum(0)
    means = sums / np.maximum(counts, 1)[:, None]
    means = np.where((counts > 0)[:, None], means, 1 / num_classes)
    return jnp.asarray(means, jnp.float32)


def with_logits(
    config: ConfigDict,
    method: Distillation,
    trained: Trained,
    dataset: sources.Dataset,
) -> tuple[np.ndarray, np.ndarray]:
    """Stored teacher logits of the training and the validation split, [N, V, K] and [N, 1, K].

    They are computed for all examples of both and kept beside the dataset; another held-out split
    of the same teacher's would find them too.

    Raises:
        DataError: stored logits of another teacher, dataset or augmentation.
    """
    role = method.role.cached
    assert role is not None
    parts = (dataset.train, dataset.validation)
    ids = np.concatenate([part.ids for part in parts])
    ids, first = np.unique(ids, return_index=True)  # oversampled ones occur several times
    images = np.concatenate([part.images for part in parts])[first]
    augmentation = {
        "seed": role.augmentation_seed,
        **{name: config.data[name] for name in _augmentations(config)},
    }
    header = {
        "teacher": fingerprints.of(trained.variables),
        "dataset": fingerprints.of(images),
        "normalisation": [list(dataset.mean), list(dataset.std)],
        "views": role.views,
        "augmentation": augmentation if role.views else None,
    }
    if config.precision != "float32":
        header["precision"] = config.precision

    def compute() -> np.ndarray:
        return _all_views(method, trained, images, ids, config.data.eval_batch_size)

    found = logits_cache.load_or_compute(_cache_path(config), header, compute)
    train, validation = (found[np.searchsorted(ids, part.ids)] for part in parts)
    train = train[:, 1:] if role.views else train[:, :1]
    return train, validation[:, :1]


def _augmentations(config: ConfigDict) -> list[str]:
    """The fields that say how images are augmented; the later ones only where they are used."""
    used = ["crop_padding", "flip"]
    if config.data.cutout:
        used.append("cutout")
    if config.data.randaugment_layers:
        used += ["randaugment_layers", "randaugment_magnitude"]
    return used


def _all_views(
    method: Distillation,
    trained: Trained,
    images: np.ndarray,
    ids: np.ndarray,
    batch_size: int,
) -> np.ndarray:
    """Logits [N, 1 + V, K] of the clean images and of every augmented view."""
    role = method.role.cached
    assert role is not None
    module = trained.module

    def augmented(packed: tuple, images_BxHxWxC: jax.Array) -> jax.Array:
        variables, view, ids_B = packed
        keys_B = randomness.example_keys(role.augmentation_seed, view, ids_B)
        inputs = method.training_view(keys_B, images_BxHxWxC)
        logits_BxK: Any = module.apply(variables, inputs, train=False)
        return logits_BxK

    labels = np.zeros(len(images), np.int32)
    clean = evaluate.Evaluator(trained.predict(method.clean_view), batch_size, seeds=False)
    views = [clean.logits(trained.variables, Batch(images, labels))]  # type: ignore[arg-type]
    run = jax.jit(augmented)
    for view in range(role.views):
        parts = [
            np.asarray(run((trained.variables, view, ids[part]), images[part]))
            for part in (slice(s, s + batch_size) for s in range(0, len(images), batch_size))
        ]
        views.append(np.concatenate(parts))
    return np.stack(views, axis=1)


def _cache_path(config: ConfigDict) -> pathlib.Path:
    """Named after the teacher's folder, so that a teacher trained anew is found to be another."""
    folder = storage.absolute(storage.path(config.teacher.workdir, "teacher.workdir"))
    mark = hashlib.sha256(str(folder).encode()).hexdigest()[:8]
    cached = config.role.cached
    name = cached.name or f"{folder.name}-{mark}-{config.teacher.which}"
    if cached.views and not cached.name:
        name += f"-{cached.views}x{cached.augmentation_seed}"
        name += f"-crop{config.data.crop_padding}" + "-flip" * config.data.flip
        name += "".join(f"-{f}{config.data[f]:g}" for f in _augmentations(config)[2:])
    if not cached.name and config.precision != "float32":
        name += f"-{config.precision}"
    if not cached.name and (config.data.fraction < 1 or config.data.imbalance > 1):
        kept = [f"{config.data[f]:g}" for f in ("fraction", "imbalance", "validation_fraction")]
        name += f"-of-{'-'.join(kept)}-{config.data.split_seed}"
    if not cached.name and config.data.part != "all":
        name += f"-{config.data.part}-{config.data.teacher_fraction:g}-{config.data.split_seed}"
    if not cached.name and config.data.min_count > 1:
        name += f"-min{config.data.min_count}"
    data_dir = sources.builder(config.data.name, config.data.dir).data_dir
    return pathlib.Path(data_dir) / "teacher_logits" / f"{name}.array_record"


def _trained(
    config: ConfigDict, dataset: Dataset, path: str, field: str, module: nn.Module | None
) -> Trained:
    """The student of a finished run; its own configuration says what it is if `module` does not."""
    folder = _folder(config, dataset, path, field.partition("=")[0], field)
    if module is None:
        try:
            there = folder.config()["student"]
            name, options = there["name"], there.get(there["name"], {})
            module = networks.build(name, dataset, precision=config.precision, **options)
        except ValueError as error:  # what a network says of this dataset
            raise CheckpointError(f"{field}: {error}") from error
        except (AttributeError, LookupError, TypeError) as error:
            raise CheckpointError(f"{field}: {_DAMAGED} ({error!r})") from error
    variables = checkpoint.load_network(folder.checkpoints, config.teacher.which)
    _check_fits(module, variables, dataset, field)
    return Trained(module, variables)


def _folder(
    config: ConfigDict, dataset: Dataset, path: str, role: str, field: str
) -> workdir.Workdir:
    folder = workdir.trained(path, role, origins.how_to_get(config, role, path))
    try:
        origins.check_agrees(config, dataset, folder, field)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"{field}: {_DAMAGED} ({error!r})") from error
    return folder


def _check_fits(module: nn.Module, variables: PyTree, dataset: Dataset, field: str) -> None:
    try:
        expected = jax.eval_shape(module.init, jax.random.key(0), networks.example(dataset))
    except (OverflowError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ConfigError(f"{field}: {error}") from error
    checkpoint.check_fits({name: expected.get(name, {}) for name in variables}, variables, field)
