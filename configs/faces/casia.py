"""Faces of CASIA-WebFace, verified on LFW: a planned recipe, run on stand-ins of its layout only.

The argument is `teacher-student,method`, networks of docs/models.md that end in a cosine head. The
recipe is ArcFace's (batch 512, rate 0.1 divided by 10 at 20,000 and 28,000 of 32,000 steps, weight
decay 5e-4, s = 64, m = 0.5); in bfloat16, and with held-out images, which are ours. For TGeo-KD and
other methods with a frozen teacher train one first (`...,plain` with that network as student).
Needs aligned crops in a folder that docs/faces.md describes (`python -m experiments.prepare
--dataset=face_folder --source=FOLDER`): 494,414 of them take 18.6 GB on every device.
Command: python -m experiments.main \\
    --config=configs/faces/casia.py:iresnet50-mobilefacenet,trikd --workdir=runs/casia/trikd
Cost: not measured yet.
Expected: no run is recorded yet.
"""

from ml_collections import ConfigDict

from configs import methods, recipes
from tgeo_jax import config as configs
from tgeo_jax import models
from tgeo_jax.errors import ConfigError


def get_config(argument: str = "iresnet50-mobilefacenet,trikd") -> ConfigDict:
    nets, comma, method = argument.partition(",")
    if not comma:
        raise ConfigError(
            f"--config=configs/faces/casia.py:{argument}: must end in teacher-student,method"
        )
    teacher, student = recipes.pair(nets, models.FACES)
    config = configs.default()
    config.data.update(
        name="face_folder",
        validation_fraction=0.02,
        flip=True,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        batch_size=512,
        eval_batch_size=512,
    )
    config.meta.batch_size = 512
    config.student.name, config.teacher.name = student, teacher
    config.teacher.workdir = f"runs/casia/teachers/{teacher}"
    config.loss.hard = "arcface"
    config.optimizer.update(learning_rate=0.1, schedule="step", drop_epochs=(24, 33))
    config.train.update(epochs=38, steps_per_dispatch=10)
    config.precision = "bfloat16"
    methods.apply(config, method, nets)
    return config
