"""RW-KD (Lu et al. 2021): every batch weighs its samples by the hypergradient itself.

Needs the teacher of configs/digits/teacher.py. docs/methods/rw.md.
Command: python -m experiments.main --config=configs/digits/rw.py --workdir=runs/digits/rw
Cost: about 25 seconds on two CPU cores (3 seeds).
Expected: @@EXPECT_rw@@
"""

from ml_collections import ConfigDict

from configs.digits import kd


def get_config() -> ConfigDict:
    config = kd.get_config()
    config.ratio.name = "rw"
    return config
