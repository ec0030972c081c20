"""What a trained ratio does to every training sample: the raw material of the report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tgeo_jax import distill, objective, ratios, storage
from tgeo_jax.state import Batch, Teacher, TrainState

Array = jax.Array
EXTREMES = 16  # pictures kept of each end of the ratio


def ratios_of_samples(
    method: distill.Distillation,
    teacher: Teacher,
    state: TrainState,
    student_logits_SxNxK: np.ndarray,
    teacher_logits: np.ndarray,
    labels_N: np.ndarray,
) -> np.ndarray:
    """The teacher's share for every sample and seed, on clean images.

    Args:
        method: what was trained.
        teacher: class means of frozen teachers.
        state: after training, leaves [seeds, ...]; class means of a teacher that trained along.
        student_logits_SxNxK: of every seed's student, evaluation mode.
        teacher_logits: [N, K] of a frozen teacher, [seeds, N, K] of one that trained along,
            [M, N, K] of several that each have a ratio.
        labels_N: class indices.

    Returns:
        ratio_SxN in [0, 1].
    """
    labels = jnp.asarray(labels_N)

    def of_seed(meta_params, student_logits_NxK: Array, said: Array, means: Array) -> Array:
        situation = ratios.Situation(
            student_logits_BxK=student_logits_NxK,
            teacher_logits_BxK=said,
            labels_B=labels,
            hard_B=method.hard_loss(student_logits_NxK, labels),
            soft_B=objective.soft_losses(method, student_logits_NxK, said, labels),
            class_means_KxK=means,
            epoch=jnp.asarray(method.num_epochs),
            num_epochs=method.num_epochs,
        )
        hard_N, soft = method.fusion_ratio.weights(meta_params, situation)
        return ratios.teacher_share(hard_N, objective.over_teachers(soft))

    axis, means = None, teacher.class_means_KxK
    if state.teacher is not None:
        axis, means = 0, state.teacher.class_means_KxK
    of_seeds = jax.jit(jax.vmap(of_seed, in_axes=(0, 0, axis, axis)))
    return np.asarray(of_seeds(state.fusion.params, student_logits_SxNxK, teacher_logits, means))


def save(
    path: storage.Path,
    ratio_SxN: np.ndarray,
    teacher_logits: np.ndarray,
    train: Batch,
    class_names: Sequence[str] = (),
) -> None:
    """Writes samples.npz: per-sample numbers of all samples, pictures of the first seed's extremes.

    Arrays: `ratio` [seeds, N]; `teacher_right`, `teacher_class` [1, N], or [seeds, N] of a teacher
    that trained along; `label` [N]; `lowest`, `highest` (indices) and `lowest_images`,
    `highest_images`; `class_names` [K], if they are known.
    """
    labels_N = np.asarray(train.labels_B)
    order = np.argsort(ratio_SxN[0], kind="stable")
    ends = {"lowest": order[:EXTREMES], "highest": order[::-1][:EXTREMES]}
    images = np.asarray(train.images_BxHxWxC)
    classes_TxN = np.atleast_2d(teacher_logits.argmax(-1))
    arrays: dict[str, Any] = {
        "ratio": ratio_SxN,
        "teacher_class": classes_TxN,
        "teacher_right": classes_TxN == labels_N,
        "label": labels_N,
        "class_names": np.asarray(class_names, str),
        **ends,
        **{f"{name}_images": images[indices] for name, indices in ends.items()},
    }
    storage.write_arrays(path, arrays)
