"""A teacher for CIFAR-10: any network of 32x32 images, by the students' own recipe.

The argument is the network's name, with `,large_batch` for the preset that suits accelerators. A
tenth of the training images is held out, the same as in the students' runs.
Command: python -m experiments.main --config=configs/teachers/cifar10.py:resnet56 \\
    --workdir=runs/cifar10/teachers/resnet56
Cost: not measured yet.
Expected: no run is recorded yet.
"""

from ml_collections import ConfigDict

from configs import recipes
from tgeo_jax import models


def get_config(argument: str = "resnet56") -> ConfigDict:
    name, _, preset = argument.partition(",")
    recipes.network(name, models.SMALL, "teacher")
    config = recipes.cifar("cifar10", name, preset or "standard")
    config.role.name = "alone"
    return config
