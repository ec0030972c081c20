"""Faces of ORL with any method: 30 people to train on, 10 others whose pairs are verified.

The argument is `teacher` (which trains the teacher alone), or a method of docs/methods/: `plain`,
`kd`, `tgeo`, `trikd`, ... `kd`, `tgeo` and what else has a frozen teacher need `teacher` first.
Needs the dataset (`python -m experiments.prepare --dataset=orl_faces --source=orl_faces.tar.gz`).
The hard loss is ArcFace's; soft losses see cosines times 16, without a margin. docs/faces.md.
Command: python -m experiments.main --config=configs/faces/orl.py:trikd --workdir=runs/faces/trikd
Cost: 6.5 minutes of CPU time for an anchor and two generations, compilation included.
Expected: test accuracy 0.99 after each; verification accuracy 0.89, 0.92 and 0.87 with a standard
error of 0.03 (one seed; docs/faces.md).
"""

from ml_collections import ConfigDict

from configs import methods
from tgeo_jax import config as configs

STUDENT = {"widths": (8, 16, 32, 64, 64), "depths": (1, 1, 1, 1)}
TEACHER = {"widths": (12, 24, 48, 96, 96), "depths": (1, 1, 1, 1)}
_SMALL = {"embedding": 64, "stem_strides": 2, "dropout": 0.0}


def get_config(argument: str = "trikd") -> ConfigDict:
    config = configs.default()
    config.data.update(
        name="orl_faces",
        validation_fraction=1 / 7,  # one of a person's seven images
        flip=True,
        crop_padding=8,  # without shifts, unseen people are told apart no better than by pixels
        batch_size=30,
        eval_batch_size=100,
    )
    config.meta.batch_size = 30
    for which, size in (("student", STUDENT), ("teacher", TEACHER)):
        config[which].name = "iresnet"
        config[which].iresnet.update(**_SMALL, **size)
    config.loss.hard = "arcface"
    config.loss.arcface.update(scale=32.0, margin=0.3)
    config.optimizer.update(learning_rate=0.05, schedule="cosine")
    config.train.update(epochs=40, eval_every=5)
    if argument == "teacher":
        config.role.name = "alone"
        config.student.iresnet.update(TEACHER)
        return config
    config.teacher.workdir = "runs/faces/teacher"
    methods.apply(config, argument, "iresnet-iresnet")
    return config
