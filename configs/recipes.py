"""Training recipes that several experiments share."""

from __future__ import annotations

from collections.abc import Iterable

from ml_collections import ConfigDict

from configs import methods
from tgeo_jax import config as configs
from tgeo_jax.data import sources
from tgeo_jax.errors import ConfigError, nearest

# Nets that diverge at 0.05.
_SLOW = ("MobileNetV2", "ShuffleV1", "ShuffleV2")
PRESETS = ("standard", "epochs400", "large_batch")


def cifar(dataset: str, student: str, preset: str = "standard") -> ConfigDict:
    """The recipe of the CIFAR distillation literature, or one of the presets beside it.

    `standard`: SGD, momentum 0.9, weight decay 5e-4, batch 64, 240 epochs, rate 0.05 (0.01 for
    MobileNetV2 and ShuffleNets) times 0.1 at epochs 150, 180 and 210; crop with padding 4, flip.
    `epochs400`: the same over 400 epochs, the drops at the same shares of them.
    `large_batch`: for accelerators: batch 512, the rate scaled alike, 5 epochs of warm-up, cosine,
    bfloat16.

    Args:
        dataset: `cifar10` or `cifar100`.
        student: name of the network that is trained.
        preset: one of `PRESETS`.

    Raises:
        ConfigError: an unknown preset.
    """
    if preset not in PRESETS:
        raise ConfigError(f"preset {preset!r}: unknown{nearest(preset, PRESETS)}")
    config = configs.default()
    mean, std = {
        "cifar10": sources.CIFAR10_NORMALISATION,
        "cifar100": sources.CIFAR100_NORMALISATION,
    }[dataset]
    config.data.update(name=dataset, mean=mean, std=std, crop_padding=4, flip=True, batch_size=64)
    config.student.name = student
    config.optimizer.update(
        learning_rate=0.01 if student in _SLOW else 0.05,
        momentum=0.9,
        weight_decay=5e-4,
        schedule="step",
        drop_epochs=(150, 180, 210),
    )
    config.train.epochs = 240
    if preset == "epochs400":
        config.train.epochs = 400
        config.optimizer.drop_epochs = (250, 300, 350)
    elif preset == "large_batch":
        config.data.batch_size = 512
        config.optimizer.update(
            learning_rate=config.optimizer.learning_rate * 512 / 64,
            schedule="cosine",
            drop_epochs=(),
            warmup_epochs=5.0,
        )
        config.precision = "bfloat16"
    return config


def imagenet(student: str) -> ConfigDict:
    """100 epochs, batch 256, rate 0.1 times 0.1 at epochs 30, 60 and 90, weight decay 1e-4.

    Random resized crops of 224 pixels and flips; evaluation on the centre of the image resized to
    256. Ours: 2 % of the training set (25,624 images) are held out, and the computation is in
    bfloat16.

    Args:
        student: name of the network that is trained.
    """
    config = configs.default()
    config.data.update(
        name="imagenet2012",
        pipeline="stream",
        image_size=224,
        workers=8,
        flip=True,
        batch_size=256,
        eval_batch_size=256,
        validation_fraction=0.02,
    )
    config.meta.batch_size = 256
    config.student.name = student
    config.optimizer.update(
        learning_rate=0.1,
        momentum=0.9,
        weight_decay=1e-4,
        schedule="step",
        drop_epochs=(30, 60, 90),
    )
    config.train.update(epochs=100, steps_per_dispatch=10)
    config.precision = "bfloat16"
    return config


# By network: what teacher and student differ in.
ATTACK_NETWORKS = {
    "mlp": ({"hidden": (512, 256, 128, 64, 32)}, {"hidden": (64, 32)}),
    "row_encoder": ({"layers": 12}, {"layers": 4}),
}


def attack(dataset: str, argument: str, folder: str) -> ConfigDict:
    """TGeo-KD's attack detection: scaled rows, Adam, classes balanced.

    Temperature 1.5, minorities oversampled and a tenth held out, as in the authors' code, which
    trains multilayer perceptrons. The paper's table names BERT with 12 and 4 layers: that is
    `row_encoder`, with tokens of 64 numbers. Ours: batches of 1,024 rows (of encoders 256, whose
    attention is the square of about 120 tokens a row), 30 epochs and a rate of 1e-3, where they
    take 400 steps on the whole split at a rate of 0.1.

    Args:
        dataset: `nsl_kdd`, or one of `power_attack_*`.
        argument: a key of `methods.METHODS`, or `teacher`; another network than `mlp`, and a comma,
            before it.
        folder: of the runs, where the teacher is; another network has one of its own in it.

    Raises:
        ConfigError: an unknown method or network.
    """
    name, comma, method = argument.rpartition(",")
    name = network(name if comma else "mlp", ATTACK_NETWORKS, "network")
    teacher, student = ATTACK_NETWORKS[name]
    config = configs.default()
    config.data.update(name=dataset, batch_size=1024, eval_batch_size=8192, oversample=True)
    config.meta.batch_size = 512
    if name == "row_encoder":
        config.data.update(batch_size=256, eval_batch_size=1024)
        config.meta.batch_size = 256
    config.student.name = config.teacher.name = name
    config.student[name].update(student)
    config.teacher[name].update(teacher)
    config.optimizer.update(name="adam", learning_rate=1e-3, weight_decay=0.0)
    config.train.epochs = 30
    if method == "teacher":
        config.role.name = "alone"
        config.student[name].update(teacher)
        return config
    config.teacher.workdir = f"{folder}/{'' if name == 'mlp' else f'{name}/'}teacher"
    methods.apply(config, method, f"{name}-{name}")
    config.loss.kl.temperature = 1.5
    return config


CLICK_TEACHER, CLICK_STUDENT = (64, 64), (64, 32)


def clicks(dataset: str, method: str, folder: str) -> ConfigDict:
    """TGeo-KD's click-through rates: Wide&Deep, Adam, an early stop by the validation AUC.

    Embeddings of 16, batches of 1,024, rate 1e-3, temperature 2, patience 20, and separate rows
    for teacher and student, as in the authors' code, which also balances the classes. Ours: at
    most 100 epochs, which is what ratios that follow the epoch count by.

    Args:
        dataset: one of configs/ctr/clicks.py.
        method: a key of `methods.METHODS`, or `teacher`.
        folder: of the runs, where the teacher is.

    Raises:
        ConfigError: an unknown method.
    """
    config = configs.default()
    config.data.update(
        name=dataset, batch_size=1024, eval_batch_size=8192, part="student", oversample=True
    )
    config.student.name = config.teacher.name = "wide_deep"
    config.student.wide_deep.hidden = CLICK_STUDENT
    config.teacher.wide_deep.hidden = CLICK_TEACHER
    config.optimizer.update(name="adam", learning_rate=1e-3, weight_decay=0.0)
    config.meta.batch_size = 1024
    config.train.update(epochs=100, select_by="auc", patience=20)
    if method == "teacher":
        config.role.name = "alone"
        config.data.part = "teacher"
        config.student.wide_deep.hidden = CLICK_TEACHER
        return config
    config.teacher.update(workdir=f"{folder}/teacher", which="best")
    methods.apply(config, method, "wide_deep-wide_deep")
    config.loss.kl.temperature = 2.0
    return config


def network(name: str, known: Iterable[str], field: str) -> str:
    """Checks the name of a network.

    Args:
        name: to check.
        known: the names there are.
        field: what it is, for the message.

    Raises:
        ConfigError: it is not known, with the nearest one.
    """
    names = tuple(known)
    if name not in names:
        raise ConfigError(f"{field} {name!r}: unknown network{nearest(name, names)}")
    return name


def pair(argument: str, names: Iterable[str]) -> tuple[str, str]:
    """Splits `teacher-student` and checks both.

    Args:
        argument: of the config file.
        names: the networks there are.

    Raises:
        ConfigError: not two names joined by a hyphen, or an unknown one.
    """
    teacher, hyphen, student = argument.partition("-")
    if not hyphen:
        raise ConfigError(f"pair {argument!r}: must be teacher-student, as in resnet56-resnet20")
    return network(teacher, names, "teacher"), network(student, names, "student")
