"""Teacher annealing (Clark et al. 2019): the teacher first, the label last.

Needs the teacher of configs/digits/teacher.py. docs/methods/annealed.md.
Command: python -m experiments.main --config=configs/digits/annealed.py \\
    --workdir=runs/digits/annealed
Cost: about 10 seconds on two CPU cores (3 seeds).
Expected: @@EXPECT_annealed@@
"""

from ml_collections import ConfigDict

from configs.digits import kd


def get_config() -> ConfigDict:
    config = kd.get_config()
    config.ratio.name = "annealed"
    return config
