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
from ml_collections import ConfigDict

from tgeo_jax import checkpoint, choices, evaluate, geometry, models, randomness, roles, workdir
from tgeo_jax import config as configs
from tgeo_jax.data import logits_cache, sources
from tgeo_jax.errors import CheckpointError, ConfigError
from tgeo_jax.method import Distillation
from tgeo_jax.state import Batch, Teacher

PyTree = Any


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


def load(config: ConfigDict, dataset: sources.Dataset) -> Trained | None:
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
    options = configs.options_of(config.teacher)
    module = models.build(config.teacher.name, dataset.num_classes, **options)
    needs_trained = choices.role(config.role, module).needs_trained
    if not needs_trained:
        return Trained(module, None)
    path = config.teacher.workdir
    return _trained(config, dataset, path, f"teacher.workdir={path!r}", module)


def anchors(
    config: ConfigDict, student: nn.Module, dataset: sources.Dataset, seeds: int
) -> PyTree | None:
    """The anchor of every seed, leaves [seeds, ...]; None where the role names none.

    A chain of runs has as many anchors as seeds, and each seed keeps its own; another run's first
    student anchors all of them.
    """
    if config.role.name != "trikd" or not config.role.trikd.anchor:
        return None
    path = config.role.trikd.anchor
    field = f"role.trikd.anchor={path!r}"
    folder = _folder(config, path, "role.trikd.anchor", field)
    there = folder.config()
    own = (there["seed"], there["seeds"]) == (config.seed, config.seeds)
    found = [
        checkpoint.load_network(folder.checkpoints, "last", index if own else 0)
        for index in range(seeds)
    ]
    _check_fits(student, found[0], dataset, field)
    return jax.tree.map(lambda *leaves: np.stack(leaves), *found)


def context(
    method: Distillation, trained: Trained | None, train: Batch, num_classes: int, batch_size: int
) -> Teacher:
    """The frozen teachers with their mean prediction for each class, from one clean pass.

    Args:
        method: what is trained.
        trained: from `load`.
        train: the training split, with the labels that the student sees.
        num_classes: K.
        batch_size: of the pass.

    Returns:
        Variables and class means, [K, K] or one for each teacher that has its own ratio; both None
        where no teacher is frozen.

    References:
        TGeo-KD (arXiv 2312.15112), T-bar: the teacher is frozen, so once is enough.
    """
    if trained is None or method.role.peer is not None:
        return Teacher(None, None)
    predict = trained.predict(method.clean_view)
    if method.role.num_teachers:
        predict = evaluate.predictor(trained.module, method.clean_view)
    logits = evaluate.Evaluator(predict, batch_size, seeds=False).logits(trained.variables, train)
    labels_N = jnp.asarray(train.labels_B)
    each = [
        geometry.class_mean_predictions(jax.nn.softmax(one), labels_N, num_classes)
        for one in (logits if logits.ndim == 3 else logits[None])
    ]
    means = jnp.stack(each) if method.role.num_teachers else each[0]
    # Where logits are stored, the step does not need the network.
    return Teacher(None if method.role.cached is not None else trained.variables, means)


def with_logits(
    config: ConfigDict,
    method: Distillation,
    trained: Trained,
    dataset: sources.Dataset,
) -> tuple[np.ndarray, np.ndarray]:
    """Stored teacher logits of the training and the validation split, [N, V, K] and [N, 1, K].

    They are computed for the whole TFDS training split and kept beside it, so that another held-out
    split of the same teacher's would find them too.

    Raises:
        DataError: stored logits of another teacher, dataset or augmentation.
    """
    role = method.role.cached
    assert role is not None
    parts = (dataset.train, dataset.validation)
    ids = np.concatenate([part.ids for part in parts])
    images = np.concatenate([part.images for part in parts])[np.argsort(ids)]
    augmentation = {
        "seed": role.augmentation_seed,
        "crop_padding": config.data.crop_padding,
        "flip": config.data.flip,
    }
    header = {
        "teacher": logits_cache.fingerprint(trained.variables),
        "dataset": logits_cache.fingerprint(images),
        "normalisation": [list(dataset.mean), list(dataset.std)],
        "views": role.views,
        "augmentation": augmentation if role.views else None,
    }

    def compute() -> np.ndarray:
        return _all_views(method, trained, images, config.data.eval_batch_size)

    found = logits_cache.load_or_compute(_cache_path(config), header, compute)
    train = found[dataset.train.ids]
    train = train[:, 1:] if role.views else train[:, :1]
    return train, found[dataset.validation.ids][:, :1]


def _all_views(
    method: Distillation, trained: Trained, images: np.ndarray, batch_size: int
) -> np.ndarray:
    """Logits [N, 1 + V, K] of the clean images and of every augmented view."""
    role = method.role.cached
    assert role is not None
    module = trained.module

    def augmented(packed: tuple, images_BxHxWxC: jax.Array) -> jax.Array:
        variables, view, first = packed
        ids_B = first + jnp.arange(images_BxHxWxC.shape[0])
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
            np.asarray(run((trained.variables, view, start), images[start : start + batch_size]))
            for start in range(0, len(images), batch_size)
        ]
        views.append(np.concatenate(parts))
    return np.stack(views, axis=1)


def _cache_path(config: ConfigDict) -> pathlib.Path:
    """Named after the teacher's folder, so that a teacher trained anew is found to be another."""
    folder = pathlib.Path(config.teacher.workdir).absolute()
    mark = hashlib.sha256(str(folder).encode()).hexdigest()[:8]
    cached = config.role.cached
    name = cached.name or f"{folder.name}-{mark}-{config.teacher.which}"
    if cached.views and not cached.name:
        name += f"-{cached.views}x{cached.augmentation_seed}"
        name += f"-crop{config.data.crop_padding}" + "-flip" * config.data.flip
    data_dir = sources.builder(config.data.name, config.data.dir).data_dir
    return pathlib.Path(data_dir) / "teacher_logits" / f"{name}.array_record"


def _trained(
    config: ConfigDict, dataset: sources.Dataset, path: str, field: str, module: nn.Module | None
) -> Trained:
    """The student of a finished run; its own configuration says what it is if `module` does not."""
    folder = _folder(config, path, field.partition("=")[0], field)
    if module is None:
        there = folder.config()["student"]
        module = models.build(there["name"], dataset.num_classes, **there[there["name"]])
    variables = checkpoint.load_network(folder.checkpoints, config.teacher.which)
    _check_fits(module, variables, dataset, field)
    return Trained(module, variables)


def _folder(config: ConfigDict, path: str, role: str, field: str) -> workdir.Workdir:
    folder = workdir.trained(path, role)
    # Another split would have taught the teacher what this run holds out.
    for name in ("name", "validation_fraction", "split_seed"):
        there, here = folder.config()["data"][name], config.data[name]
        if there != here:
            raise CheckpointError(
                f"{field}: that network was trained with data.{name}={there!r}, this run has "
                f"{here!r}; they must agree, so that the held-out examples are the same"
            )
    return folder


def _check_fits(module: nn.Module, variables: PyTree, dataset: sources.Dataset, field: str) -> None:
    example = dataset.train.images[:1].astype(np.float32)
    try:
        expected = jax.eval_shape(module.init, jax.random.key(0), example)
    except ValueError as error:
        raise ConfigError(f"{field}: {error}") from error
    checkpoint.check_fits({name: expected.get(name, {}) for name in variables}, variables, field)
