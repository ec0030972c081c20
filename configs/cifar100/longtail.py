"""Long-tailed CIFAR, where the first class has up to 100 times as many images as the last.

The argument is `dataset,factor,method`: `cifar10` or `cifar100`, the imbalance factor (published:
10, 50, 100), a method. resnet32x4 teaches resnet8x4; batch 100, 120 epochs, rate 0.1 times 0.1 at
epochs 80 and 100; 1,000 held-out images, all classes alike, which are also the outer batch's.
BiKD's recipe (Nguyen et al. 2026). Train the teacher with `teacher` as the method: on the same
long tail.
Command: python -m experiments.main --config=configs/cifar100/longtail.py:cifar100,100,bikd \\
    --workdir=runs/longtail/cifar100-100/bikd
Cost: not measured yet.
Expected: no run is recorded yet.
"""

from ml_collections import ConfigDict

from configs import methods, recipes
from tgeo_jax.errors import ConfigError

TEACHER, STUDENT = "resnet32x4", "resnet8x4"


def get_config(argument: str = "cifar100,100,bikd") -> ConfigDict:
    parts = argument.split(",")
    if len(parts) != 3 or parts[0] not in ("cifar10", "cifar100") or not parts[1].isdigit():
        raise ConfigError(
            f"--config=configs/cifar100/longtail.py:{argument}: must end in dataset,factor,method, "
            "as in cifar100,100,bikd"
        )
    dataset, factor, method = parts
    config = recipes.cifar(dataset, TEACHER if method == "teacher" else STUDENT)
    config.data.update(batch_size=100, validation_fraction=0.02, imbalance=float(factor))
    config.optimizer.update(learning_rate=0.1, drop_epochs=(80, 100))
    config.train.epochs = 120
    config.meta.batch_size = 100
    workdir = f"runs/longtail/{dataset}-{factor}/teacher"
    config.teacher.update(name=TEACHER, workdir=workdir)
    methods.apply(config, "plain" if method == "teacher" else method, f"{TEACHER}-{STUDENT}")
    if method == "bikd" and dataset == "cifar10":
        config.ratio.bikd.hidden = (64,)
    return config
