"""From a configuration to values: where the names of the three axes become functions."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from tgeo_jax import (
    checkpoint,
    distill,
    evaluate,
    geometry,
    losses,
    models,
    optimizers,
    parallel,
    ratios,
    roles,
    workdir,
)
from tgeo_jax import config as configs
from tgeo_jax.data import resident, sources
from tgeo_jax.errors import CheckpointError, ConfigError, DataError
from tgeo_jax.state import Batch, Teacher


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything a run is made of, before anything is compiled.

    Attributes:
        config: the checked configuration.
        dataset: in host memory.
        method: what is trained.
        teacher_module: None for role `alone`.
        teacher_variables: None for role `alone`.
        mesh: the devices.
        steps_per_epoch: full training batches in an epoch.
    """

    config: ConfigDict
    dataset: sources.Dataset
    method: distill.Distillation
    teacher_module: nn.Module | None
    teacher_variables: dict | None
    mesh: Mesh
    steps_per_epoch: int


def assemble(config: ConfigDict) -> Run:
    """Builds a run from its configuration.

    Args:
        config: from `config.default()` or a file in configs/.

    Returns:
        The run; nothing is compiled yet.

    Raises:
        ConfigError: a field that is wrong by itself or for this dataset or machine.
        DataError: a dataset that is not prepared or holds values that are not finite.
        CheckpointError: a teacher that is missing, of another architecture, or trained on what
            this run holds out.

    Examples:
        >>> config = configs.default()
        >>> config.data.name = "digit"
        >>> config.role.name = "alone"
        >>> assemble(config)
        Traceback (most recent call last):
        ...
        tgeo_jax.errors.ConfigError: data.name='digit': unknown dataset; did you mean 'digits'?
    """
    configs.check(config)
    mesh = parallel.make_mesh(config.mesh.seed)
    dataset = sources.load(
        config.data.name,
        config.data.dir,
        validation_fraction=config.data.validation_fraction,
        split_seed=config.data.split_seed,
        label_noise=config.data.label_noise,
    )
    _check_images(config, dataset)
    _check_batch(mesh, "data.batch_size", config.data.batch_size, dataset.train)
    steps_per_epoch = len(dataset.train) // config.data.batch_size
    teacher_module = teacher_variables = None
    if config.role.name != "alone":
        options = configs.options_of(config.teacher)
        teacher_module = models.build(config.teacher.name, dataset.num_classes, **options)
        teacher_variables = _teacher_variables(config, teacher_module, dataset)
    method = _method(config, dataset, teacher_module, steps_per_epoch)
    if _uses_validation_batches(config, method):
        _check_batch(mesh, "meta.batch_size", config.meta.batch_size, dataset.validation)
    return Run(config, dataset, method, teacher_module, teacher_variables, mesh, steps_per_epoch)


def teacher_context(run: Run, teacher: evaluate.Evaluator | None, train: Batch) -> Teacher:
    """The teacher with its mean prediction for each class, from one clean pass over the data.

    Args:
        run: what is trained.
        teacher: evaluates the teacher; None for role `alone`.
        train: the training split, with the labels that the student sees.

    Returns:
        Variables and class means [K, K]; both None for role `alone`.

    References:
        TGeo-KD (arXiv 2312.15112), T-bar: the teacher is frozen, so once is enough.
    """
    if teacher is None:
        return Teacher(None, None)
    logits_NxK = teacher.logits(run.teacher_variables, train)
    means_KxK = geometry.class_mean_predictions(
        jax.nn.softmax(logits_NxK), jnp.asarray(train.labels_B), run.dataset.num_classes
    )
    return Teacher(run.teacher_variables, means_KxK)


def _method(
    config: ConfigDict,
    dataset: sources.Dataset,
    teacher_module: nn.Module | None,
    steps_per_epoch: int,
) -> distill.Distillation:
    epochs = config.train.epochs
    clean_view = resident.normalise(dataset.mean, dataset.std)
    return distill.Distillation(
        student=models.build(
            config.student.name, dataset.num_classes, **configs.options_of(config.student)
        ),
        num_classes=dataset.num_classes,
        role=roles.ROLES[config.role.name](teacher_module),
        soft_loss=losses.soft_loss(config.loss.name, **configs.options_of(config.loss)),
        ratio=ratios.RATIOS[config.ratio.name](**configs.options_of(config.ratio)),
        optimizer=optimizers.build(config.optimizer, steps_per_epoch, epochs),
        fusion_optimizer=optimizers.build(
            config.meta.optimizer, steps_per_epoch, epochs, config.meta.every
        ),
        total_steps=steps_per_epoch * epochs,
        training_view=resident.augment(
            clean_view, crop_padding=config.data.crop_padding, flip=config.data.flip
        ),
        clean_view=clean_view,
        order=config.meta.order,
        meta_every=config.meta.every,
        estimator=config.meta.estimator,
    )


def _teacher_variables(config: ConfigDict, module: nn.Module, dataset: sources.Dataset) -> dict:
    folder = workdir.trained(config.teacher.workdir, "teacher.workdir")
    # Another split would have taught the teacher what this run holds out.
    for field in ("name", "validation_fraction", "split_seed"):
        there, here = folder.config()["data"][field], config.data[field]
        if there != here:
            raise CheckpointError(
                f"teacher.workdir={config.teacher.workdir!r}: that teacher was trained with "
                f"data.{field}={there!r}, this run has {here!r}; they must agree, so that the "
                "held-out examples are the same"
            )
    variables = checkpoint.load_network(folder.checkpoints, config.teacher.which)
    example = dataset.train.images[:1].astype(np.float32)
    expected = jax.eval_shape(module.init, jax.random.key(0), example)
    checkpoint.check_fits(
        {name: expected.get(name, {}) for name in variables},
        variables,
        f"teacher.workdir={config.teacher.workdir!r}",
    )
    return variables


def _uses_validation_batches(config: ConfigDict, method: distill.Distillation) -> bool:
    if config.role.name == "alone" or config.meta.order == "prequential":
        return False
    meta_params = jax.eval_shape(
        lambda key: method.ratio.init(key, method.num_classes), jax.random.key(0)
    )
    return bool(jax.tree.leaves(meta_params))


def _check_batch(mesh: Mesh, field: str, batch_size: int, split: sources.Split) -> None:
    parallel.check_batch(mesh, field, batch_size)
    if batch_size > len(split):
        raise ConfigError(
            f"{field}={batch_size}: larger than its split of {len(split)} examples; use "
            f"{len(split)} or less"
        )


def _check_images(config: ConfigDict, dataset: sources.Dataset) -> None:
    for split_name in ("train", "validation", "test"):
        images = getattr(dataset, split_name).images
        if images.dtype != np.uint8 and not np.isfinite(images).all():
            first = int(np.argmin(np.isfinite(images).reshape(len(images), -1).all(1)))
            raise DataError(
                f"data.name={config.data.name!r}: example {first} of the {split_name} split holds "
                "NaN or infinite values; repair or drop it"
            )
