"""Which options of the `data` section a kind of dataset has no use for."""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from tgeo_jax.data import faces, tables
from tgeo_jax.errors import ConfigError
from tgeo_jax.values import shown

PARTS = ("all", "teacher", "student")
# What is without effect, and is all that is allowed, by the field that does not apply.
_OF_IMAGES: dict[str, Any] = {
    "crop_padding": 0,
    "flip": False,
    "cutout": 0,
    "randaugment_layers": 0,
    "randaugment_magnitude": 9.0,
    "image_size": 224,
    "outliers": 0.0,
}
HASH_BUCKETS = 65536  # by default


def check(data: ConfigDict) -> None:
    """Checks that no option is set which does nothing for the dataset that is named.

    Raises:
        ConfigError: the first one, with the reason.

    Examples:
        >>> from tgeo_jax import config
        >>> data = config.default().data
        >>> data.name, data.flip = "nsl_kdd", True
        >>> check(data)
        Traceback (most recent call last):
        tgeo_jax.errors.ConfigError: data.flip=True: must be False with data.name='nsl_kdd', \
whose examples are rows of a table, not images
    """
    layout = tables.LAYOUTS.get(data.name)
    if layout is not None:
        why = f"data.name={data.name!r}, whose examples are rows of a table, not images"
        _refuse(data, _OF_IMAGES, why)
    if data.name in faces.NAMES:
        why = f"data.name={data.name!r}, whose pairs are verified in memory"
        _refuse(data, {"pipeline": "resident"}, why)
    if layout is not None and layout.kind == "categorical":
        why = f"data.name={data.name!r}, whose columns are ids and have no scale"
        _refuse(data, {"mean": (), "std": ()}, why)
    elif layout is not None:
        why = f"data.name={data.name!r}, whose scale only a pass over all rows would tell"
        _refuse(data, {"pipeline": "resident"}, why)
    if layout is None or layout.kind != "categorical":
        why = f"data.name={shown(data.name)}, which has no vocabulary of values to count"
        _refuse(data, {"min_count": 1, "hash_buckets": HASH_BUCKETS}, why)
    if data.outliers:
        _refuse(data, {"oversample": False}, "data.outliers, whose examples would be repeated")
    if data.pipeline == "stream":
        _check_stream(data, layout is not None)
    else:
        why = "data.pipeline='resident', which gives every value an id of its own"
        _refuse(data, {"hash_buckets": HASH_BUCKETS}, why)


def _check_stream(data: ConfigDict, is_table: bool) -> None:
    labels, count = ("data.pipeline='stream', which reads no " + w for w in ("labels", "values"))
    _refuse(data, {"oversample": False}, f"{labels} beforehand")
    _refuse(data, {"min_count": 1}, f"{count} beforehand to count them")
    if not is_table:
        _refuse(data, {"part": "all"}, f"{labels} beforehand")


def _refuse(data: ConfigDict, only: dict[str, Any], why: str) -> None:
    for field, value in only.items():
        found = tuple(data[field]) if isinstance(value, tuple) else data[field]
        if found != value:
            raise ConfigError(f"data.{field}={shown(found)}: must be {value!r} with {why}")
