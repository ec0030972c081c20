"""A teacher-student pair on ImageNet with any method by the usual recipe of 100 epochs.

The argument is `teacher-student,method`; the pairs to reproduce are in `PAIRS`. Needs TFDS's
`imagenet2012` as array_record (`python -m experiments.prepare --dataset=imagenet2012` says how)
and a teacher, converted from its publisher's checkpoint (`python -m experiments.convert
--name=resnet34 --checkpoint=resnet34-b627a593.pth --workdir=runs/imagenet/teachers/resnet34`). The
dataset itself is not redistributable: this config was run on stand-ins of its layout only.
Command: python -m experiments.main --config=configs/imagenet/pair.py:resnet34-resnet18,tgeo \\
    --workdir=runs/imagenet/resnet34-resnet18/tgeo
Cost: not measured yet.
Expected: no run is recorded yet.
"""

from ml_collections import ConfigDict

from configs import methods, recipes
from tgeo_jax import models
from tgeo_jax.errors import ConfigError

PAIRS = ("resnet34-resnet18", "resnet50-mobilenetv1", "deit_small-resnet18", "vit_base-resnet18")
# Published checkpoints of this one were trained on pixels in [-1, 1].
_OWN_NORMALISATION = {"vit_base": ((0.5,) * 3, (0.5,) * 3)}


def get_config(argument: str = "resnet34-resnet18,tgeo") -> ConfigDict:
    nets, comma, method = argument.partition(",")
    if not comma:
        raise ConfigError(
            f"--config=configs/imagenet/pair.py:{argument}: must end in teacher-student,method"
        )
    teacher, student = recipes.pair(nets, models.LARGE)
    config = recipes.imagenet(student)
    config.teacher.update(name=teacher, workdir=f"runs/imagenet/teachers/{teacher}")
    if teacher in _OWN_NORMALISATION:
        config.data.mean, config.data.std = _OWN_NORMALISATION[teacher]
    methods.apply(config, method, nets, imagenet=True)
    return config
