"""The samples on which a ratio trusts the teacher least and most, and what it was shown of them."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from tgeo_jax import geometry, samples
from tgeo_jax.reporting import triangle

Arrays = Mapping[str, np.ndarray]
ENDS = (("lowest", "Trusted least"), ("highest", "Trusted most"))
MOST_CLASSES = 10  # that a table of features has a row for
_LARGEST = 112  # pixels of a picture's side
_MINUS = "\N{MINUS SIGN}"


class Sample(NamedTuple):
    """One of the extremes, of the first seed."""

    number: int  # in the training split
    ratio: str
    label: str
    teacher: str
    student: str  # empty where older versions kept nothing of it
    teacher_right: bool
    picture: str  # a data URI; empty of a row of a table
    drawing: str  # SVG; empty as above
    measures: tuple[tuple[str, str], ...]  # lengths and angles by name
    heads: tuple[str, ...]  # of the features' columns
    features: tuple[tuple[str, tuple[str, ...]], ...]  # by class


def of(arrays: Arrays, relations: str = "full") -> dict[str, list[Sample]]:
    """The samples of both ends, from samples.npz.

    Args:
        arrays: of any version; what older ones did not keep is left out.
        relations: which features to show.

    Returns:
        By title, `Trusted least` first; in the order of the ratio.
    """
    return {
        title: [_sample(arrays, end, place, relations) for place in range(len(arrays[end]))]
        for end, title in ENDS
    }


def _sample(arrays: Arrays, end: str, place: int, relations: str) -> Sample:
    index = int(arrays[end][place])
    label, said = int(arrays["label"][index]), int(arrays["teacher_class"][0][index])
    student, drawing, measures = "", "", tuple[tuple[str, str], ...]()
    heads, features = tuple[str, ...](), tuple[tuple[str, tuple[str, ...]], ...]()
    if f"{end}_student_logits" in arrays:
        student = named(arrays, int(arrays[f"{end}_student_logits"][place].argmax()))
        edges = arrays[f"{end}_edges"][place].tolist()
        lengths = dict(zip(samples.EDGES, edges, strict=True))
        degrees = arrays[f"{end}_angles"][place].tolist()
        measures = _measures(lengths, dict(zip(samples.ANGLES, degrees, strict=True)))
        described = f"Training sample {index}: " + ", ".join(" ".join(one) for one in measures)
        drawing = triangle.svg(lengths, described)
        heads, features = _features(arrays, end, place, relations)
    images = arrays[f"{end}_images"]
    return Sample(
        number=index,
        ratio=_ratio(arrays["ratio"][0][index]),
        label=named(arrays, label),
        teacher=named(arrays, said),
        student=student,
        teacher_right=label == said,
        picture=data_uri(images[place]) if images.ndim == 4 else "",
        drawing=drawing,
        measures=measures,
        heads=heads,
        features=features,
    )


def _ratio(value: float) -> str:
    """Three places, that small ones are not all the same.

    Examples:
        >>> _ratio(0.25), _ratio(0.00021)
        ('0.250', '2.1e-04')
    """
    return f"{value:.3f}" if value >= 0.001 or value == 0 else f"{value:.1e}"


def named(arrays: Arrays, number: int) -> str:
    """A class by name where names are known."""
    names = arrays.get("class_names", ())
    return str(names[number] if len(names) else number).replace("_", " ")


def _measures(
    lengths: Mapping[str, float], degrees: Mapping[str, float]
) -> tuple[tuple[str, str], ...]:
    told = [
        (f"|{edge}|", f"{lengths[edge]:.3f}")
        for edge in ("GS", "TS", "TG", "MS", "MG")
        if np.isfinite(lengths[edge])
    ]
    told += [(f"angle at {c}", f"{v:.0f}°") for c, v in degrees.items() if np.isfinite(v)]
    return tuple(told)


def _features(
    arrays: Arrays, end: str, place: int, relations: str
) -> tuple[tuple[str, ...], tuple[tuple[str, tuple[str, ...]], ...]]:
    """Heads and rows of the features, `geometry.trilateral_features` of what was kept."""
    student_K, teacher_K = (arrays[f"{end}_{who}_logits"][place] for who in ("student", "teacher"))
    label, num_classes = int(arrays["label"][arrays[end][place]]), len(student_K)
    means_KxK = np.zeros((num_classes, num_classes), np.float32)
    has_mean = f"{end}_class_mean" in arrays
    if has_mean:
        means_KxK[label] = arrays[f"{end}_class_mean"][place]
    features_1xF = geometry.trilateral_features(
        jax.nn.softmax(jnp.asarray(student_K))[None],
        jax.nn.softmax(jnp.asarray(teacher_K))[None],
        jnp.asarray([label]),
        jnp.asarray(means_KxK),
        relations,
    )
    blocks = geometry.relation_blocks(relations)
    values_RxK = np.asarray(features_1xF).reshape(len(blocks), num_classes)
    shown = [row for row, block in enumerate(blocks) if has_mean or "M" not in block]
    values_RxK = values_RxK[shown]
    order = np.arange(num_classes)
    if num_classes > MOST_CLASSES:
        order = np.argsort(-np.abs(values_RxK).max(axis=0), kind="stable")
        order = np.sort(order[: MOST_CLASSES - 1])
    rows = [(named(arrays, int(c)), tuple(map(_short, values_RxK[:, c]))) for c in order]
    left = num_classes - len(order)
    if left:
        rest = values_RxK.sum(axis=1) - values_RxK[:, order].sum(axis=1)
        rows.append((f"{left} others, summed", tuple(map(_short, rest))))
    return tuple(_head(blocks[row]) for row in shown), tuple(rows)


def _short(value: float) -> str:
    return f"{value:.2f}".replace("-", _MINUS).replace(f"{_MINUS}0.00", "0.00")


def _head(block: str) -> str:
    """A block's name as a formula.

    Examples:
        >>> print(_head("S"), _head("G-S").replace(_MINUS, "-"))
        S (G-S)²
    """
    factors = [f"({factor.replace('-', _MINUS)})" for factor in block.split("*")]
    if "-" not in block:
        return block
    return "".join(factors) if len(factors) > 1 else f"{factors[0]}²"


def data_uri(image_HxWxC: Any) -> str:
    """A picture inside a page: small ones as they are, larger ones as JPEG of 112 pixels.

    Examples:
        >>> data_uri(np.zeros((8, 8, 1), np.uint8)).partition(",")[0]
        'data:image/png;base64'
    """
    pixels = np.asarray(image_HxWxC)
    if pixels.dtype != np.uint8:
        span = float(np.ptp(pixels)) or 1.0
        pixels = np.round(255 * (pixels - pixels.min()) / span).astype(np.uint8)
    picture = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
    kind, content = "png", io.BytesIO()
    if max(picture.size) > _LARGEST:
        kind = "jpeg"
        picture.thumbnail((_LARGEST, _LARGEST))
    picture.save(content, kind, quality=85, optimize=True)
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}"
