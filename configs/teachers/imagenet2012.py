"""A teacher for ImageNet trained from scratch; a published one is converted in a minute instead.

The argument is the network's name. Needs TFDS's `imagenet2012` as array_record (`python -m
experiments.prepare --dataset=imagenet2012` says how).
Command: python -m experiments.main --config=configs/teachers/imagenet2012.py:resnet34 \\
    --workdir=runs/imagenet/teachers/resnet34
Cost: not measured yet.
Expected: no run is recorded yet.
"""

from ml_collections import ConfigDict

from configs import recipes
from tgeo_jax import models


def get_config(argument: str = "resnet34") -> ConfigDict:
    config = recipes.imagenet(recipes.network(argument, models.LARGE, "teacher"))
    config.role.name = "alone"
    return config
