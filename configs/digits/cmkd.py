"""CMKD (arXiv 2410.06561, our reconstruction): values by Pearson, ranks by Spearman.

Needs the teacher of configs/digits/teacher.py. docs/methods/cmkd.md.
Command: python -m experiments.main --config=configs/digits/cmkd.py --workdir=runs/digits/cmkd
Cost: 30 seconds for five seeds on two CPU cores, compilation included.
Expected: test accuracy 0.839 +- 0.011 over five seeds (docs/comparison.md).
"""

from ml_collections import ConfigDict

from configs.digits import kd


def get_config() -> ConfigDict:
    config = kd.get_config()
    config.loss.name = "cmkd"
    config.ratio.name = "weighted"
    config.ratio.weighted.soft = 2.0
    return config
