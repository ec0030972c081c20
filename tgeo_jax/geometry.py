"""Trilateral geometry of student, teacher and truth: what TGeo-KD's fusion network looks at.

Vertices are the student's prediction S, the teacher's T, the one-hot truth G and the teacher's
mean prediction for the sample's class, here M (T-bar in the paper). Edges are elementwise squared
differences. Source: TGeo-KD, ICLR 2024, arXiv 2312.15112.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from tgeo_jax import shapes

Array = jax.Array

# Order matters: it is the order of the fusion network's inputs in every checkpoint.
_VERTICES = ("S", "T", "G", "M")
_EDGES = ("M-S", "G-S", "T-S", "T-G", "M-G")
RELATIONS: dict[str, tuple[str, ...]] = {
    "sg_tg": ("G-S", "T-G"),
    "intra": ("S", "T", "G", "G-S", "T-G", "T-S"),
    "full": _VERTICES + _EDGES,
    "edges": _EDGES,
    "vertices": _VERTICES,
    "angles": ("M-S*G-S", "T-S*G-S"),
}


def relation_blocks(relations: str) -> tuple[str, ...]:
    """Names of the K-vectors in a relation set; sets may be joined, as in `full+angles`.

    Args:
        relations: a key of `RELATIONS`, or several joined by `+`.

    Returns:
        Block names, each once, in the order in which their features are concatenated.

    Raises:
        ValueError: an unknown relation set, with the known ones.

    Examples:
        >>> relation_blocks("sg_tg+angles")
        ('G-S', 'T-G', 'M-S*G-S', 'T-S*G-S')
    """
    blocks: list[str] = []
    for name in relations.split("+"):
        if name not in RELATIONS:
            raise ValueError(
                f"relations={relations!r}: unknown relation set {name!r}; use one of "
                f"{', '.join(RELATIONS)}, or several joined by '+'"
            )
        blocks += [block for block in RELATIONS[name] if block not in blocks]
    return tuple(blocks)


def class_mean_predictions(teacher_probs_NxK: Array, labels_N: Array, num_classes: int) -> Array:
    """Mean teacher prediction of each class, the inter-sample vertex of the geometry.

    `means[c] = mean over {i : y_i = c} of T_i`; a class without samples gets the uniform vector.

    Args:
        teacher_probs_NxK: teacher probabilities at temperature 1, rows summing to 1, from one
            clean (unaugmented, eval-mode) pass over the training split.
        labels_N: class indices in [0, K).
        num_classes: K.

    Returns:
        means_KxK, rows summing to 1.

    Raises:
        ValueError: wrong ranks, or `num_classes` different from K.

    References:
        TGeo-KD (arXiv 2312.15112), T-bar of the inter-sample relations.

    Examples:
        >>> probs = jnp.array([[.8, .1, .1], [.6, .3, .1], [.2, .2, .6]])
        >>> print(class_mean_predictions(probs, jnp.array([0, 0, 2]), 3).round(2))
        [[0.7 0.2 0.1]
         [0.33 0.33 0.33]
         [0.2 0.2 0.6]]
    """
    shapes.check(teacher_probs_NxK=teacher_probs_NxK, labels_N=labels_N)
    if teacher_probs_NxK.shape[1] != num_classes:
        raise ValueError(
            f"teacher_probs_NxK has K = {teacher_probs_NxK.shape[1]} but num_classes={num_classes}"
        )
    # A count kept in bfloat16 would stop at 256.
    teacher_probs_NxK = teacher_probs_NxK.astype(
        jnp.promote_types(teacher_probs_NxK.dtype, jnp.float32)
    )
    sums_KxK = jax.ops.segment_sum(teacher_probs_NxK, labels_N, num_segments=num_classes)
    ones_N = jnp.ones(labels_N.shape, teacher_probs_NxK.dtype)
    counts_Kx1 = jax.ops.segment_sum(ones_N, labels_N, num_segments=num_classes)[:, None]
    means_KxK = sums_KxK / jnp.maximum(counts_Kx1, 1)
    return jnp.where(counts_Kx1 > 0, means_KxK, 1 / num_classes)


def trilateral_features(
    student_probs_BxK: Array,
    teacher_probs_BxK: Array,
    labels_B: Array,
    class_means_KxK: Array,
    relations: str = "full",
) -> Array:
    """Vertices and edges of the triangles S-T-G and S-M-G, concatenated for each sample.

    `full` is `S, T, G, M, (M-S)^2, (G-S)^2, (T-S)^2, (T-G)^2, (M-G)^2`, squares elementwise;
    `angles` holds the products `(M-S)(G-S)` and `(T-S)(G-S)`. The result carries no gradient.

    Args:
        student_probs_BxK: S, probabilities at temperature 1.
        teacher_probs_BxK: T, likewise.
        labels_B: class indices in [0, K).
        class_means_KxK: from `class_mean_predictions`.
        relations: a relation set, see `relation_blocks`.

    Returns:
        features_BxF with F = K times the number of blocks; vertices in [0, 1], edges in [0, 1],
        angles in [-1, 1].

    Raises:
        ValueError: wrong ranks or sizes, or an unknown relation set.

    References:
        TGeo-KD (arXiv 2312.15112), intra-sample and inter-sample relations.

    Examples:
        >>> s, t = jnp.array([[.5, .5]]), jnp.array([[.9, .1]])
        >>> print(trilateral_features(s, t, jnp.array([0]), jnp.eye(2), "sg_tg").round(2))
        [[0.25 0.25 0.01 0.01]]
    """
    shapes.check(
        student_probs_BxK=student_probs_BxK,
        teacher_probs_BxK=teacher_probs_BxK,
        labels_B=labels_B,
        class_means_KxK=class_means_KxK,
    )
    vertices = {
        "S": student_probs_BxK,
        "T": teacher_probs_BxK,
        "G": jax.nn.one_hot(labels_B, student_probs_BxK.shape[1], dtype=student_probs_BxK.dtype),
        "M": class_means_KxK[labels_B],
    }
    features_BxF = jnp.concatenate(
        [_block(vertices, name) for name in relation_blocks(relations)], axis=-1
    )
    return jax.lax.stop_gradient(features_BxF)


def student_teacher_edge(student_logits_BxK: Array, teacher_logits_BxK: Array) -> Array:
    """Length of the edge ST: how far the student is from the teacher.

    `||softmax(s) - softmax(t)||_2`

    Args:
        student_logits_BxK: student logits.
        teacher_logits_BxK: teacher logits.

    Returns:
        edge_B in [0, sqrt 2].

    Raises:
        ValueError: wrong ranks or sizes.

    References:
        TGeo-KD (arXiv 2312.15112), the situations of its motivating figure.

    Examples:
        >>> z = jnp.array([[9e9, 0.]])
        >>> print(student_teacher_edge(z, -z))
        [1.4142]
    """
    shapes.check(student_logits_BxK=student_logits_BxK, teacher_logits_BxK=teacher_logits_BxK)
    difference_BxK = jax.nn.softmax(student_logits_BxK) - jax.nn.softmax(teacher_logits_BxK)
    return jnp.linalg.norm(difference_BxK, axis=-1)


def _block(vertices: dict[str, Array], name: str) -> Array:
    """One K-vector by name: a vertex `S`, an edge `T-S` (squared), or a product `M-S*G-S`."""
    if "-" not in name:
        return vertices[name]
    first, second = (name.split("*") * 2)[:2]
    return _difference(vertices, first) * _difference(vertices, second)


def _difference(vertices: dict[str, Array], edge: str) -> Array:
    end, start = edge.split("-")
    return vertices[end] - vertices[start]
