"""What a trained ratio does to every training sample: the raw material of the report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tgeo_jax import distill, geometry, objective, ratios, storage
from tgeo_jax.state import Batch, Teacher, TrainState

Array = jax.Array
EXTREMES = 16  # samples of each end of the ratio that more is kept of


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


EDGES = tuple(edge.replace("-", "") for edge in geometry.relation_blocks("edges"))
ANGLES = ("S", "T", "G")  # corners of the triangle S-T-G


def lengths_and_angles(
    student_logits_BxK: np.ndarray,
    teacher_logits_BxK: np.ndarray,
    labels_B: np.ndarray,
    class_means_KxK: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Lengths of the five edges, and the angles of the triangle S-T-G.

    The fusion network sees an edge as a vector of squares, `(T - S)^2`; its length is the root of
    their sum, `|ST| = ||T - S||_2`. Angles are those of the law of cosines.

    Args:
        student_logits_BxK: of any samples.
        teacher_logits_BxK: likewise.
        labels_B: class indices.
        class_means_KxK: the teacher's mean prediction of each class, if it is known.

    Returns:
        lengths_Bx5 in [0, sqrt 2], in the order of `EDGES`, NaN of those to M where there is none;
        degrees_Bx3 in the order of `ANGLES`, NaN at a corner that another one lies on.

    References:
        TGeo-KD (arXiv 2312.15112), intra-sample and inter-sample relations.

    Examples:
        >>> student, teacher = np.zeros((1, 3)), np.array([[0, 99, 99]])
        >>> lengths, degrees = lengths_and_angles(student, teacher, np.array([0]))
        >>> print(EDGES[1:4], lengths[0, 1:4].round(3), degrees.round(1))
        ('GS', 'TS', 'TG') [0.816 0.408 1.225] [[180. 0. 0.]]
    """
    num_classes = student_logits_BxK.shape[-1]
    means = np.full((num_classes, num_classes), np.nan)
    if class_means_KxK is not None:
        means = np.asarray(class_means_KxK, np.float64)
    squares_BxF = geometry.trilateral_features(
        jax.nn.softmax(jnp.asarray(student_logits_BxK)),
        jax.nn.softmax(jnp.asarray(teacher_logits_BxK)),
        jnp.asarray(labels_B),
        jnp.asarray(means, jnp.float32),
        "edges",
    )
    squares_Bx5 = np.asarray(squares_BxF, np.float64).reshape(-1, len(EDGES), num_classes).sum(-1)
    lengths_Bx5 = np.sqrt(squares_Bx5)
    gs, ts, tg = (lengths_Bx5[:, EDGES.index(edge)] for edge in ("GS", "TS", "TG"))
    corners = ((ts, gs, tg), (ts, tg, gs), (gs, tg, ts))  # two sides, and the one across
    with np.errstate(divide="ignore", invalid="ignore"):
        cosines = [(a**2 + b**2 - across**2) / (2 * a * b) for a, b, across in corners]
        degrees_Bx3 = np.degrees(np.arccos(np.clip(np.stack(cosines, -1), -1, 1)))
    return lengths_Bx5, degrees_Bx3


def save(
    path: storage.Path,
    ratio_SxN: np.ndarray,
    teacher_logits: np.ndarray,
    train: Batch,
    class_names: Sequence[str] = (),
    *,
    student_logits_SxNxK: np.ndarray | None = None,
    class_means: np.ndarray | None = None,
) -> None:
    """Writes samples.npz: per-sample numbers of all samples, and more of the first seed's extremes.

    Args:
        path: of the file.
        ratio_SxN: from `ratios_of_samples`.
        teacher_logits: [N, K], or [seeds, N, K] of a teacher that trained along.
        train: the samples.
        class_names: if they are known.
        student_logits_SxNxK: of every seed's student; without them nothing is told of geometry.
        class_means: [K, K], the first seed's; None where the ratio has not asked for them, nor
            where several teachers have one each.

    Arrays: `ratio` [seeds, N]; `teacher_right`, `teacher_class` [1, N], or [seeds, N] of a teacher
    that trained along; `label` [N]; `class_names` [K]. For each end of the ratio, `lowest` and
    `highest`: the indices; `..._images`; and `..._student_logits`, `..._teacher_logits` [E, K],
    `..._edges` [E, 5], `..._angles` [E, 3] (`lengths_and_angles`) and, if there is one,
    `..._class_mean` [E, K].
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
    if student_logits_SxNxK is not None:
        taught_NxK = teacher_logits if teacher_logits.ndim == 2 else teacher_logits[0]
        for name, indices in ends.items():
            own = student_logits_SxNxK[0][indices], taught_NxK[indices], labels_N[indices]
            lengths, degrees = lengths_and_angles(*own, class_means)
            found = {
                "student_logits": own[0], "teacher_logits": own[1],
                "edges": lengths, "angles": degrees,
            }  # fmt: skip
            if class_means is not None:
                found["class_mean"] = class_means[labels_N[indices]]
            arrays |= {f"{name}_{key}": values for key, values in found.items()}
    storage.write_arrays(path, arrays)
