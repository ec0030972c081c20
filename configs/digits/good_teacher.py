"""A good teacher for the digits: a wider network on the clean labels.

What for: the comparison of methods needs a teacher that knows more than the student.
Command: python -m experiments.main --config=configs/digits/good_teacher.py \\
    --workdir=runs/digits/good_teacher
Cost: about 30 seconds on two CPU cores.
Expected: @@EXPECT_good_teacher@@
"""

from ml_collections import ConfigDict

from configs.digits import plain

WIDTHS = (32, 64)


def get_config() -> ConfigDict:
    config = plain.get_config()
    config.seeds = 1
    config.student.cnn.widths = WIDTHS
    return config
