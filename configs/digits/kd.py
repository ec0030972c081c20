"""Knowledge distillation with one ratio for all samples (Hinton et al. 2015) on the digits.

Needs the teacher of configs/digits/teacher.py.
Command: python -m experiments.main --config=configs/digits/kd.py --workdir=runs/digits/kd
Cost: about 15 seconds on two CPU cores (3 seeds).
Expected: test accuracy 0.90 +- 0.02: the student believes a teacher that is wrong on 40 % of its
training samples.
"""

from ml_collections import ConfigDict

from configs.digits import plain, teacher


def get_config() -> ConfigDict:
    config = plain.get_config()
    config.role.name = "frozen"
    config.teacher.update(name="mlp", workdir="runs/digits/teacher")
    config.teacher.mlp.hidden = teacher.HIDDEN
    config.loss.kl.temperature = 2.0
    config.ratio.constant.alpha = 0.9
    return config
