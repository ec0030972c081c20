"""From a configuration to values: where the names of the three axes become functions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence, Sized
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from tgeo_jax import (
    choices,
    distill,
    losses,
    margins,
    memory,
    networks,
    optimizers,
    parallel,
    selection,
    teachers,
)
from tgeo_jax import config as configs
from tgeo_jax.data import row_streaming, sources, streaming, tables, views, workers
from tgeo_jax.errors import ConfigError, DataError
from tgeo_jax.models import convolution

Dataset = sources.Dataset | streaming.StreamedDataset


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything a run is made of, before anything is compiled.

    Attributes:
        config: the checked configuration.
        dataset: in host memory, or read as it is needed.
        method: what is trained.
        teacher: None for role `alone`.
        anchor: variables of every seed's anchor, [seeds, ...]; None where the role has none.
        mesh: the devices.
        steps_per_epoch: full training batches in an epoch.
        loop_free: whether steps and seeds come one by one, because a CPU convolves; see `dispatch`.
    """

    config: ConfigDict
    dataset: Dataset
    method: distill.Distillation
    teacher: teachers.Trained | None
    anchor: Any
    mesh: Mesh
    steps_per_epoch: int
    loop_free: bool


def assemble(config: ConfigDict, *, anchor_comes_later: bool = False) -> Run:
    """Builds a run from its configuration.

    Args:
        config: from `config.default()` or a file in configs/.
        anchor_comes_later: whether this only checks what can be known before the anchor is trained.

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
    mesh = parallel.make_mesh(config.mesh.seed, model_devices=config.mesh.model)
    replicas = config.mesh.replicas or parallel.batch_parts(mesh)
    dataset = _dataset(config)
    _check_images(config, dataset)
    known = None if isinstance(dataset, streaming.StreamedDataset) else dataset.validation.labels
    selection.check(config.train.select_by, known, dataset.num_classes)
    _check_batch(mesh, "data.batch_size", config.data.batch_size, replicas, dataset.train)
    steps_per_epoch = len(dataset.train) // config.data.batch_size
    _check_steps(config, steps_per_epoch)
    for name in config.loss.name.split("+"):
        loss = losses.soft_loss(name, **config.loss[name].to_dict())
        choices.check_loss(name, loss, dataset.num_classes)
    teacher = teachers.load(config, dataset)
    method = _method(config, dataset, teacher, steps_per_epoch, replicas)
    _check_network("student", method.student, config, mesh, dataset)
    if method.role.peer is not None:
        _check_network("teacher", method.role.peer, config, mesh, dataset)
    _check_fusion(config, method, mesh)
    anchor = teachers.anchors(config, method.student, dataset, config.seeds)
    if method.role.anchored and anchor is None and not anchor_comes_later:
        raise ConfigError(
            "role.trikd.anchor='': a single run needs a trained anchor; name the workdir of a run "
            "of the student's architecture, or let experiments.main train the whole chain"
        )
    if method.meta_learned and method.order != "prequential":
        _check_batch(mesh, "meta.batch_size", config.meta.batch_size, replicas, dataset.validation)
    if isinstance(dataset, streaming.StreamedDataset):
        streams = 1 + (method.meta_learned and not method.prequential)
        rows = max(config.data.batch_size, config.meta.batch_size)
        workers.check_shared_memory(streams * config.data.workers, rows * dataset.example.nbytes)
    in_step = [method.student, method.role.peer]
    if method.role.teach is not None and teacher is not None:
        in_step.append(teacher.module)
    loop_free = _wants_no_loops([m for m in in_step if m is not None], mesh, dataset)
    return Run(config, dataset, method, teacher, anchor, mesh, steps_per_epoch, loop_free)


def _dataset(config: ConfigDict) -> Dataset:
    data = config.data
    common = {
        name: data[name]
        for name in ("validation_fraction", "split_seed", "fraction", "mean", "std")
    }
    if data.pipeline == "stream" and data.name in tables.LAYOUTS:
        del common["mean"], common["std"]  # ids have no scale
        own = {name: data[name] for name in ("part", "teacher_fraction", "hash_buckets", "workers")}
        return row_streaming.load(data.name, data.dir, **common, **own)
    if data.pipeline == "stream":
        own = {name: data[name] for name in ("image_size", "workers", "max_corrupt")}
        return streaming.load(data.name, data.dir, **common, **own)
    if data.name in sources.TOO_LARGE:
        raise ConfigError(
            f"data.name={data.name!r}: does not fit in memory; set data.pipeline='stream'"
        )
    own = {
        name: data[name]
        for name in (
            *("label_noise", "imbalance", "outliers"),
            *("part", "teacher_fraction", "oversample", "min_count"),
        )
    }
    return sources.load(data.name, data.dir, **common, **own)


def _method(
    config: ConfigDict,
    dataset: Dataset,
    teacher: teachers.Trained | None,
    steps_per_epoch: int,
    replicas: int,
) -> distill.Distillation:
    clean_view = views.clean(dataset)
    drops = config.optimizer.drop_epochs if config.optimizer.schedule == "step" else ()
    student = _student(config, dataset)
    try:
        role = choices.role(config.role, None if teacher is None else teacher.module)
        return distill.Distillation(
            student=student,
            num_classes=dataset.num_classes,
            role=role,
            soft_loss=choices.soft_loss(config.loss),
            ratio=choices.ratio(config.ratio),
            optimizer=optimizers.build(config.optimizer, steps_per_epoch, config.train.epochs),
            fusion_optimizer=_fusion_optimizer(config, steps_per_epoch),
            steps_per_epoch=steps_per_epoch,
            num_epochs=config.train.epochs,
            training_view=views.augment(
                clean_view,
                crop_padding=config.data.crop_padding,
                flip=config.data.flip,
                cutout=config.data.cutout,
                randaugment_layers=config.data.randaugment_layers,
                randaugment_magnitude=config.data.randaugment_magnitude,
            ),
            clean_view=clean_view,
            order=config.meta.order,
            meta_every=config.meta.every,
            estimator=config.meta.estimator,
            outer_soft=config.meta.outer_soft,
            drop_steps=tuple(epoch * steps_per_epoch for epoch in drops),
            replicas=replicas,
            lazy_rows=config.optimizer.lazy_rows,
            hard_loss=_hard_loss(config, student),
            teacher_hard_loss=_hard_loss(config, role.peer or student),
        )
    except _IMPOSSIBLE as error:  # choices that do not go together
        raise ConfigError(str(error)) from error


def _hard_loss(config: ConfigDict, module: Any) -> margins.HardLoss:
    return choices.hard_loss(config.loss, getattr(module, "soft_scale", None))


def _student(config: ConfigDict, dataset: Dataset) -> Any:
    try:
        return networks.build(
            config.student.name,
            dataset,
            precision=config.precision,
            remat=config.remat,
            **configs.options_of(config.student),
        )
    except _IMPOSSIBLE as error:  # whatever a network says
        raise ConfigError(f"student.name={config.student.name!r}: {error}") from error


def _fusion_optimizer(config: ConfigDict, steps_per_epoch: int) -> optax.GradientTransformation:
    meta = config.meta
    steps = meta.every * meta.accumulate
    optimizer = optimizers.build(meta.optimizer, steps_per_epoch, config.train.epochs, steps)
    if meta.accumulate == 1:
        return optimizer
    return optax.MultiSteps(optimizer, meta.accumulate).gradient_transformation()


def _check_steps(config: ConfigDict, steps_per_epoch: int) -> None:
    """Steps are counted in 32 bits."""
    epochs = {"train.epochs": config.train.epochs}
    for path in ("optimizer", "meta.optimizer"):
        section = config.optimizer if path == "optimizer" else config.meta.optimizer
        if section.schedule == "step" and section.drop_epochs:
            epochs[f"{path}.drop_epochs"] = section.drop_epochs[-1]
    for field, value in epochs.items():
        if value * steps_per_epoch >= 2**31:
            raise ConfigError(
                f"{field}={value}: must stay below {math.ceil(2**31 / steps_per_epoch)}, since an "
                f"epoch has {steps_per_epoch} steps and 2**31 steps cannot be counted"
            )


# What a network of impossible size says, depending on where its shape is used first.
_IMPOSSIBLE = (ValueError, TypeError, ZeroDivisionError, OverflowError)


def _check_network(
    which: str, module: Any, config: ConfigDict, mesh: Mesh, dataset: Dataset
) -> None:
    field = f"{which}.name={config[which].name!r}"
    try:
        found = jax.eval_shape(module.init, jax.random.key(0), networks.example(dataset))
    except _IMPOSSIBLE as error:  # whatever a network says
        raise ConfigError(f"{field}: does not fit this dataset: {error}") from error
    _check_memory(field, found, config, mesh)


def _check_fusion(config: ConfigDict, method: distill.Distillation, mesh: Mesh) -> None:
    if method.meta_learned:
        field = f"ratio.name={config.ratio.name!r}"
        init = method.fusion_ratio.init
        found = jax.eval_shape(lambda key: init(key, method.num_classes), jax.random.key(0))
        _check_memory(field, found, config, mesh)


def _check_memory(field: str, variables: Any, config: ConfigDict, mesh: Mesh) -> None:
    """What could not even be initialised is refused here; see `memory` for what a step needs."""
    available = memory.free(mesh.local_devices[0])
    seeds = config.seeds // config.mesh.seed
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((config.seeds, *leaf.shape), np.float32), variables
    )
    wanted = parallel.bytes_on_one(parallel.table_shardings(mesh, shapes), shapes)
    if available is not None and wanted > available:
        raise ConfigError(
            f"{field}: its parameters need {wanted / 1e6:,.1f} MB for seeds={seeds} on a device, "
            f"and {available / 1e6:,.1f} MB are free; use a smaller network or fewer seeds"
        )


def _wants_no_loops(modules: Sequence[Any], mesh: Mesh, dataset: Dataset) -> bool:
    if mesh.devices.flat[0].platform != "cpu":
        return False
    key, images = jax.random.key(0), networks.example(dataset)
    return any(convolution.has_convolutions(m.init, key, images) for m in modules)


def _check_batch(mesh: Mesh, field: str, batch_size: int, replicas: int, split: Sized) -> None:
    parallel.check_batch(mesh, field, batch_size)
    if batch_size % replicas:
        raise ConfigError(
            f"mesh.replicas={replicas}: must divide {field}={batch_size}, so that all parts of a "
            "batch are equal"
        )
    if batch_size > len(split):
        raise ConfigError(
            f"{field}={batch_size}: larger than its split of {len(split)} examples; use "
            f"{len(split)} or less"
        )


def _check_images(config: ConfigDict, dataset: Dataset) -> None:
    padding = config.data.crop_padding
    if padding > (side := min(dataset.example.shape[1:3])):
        raise ConfigError(
            f"data.crop_padding={padding}: must be at most the side of an image, {side}, or crops "
            "would show nothing of it"
        )
    if isinstance(dataset, streaming.StreamedDataset):
        return  # they are integers
    splits = {name: getattr(dataset, name) for name in ("train", "validation", "test")}
    for split_name, split in {**splits, **dataset.extra}.items():
        images = split.images
        if images.dtype.kind == "f" and not np.isfinite(images).all():
            first = int(np.argmin(np.isfinite(images).reshape(len(images), -1).all(1)))
            raise DataError(
                f"data.name={config.data.name!r}: example {first} of the {split_name} split holds "
                "NaN or infinite values; repair or drop it"
            )
