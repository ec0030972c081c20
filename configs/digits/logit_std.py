"""Logit standardisation (Sun et al. 2024): KL divergence between z-scored logits.

Needs the teacher of configs/digits/teacher.py. docs/methods/logit_std.md.
Command: python -m experiments.main --config=configs/digits/logit_std.py \\
    --workdir=runs/digits/logit_std
Cost: 20 seconds for five seeds on two CPU cores, compilation included.
Expected: test accuracy 0.775 +- 0.026 over five seeds (docs/comparison.md).
"""

from ml_collections import ConfigDict

from configs.digits import kd


def get_config() -> ConfigDict:
    config = kd.get_config()
    config.loss.name = "logit_std"
    config.ratio.name = "weighted"
    config.ratio.weighted.update(hard=0.1, soft=9.0)
    return config
