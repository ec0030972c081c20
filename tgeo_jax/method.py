"""A method as a value: one answer on each axis, and how to optimise."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import optax

from tgeo_jax import fusion, losses, margins, roles

Array = jax.Array
ORDERS = ("student_first", "fusion_first", "prequential")


@dataclasses.dataclass(frozen=True)
class Distillation:
    """One answer on each axis, and how to optimise.

    Attributes:
        student: the student's module.
        num_classes: K.
        role: who teaches.
        soft_loss: what is compared.
        ratio: how much teacher, for each sample; of one teacher, even where several have their own.
        optimizer: the student's; a teacher that trains along has the same, with its own state.
        fusion_optimizer: the meta-parameters'.
        steps_per_epoch: for ratios and weights that follow the epoch.
        num_epochs: length of training.
        training_view: (keys_B, raw images) -> network input, with augmentation.
        clean_view: raw images -> network input, without.
        order: `student_first` (real step, then fusion update at the new student), `fusion_first`
            (virtual step, fusion update, real step) or `prequential` (as student_first, but the
            outer batch is the next training batch).
        meta_every: the fusion network is updated every this many steps.
        estimator: see `bilevel`.
        outer_soft: weight of the soft loss in the outer loss, in [0, 1]; the hard one has the rest.
        drop_steps: where the role's weights move on to their next value.
        replicas: equal parts of a batch that BatchNorm sees by themselves, see
            `objective.training_mode`; 1: the whole batch at once.
        lazy_rows: whether a step reads and writes only the rows of the student's embedding tables
            that its batches use; see `rows`.
        hard_loss: what the student's logits are compared with the label by, in the inner and in the
            outer loss; evaluation reports the cross-entropy whatever this is.
        teacher_hard_loss: likewise of a teacher that trains along.
    """

    student: nn.Module
    num_classes: int
    role: roles.Role
    soft_loss: losses.SoftLoss
    ratio: fusion.FusionRatio
    optimizer: optax.GradientTransformation
    fusion_optimizer: optax.GradientTransformation
    steps_per_epoch: int
    num_epochs: int
    training_view: Callable[[Array, Array], Array]
    clean_view: Callable[[Array], Array]
    order: str = "student_first"
    meta_every: int = 1
    estimator: str = "mixed"
    outer_soft: float = 0.0
    drop_steps: tuple[int, ...] = ()
    replicas: int = 1
    lazy_rows: bool = False
    hard_loss: margins.HardLoss = losses.cross_entropy
    teacher_hard_loss: margins.HardLoss = losses.cross_entropy

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise ValueError(f"meta.order={self.order!r}: use one of {', '.join(ORDERS)}")
        if self.order == "prequential" and self.estimator != "mixed":
            raise ValueError(
                f"meta.estimator={self.estimator!r}: meta.order='prequential' reuses the forward "
                "pass and is only available with meta.estimator='mixed'"
            )
        if self.lazy_rows and not getattr(self.student, "vocabulary", ()):
            raise ValueError(
                "optimizer.lazy_rows=True: the student has no embedding tables; use False, or one "
                "of the networks for tables of categories"
            )
        if not self.meta_learned:
            return
        if self.lazy_rows and self.order == "prequential":
            raise ValueError(
                "meta.order='prequential' hands the forward pass on the next batch to the next "
                "step, which with optimizer.lazy_rows=True holds other rows; use "
                "meta.order='student_first'"
            )
        if self.order == "prequential" and self.role.peer is not None:
            raise ValueError(
                "meta.order='prequential' looks at the next batch before its step, but a teacher "
                "that trains along (role 'dml' or 'trikd') will have changed by then; use "
                "meta.order='student_first'"
            )
        if self.ratio.per_batch is not None and self.order == "prequential":
            raise ValueError(
                "ratio.name='rw' finds its weights by a virtual step before the real one, and "
                "meta.order='prequential' takes only the real one; use another order"
            )
        if self.ratio.per_batch is not None and self.meta_every > 1:
            raise ValueError(
                f"meta.every={self.meta_every}: ratio.name='rw' has no weights for the steps in "
                "between, since nothing of them outlives a batch; use meta.every=1"
            )

    @property
    def total_steps(self) -> int:
        """Length of training in steps."""
        return self.steps_per_epoch * self.num_epochs

    @property
    def prequential(self) -> bool:
        """Whether each step's outer batch is its successor's training batch."""
        return self.meta_learned and self.order == "prequential"

    @functools.cached_property
    def fusion_ratio(self) -> fusion.FusionRatio:
        """The ratio that the step uses: lifted where each of several teachers has its own."""
        if self.role.num_teachers:
            return fusion.for_each_teacher(self.ratio, self.role.num_teachers)
        return self.ratio

    @functools.cached_property
    def meta_learned(self) -> bool:
        """Whether the ratio is learned from an outer loss, so that steps need an outer batch."""
        if not self.role.has_teacher:
            return False
        if self.ratio.per_batch is not None:
            return True
        params = jax.eval_shape(
            lambda key: self.ratio.init(key, self.num_classes), jax.random.key(0)
        )
        return bool(jax.tree.leaves(params))
