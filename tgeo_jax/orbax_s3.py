"""Lets Orbax keep checkpoints in s3:// buckets.

Orbax writes its small files through etils, which knows s3://, and its arrays through TensorStore,
which does too; but of buckets Orbax itself knows gs:// alone, and would give TensorStore a file's
path. What it does for gs:// is right here as well: a checkpoint counts once a last object,
`commit_success.txt`, is there, since nothing can be renamed.
"""

from __future__ import annotations

import functools
import os
import pathlib
from typing import Any

from orbax.checkpoint._src.path import gcs_utils
from orbax.checkpoint._src.serialization import tensorstore_utils

_PREFIXES = ("gs://", "s3://")


@functools.cache
def enable() -> None:
    """Makes it so for this process; may be called again.

    Examples:
        >>> enable()
        >>> gcs_utils.get_kvstore_for_gcs("s3://bucket/run/params")["path"]
        'run/params'
    """
    of_gcs = gcs_utils.get_kvstore_for_gcs

    def is_bucket(path: pathlib.PurePosixPath) -> bool:
        return path.as_posix().startswith(_PREFIXES)

    def normalised(path: str) -> str:
        found = os.path.normpath(path)
        return found.replace("gs:/", "gs://").replace("s3:/", "s3://")

    def store(path: str) -> dict[str, Any]:
        return _of_s3(path) if path.startswith("s3://") else of_gcs(path)

    gcs_utils.is_gcs_path = is_bucket
    gcs_utils.get_kvstore_for_gcs = store
    tensorstore_utils._use_gcs_driver = lambda path: path.startswith(_PREFIXES)
    tensorstore_utils._normalize_path = normalised


def _of_s3(path: str) -> dict[str, Any]:
    """TensorStore's description; the variables are those of every S3 client."""
    bucket, _, key = path.removeprefix("s3://").partition("/")
    found = {"driver": "s3", "bucket": bucket, "path": key}
    names = {
        "endpoint": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
        "aws_region": ("AWS_REGION", "AWS_DEFAULT_REGION"),
    }
    for field, variables in names.items():
        value = next((os.environ[name] for name in variables if os.environ.get(name)), None)
        if value is not None:
            found[field] = value
    return found
