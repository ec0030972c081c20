"""What is timed: pairs of networks on random images, trained by the product's own dispatches."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measure
from tgeo_jax import config as configs
from tgeo_jax import distill, losses, models, optimizers, parallel, ratios, roles
from tgeo_jax.dispatch import Dispatcher, Resident
from tgeo_jax.models import convolution
from tgeo_jax.state import Batch, Teacher

Array = jax.Array
_EXAMPLES = 4096  # that lie on the device


@dataclasses.dataclass(frozen=True)
class Subject:
    """A student and its teacher, by name and options, and the images they see."""

    student: tuple[str, Mapping[str, Any]]
    teacher: tuple[str, Mapping[str, Any]]
    shape: tuple[int, int, int]
    num_classes: int

    def student_module(self, precision: str = "float32", remat: bool = False) -> nn.Module:
        """The student, computing in that precision."""
        name, options = self.student
        return models.build(name, self.num_classes, precision=precision, remat=remat, **options)

    def teacher_module(self, precision: str = "float32") -> nn.Module:
        """The teacher."""
        name, options = self.teacher
        return models.build(name, self.num_classes, precision=precision, **options)


SUBJECTS: Mapping[str, Subject] = {
    "mlp": Subject(("mlp", {"hidden": (64,)}), ("mlp", {"hidden": (128,)}), (8, 8, 1), 10),
    "mlp_256": Subject(
        ("mlp", {"hidden": (256, 256)}), ("mlp", {"hidden": (256, 256)}), (8, 8, 1), 10
    ),
    # 41 features of a row; the networks of the attack-detection experiments.
    "tabular": Subject(
        ("mlp", {"hidden": (64, 32)}),
        ("mlp", {"hidden": (512, 256, 128, 64, 32)}),
        (1, 41, 1),
        5,
    ),
    "cnn": Subject(("cnn", {"widths": (16, 32)}), ("cnn", {"widths": (32, 64)}), (8, 8, 1), 10),
    "resnet20": Subject(("resnet20", {}), ("resnet56", {}), (32, 32, 3), 100),
    "resnet8x4": Subject(("resnet8x4", {}), ("resnet32x4", {}), (32, 32, 3), 100),
}


def method(
    subject: Subject,
    *,
    learned: bool = True,
    cached: bool = False,
    precision: str = "float32",
    remat: bool = False,
    augmented: Any = None,
    **changes: Any,
) -> distill.Distillation:
    """TGeo-KD, or plain distillation with a constant ratio.

    Args:
        subject: the networks.
        learned: whether the ratio is.
        cached: whether teacher logits come with the batch.
        precision: of both networks' computation.
        remat: of the student.
        augmented: the training view; none by default.
        **changes: fields of `Distillation`.
    """
    section = configs.default().optimizer
    # Random labels: a rate at which nothing diverges, for the time does not depend on it.
    section.update(learning_rate=1e-3, momentum=0.9, nesterov=True)
    teacher = subject.teacher_module(precision)
    view = _as_floats if augmented is None else augmented
    fields: dict[str, Any] = {
        "student": subject.student_module(precision, remat),
        "num_classes": subject.num_classes,
        "role": roles.cached(teacher) if cached else roles.frozen(teacher),
        "soft_loss": losses.soft_loss("kl", temperature=4.0),
        "ratio": ratios.tgeo() if learned else ratios.constant(alpha=0.5),
        "optimizer": optimizers.build(section, 100, 100),
        "fusion_optimizer": optimizers.build(configs.default().meta.optimizer, 100, 100),
        "steps_per_epoch": 100,
        "num_epochs": 100,
        "training_view": view if augmented is not None else lambda keys, images: view(images),
        "clean_view": _as_floats,
    }
    return distill.Distillation(**{**fields, **changes})


def _as_floats(images: Array) -> Array:
    return images.astype(jnp.float32) / 255


@functools.cache
def data(subject_name: str, examples: int = _EXAMPLES, cached: bool = False) -> Batch:
    """Random images and labels on the device, with teacher logits where those are cached."""
    subject, random = SUBJECTS[subject_name], np.random.RandomState(0)
    images = random.randint(0, 256, (examples, *subject.shape)).astype(np.uint8)
    labels = random.randint(0, subject.num_classes, examples).astype(np.int32)
    if not cached:
        return Batch(*map(jax.device_put, (images, labels)))
    logits = random.randn(examples, 1, subject.num_classes).astype(np.float32)
    ids = np.arange(examples, dtype=np.int32)
    return Batch(*map(jax.device_put, (images, labels, ids, logits)))


@functools.cache
def teacher(subject_name: str) -> Teacher:
    """Variables of an untrained teacher; what they are makes no difference to the time."""
    subject = SUBJECTS[subject_name]
    images = jnp.zeros((1, *subject.shape))
    variables = jax.jit(subject.teacher_module().init)(jax.random.key(0), images)
    means = jnp.full((subject.num_classes,) * 2, 1 / subject.num_classes)
    return jax.device_put(Teacher(variables, means))


def wants_no_loops(subject: Subject) -> bool:
    """Whether the product takes one step a dispatch here; see `tgeo_jax.dispatch`."""
    if jax.default_backend() != "cpu":
        return False
    images = jnp.zeros((1, *subject.shape))
    return convolution.has_convolutions(subject.student_module().init, jax.random.key(0), images)


def steps_of(subject: Subject) -> int:
    """Steps to time in one call: the product's own dispatch, or a period of "every 4th step"."""
    return 4 if wants_no_loops(subject) else 100


class Training:
    """A training that goes on by some steps at every call, as `train` would take them.

    Args:
        subject_name: of `SUBJECTS`.
        method: what is trained.
        batch_size: of training batches.
        meta_batch_size: of held-out batches; as the training batches if 0.
        steps: taken in one call.
        seeds: how many.
        per_dispatch: steps in one program; all of them if 0. One where the product takes one.
        dispatcher: another class than the product's.
    """

    def __init__(
        self,
        subject_name: str,
        method: distill.Distillation,
        batch_size: int,
        *,
        meta_batch_size: int = 0,
        steps: int = 1,
        seeds: int = 1,
        per_dispatch: int = 0,
        dispatcher: type[Dispatcher] = Dispatcher,
    ):
        self.steps, self._step = steps, 0
        split = data(subject_name, max(_EXAMPLES, batch_size), method.role.cached is not None)
        self.data = Resident(split, split)
        self.teacher = teacher(subject_name)
        loop_free = wants_no_loops(SUBJECTS[subject_name])
        self.per_dispatch = 1 if loop_free else per_dispatch or steps
        mesh = parallel.make_mesh(1, jax.devices()[:1])
        self.dispatcher = dispatcher(
            method, mesh, batch_size, meta_batch_size or batch_size, loop_free=loop_free
        )
        example = split.images_BxHxWxC[:1]
        init = jax.vmap(
            lambda seed: distill.init_state(method, seed, example), out_axes=parallel.SEED_AXES
        )
        self.state = jax.jit(init, out_shardings=parallel.state_shardings(mesh))(
            np.arange(seeds, dtype=np.uint32)
        )

    def __call__(self) -> Any:
        """Takes the steps; what is returned is ready when they are done."""
        for _ in range(self.steps // self.per_dispatch):
            self.state, found = self.dispatcher.run(
                self.state, self.teacher, self.data, self.per_dispatch, self._step
            )
            self._step += self.per_dispatch
        return found

    def costs(self, first_step: int = 0) -> measure.Costs:
        """What the compiler says of one step by itself."""
        program, _ = self.dispatcher.program(self.state, self.teacher, self.data, 1, first_step)
        return measure.costs(program)
