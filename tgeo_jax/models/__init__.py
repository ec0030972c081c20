"""Networks, one file a family; `build` makes any of them by name."""

from tgeo_jax.models.build import (
    FACES,
    LARGE,
    MODELS,
    PRECISIONS,
    SMALL,
    TABLES,
    build,
    has_blocks,
)

__all__ = ["FACES", "LARGE", "MODELS", "PRECISIONS", "SMALL", "TABLES", "build", "has_blocks"]
