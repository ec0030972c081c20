"""What a trained ratio does to every training sample: the raw material of the report."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tgeo_jax import distill, losses, ratios
from tgeo_jax.state import Batch, Teacher, TrainState

Array = jax.Array
EXTREMES = 16  # pictures kept of each end of the ratio


def ratios_of_samples(
    method: distill.Distillation,
    teacher: Teacher,
    state: TrainState,
    student_logits_SxNxK: np.ndarray,
    teacher_logits_NxK: np.ndarray,
    labels_N: np.ndarray,
) -> np.ndarray:
    """The teacher's share for every sample and seed, on clean images.

    Args:
        method: what was trained.
        teacher: its class means.
        state: after training, leaves [seeds, ...].
        student_logits_SxNxK: of every seed's student, evaluation mode.
        teacher_logits_NxK: of the teacher.
        labels_N: class indices.

    Returns:
        ratio_SxN in [0, 1].
    """

    teacher_logits, labels = jnp.asarray(teacher_logits_NxK), jnp.asarray(labels_N)

    def of_seed(meta_params, student_logits_NxK: Array) -> Array:
        situation = ratios.Situation(
            student_logits_BxK=student_logits_NxK,
            teacher_logits_BxK=teacher_logits,
            labels_B=labels,
            hard_B=losses.cross_entropy(student_logits_NxK, labels),
            soft_B=method.soft_loss(student_logits_NxK, teacher_logits, labels),
            class_means_KxK=teacher.class_means_KxK,
            progress=state.step / method.total_steps,
        )
        return ratios.teacher_share(*method.ratio.weights(meta_params, situation))

    return np.asarray(jax.jit(jax.vmap(of_seed))(state.fusion.params, student_logits_SxNxK))


def save(
    path: pathlib.Path,
    ratio_SxN: np.ndarray,
    teacher_logits_NxK: np.ndarray,
    train: Batch,
) -> None:
    """Writes samples.npz: per-sample numbers of all samples, pictures of the first seed's extremes.

    Arrays: `ratio` [seeds, N]; `teacher_right`, `teacher_class`, `label` [N];
    `lowest`, `highest` (indices) and `lowest_images`, `highest_images`.
    """
    labels_N = np.asarray(train.labels_B)
    order = np.argsort(ratio_SxN[0], kind="stable")
    ends = {"lowest": order[:EXTREMES], "highest": order[::-1][:EXTREMES]}
    images = np.asarray(train.images_BxHxWxC)
    arrays: dict[str, Any] = {
        "ratio": ratio_SxN,
        "teacher_class": teacher_logits_NxK.argmax(-1),
        "teacher_right": teacher_logits_NxK.argmax(-1) == labels_N,
        "label": labels_N,
        **ends,
        **{f"{name}_images": images[indices] for name, indices in ends.items()},
    }
    temporary = path.with_name(f".{path.name}")
    with temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)
    temporary.replace(path)
