"""A teacher for CIFAR-100: any network of 32x32 images, by the students' own recipe.

The argument is the network's name, with `,large_batch` for the preset that suits accelerators. A
tenth of the training images is held out, the same as in the students' runs.
Command: python -m experiments.main --config=configs/teachers/cifar100.py:resnet56 \\
    --workdir=runs/cifar100/teachers/resnet56
Cost: not measured for resnet56; resnet20 takes 0.27 s a step on two CPU cores.
Expected: see results/README.md.
"""

from ml_collections import ConfigDict

from configs import recipes
from tgeo_jax import models


def get_config(argument: str = "resnet56") -> ConfigDict:
    name, _, preset = argument.partition(",")
    recipes.network(name, models.SMALL, "teacher")
    config = recipes.cifar("cifar100", name, preset or "standard")
    config.role.name = "alone"
    return config
