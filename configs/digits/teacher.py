"""A teacher for the digits that learned 40 % wrong labels by heart.

What for: whom to trust is only a question where the teacher is sometimes wrong. This one is wrong,
and sure of it, about as often as its labels were.
Command: python -m experiments.main --config=configs/digits/teacher.py --workdir=runs/digits/teacher
Cost: about 10 seconds on two CPU cores.
Expected: test accuracy near 0.7 (labels of the test split are never corrupted); training accuracy
1.0 on the corrupted labels, 0.6 on the true ones.
"""

from ml_collections import ConfigDict

from tgeo_jax import config as configs

HIDDEN = (256, 256)


def get_config() -> ConfigDict:
    config = configs.default()
    config.role.name = "alone"
    config.student.name = "mlp"
    config.student.mlp.hidden = HIDDEN
    config.data.update(label_noise=0.4, batch_size=32)
    config.optimizer.update(learning_rate=0.1, schedule="cosine")
    config.train.update(epochs=60, checkpoint_every=10)
    return config
