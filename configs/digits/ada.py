"""ADA-KD: the teacher counts as far as it is sure of the true class.

Needs the teacher of configs/digits/teacher.py. docs/methods/ada.md.
Command: python -m experiments.main --config=configs/digits/ada.py --workdir=runs/digits/ada
Cost: about 10 seconds on two CPU cores (3 seeds).
Expected: @@EXPECT_ada@@
"""

from ml_collections import ConfigDict

from configs.digits import kd


def get_config() -> ConfigDict:
    config = kd.get_config()
    config.ratio.name = "ada"
    return config
