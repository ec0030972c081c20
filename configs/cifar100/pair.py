"""A teacher-student pair on CIFAR-100 with any method, by the recipe of the published tables.

The argument is `teacher-student,method[,preset]`: networks of docs/models.md, methods of
docs/methods/, presets `standard` (240 epochs), `epochs400` and `large_batch`. The twelve published
pairs are in `PAIRS`. Needs the dataset (`python -m experiments.prepare --dataset=cifar100
--source=cifar-100-binary.tar.gz`) and the teacher (configs/teachers/cifar100.py, or a converted
one). A tenth of the training images is held out: published numbers come from training on all of
them.
Command: python -m experiments.main --config=configs/cifar100/pair.py:resnet32x4-resnet8x4,tgeo \\
    --workdir=runs/cifar100/resnet32x4-resnet8x4/tgeo
Cost: not measured for this pair; resnet20-resnet8 takes 0.25 s a step on two CPU cores.
Expected: see results/README.md, which holds our runs beside the published figures.
"""

from ml_collections import ConfigDict

from configs import methods, recipes
from tgeo_jax import models
from tgeo_jax.errors import ConfigError

PAIRS = (
    "resnet56-resnet20",
    "resnet110-resnet32",
    "resnet32x4-resnet8x4",
    "wrn_40_2-wrn_16_2",
    "wrn_40_2-wrn_40_1",
    "vgg13-vgg8",
    "resnet32x4-ShuffleV1",
    "resnet32x4-ShuffleV2",
    "wrn_40_2-ShuffleV1",
    "vgg13-MobileNetV2",
    "ResNet50-MobileNetV2",
    "ResNet50-vgg8",
)


def get_config(argument: str = "resnet32x4-resnet8x4,tgeo") -> ConfigDict:
    parts = argument.split(",")
    if len(parts) not in (2, 3):
        raise ConfigError(
            f"--config=configs/cifar100/pair.py:{argument}: must end in teacher-student,method or "
            "teacher-student,method,preset"
        )
    nets, method, preset = [*parts, "standard"][:3]
    teacher, student = recipes.pair(nets, models.SMALL)
    config = recipes.cifar("cifar100", student, preset)
    config.teacher.update(name=teacher, workdir=f"runs/cifar100/teachers/{teacher}")
    methods.apply(config, method, nets)
    if preset == "epochs400" and method == "tgeo":
        # The released code's settings, which its 400 epochs come with.
        config.loss.kl.temperature = 1.0
        config.meta.optimizer.update(name="adam", learning_rate=0.1, weight_decay=0.05)
    return config
