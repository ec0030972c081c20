"""CMKD (arXiv 2410.06561, our reconstruction): values by Pearson, ranks by Spearman.

Needs the teacher of configs/digits/teacher.py. docs/methods/cmkd.md. The soft
rank strength is 3/K by default.
Command: python -m experiments.main --config=configs/digits/cmkd.py --workdir=runs/digits/cmkd
Cost: about 15 seconds on two CPU cores (3 seeds).
Expected: @@EXPECT_cmkd@@
"""

from ml_collections import ConfigDict

from configs.digits import kd


def get_config() -> ConfigDict:
    config = kd.get_config()
    config.loss.name = "cmkd"
    config.ratio.name = "weighted"
    config.ratio.weighted.soft = 2.0
    return config
