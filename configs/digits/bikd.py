"""BiKD (Nguyen et al. 2026): two weights without a tie, from the losses of both networks.

Needs the teacher of configs/digits/teacher.py. docs/methods/bikd.md; five
times the published rate, for a run of 800 steps.
Command: python -m experiments.main --config=configs/digits/bikd.py --workdir=runs/digits/bikd
Cost: about 20 seconds on two CPU cores (3 seeds).
Expected: @@EXPECT_bikd@@
"""

from ml_collections import ConfigDict

from configs.digits import kd


def get_config() -> ConfigDict:
    config = kd.get_config()
    config.ratio.name = "bikd"
    config.meta.accumulate = 5
    config.meta.optimizer.learning_rate = 5e-3
    return config
