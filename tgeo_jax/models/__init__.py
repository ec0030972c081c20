"""Networks, one file a family; `build` makes any of them by name."""

from tgeo_jax.models.build import MODELS, build

__all__ = ["MODELS", "build"]
