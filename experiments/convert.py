"""Makes a teacher of a PyTorch checkpoint: a folder that `teacher.workdir` can name.

    python -m experiments.convert --name=resnet32x4 --checkpoint=ckpt_epoch_240.pth \\
        --num_classes=100 --workdir=runs/teachers/resnet32x4

Reading PyTorch's formats needs the extra: pip install 'tgeo_jax[torch]'.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Sequence

from absl import flags

from experiments import commandline
from tgeo_jax import convert, models, origins, storage
from tgeo_jax.data import sources
from tgeo_jax.errors import ConfigError, nearest

_NAME = flags.DEFINE_string("name", "", "Network, as in student.name and teacher.name.")
_CHECKPOINT = flags.DEFINE_string("checkpoint", "", "File: .pth, .pt or .safetensors.")
_WORKDIR = flags.DEFINE_string("workdir", "", "Folder to make.")
_NUM_CLASSES = flags.DEFINE_integer(
    "num_classes", 0, "K; by default 100 for nets of 32x32 images, 1000 for others.", lower_bound=0
)
_MEAN = flags.DEFINE_list("mean", [], "Its input normalisation by channel, of pixels in [0, 1].")
_STD = flags.DEFINE_list("std", [], "Likewise; by default those of the dataset's usual recipe.")


def main(argv: Sequence[str]) -> None:
    del argv
    name = _NAME.value
    if name not in (*models.SMALL, *models.LARGE):
        known = (*models.SMALL, *models.LARGE)
        raise ConfigError(f"--name={name!r}: no network to convert to{nearest(name, known)}")
    for flag, value in (("checkpoint", _CHECKPOINT.value), ("workdir", _WORKDIR.value)):
        if not value:
            raise ConfigError(f"--{flag}='': needed; see --help")
    small = name in models.SMALL
    usual = sources.CIFAR100_NORMALISATION if small else sources.IMAGENET_NORMALISATION
    mean, std = (
        _by_channel(flag, given) or fallback
        for flag, given, fallback in zip(
            ("mean", "std"), (_MEAN.value, _STD.value), usual, strict=True
        )
    )
    num_classes = _NUM_CLASSES.value or (100 if small else 1000)
    if num_classes < 2:
        raise ConfigError(f"--num_classes={num_classes}: a classifier needs at least 2 classes")
    variables = convert.from_torch(name, _CHECKPOINT.value, num_classes)
    folder = storage.path(_WORKDIR.value)
    origins.save_converted(
        folder, name, variables, source=pathlib.Path(_CHECKPOINT.value), mean=mean, std=std
    )
    print(
        f"{folder}: {name} with {num_classes} classes, inputs normalised by mean {mean} and std "
        f"{std}.\nUse it by --config.teacher.name={name} --config.teacher.workdir={folder}\n"
        "It was trained elsewhere: it may have seen the examples that a run here holds out for "
        "validation."
    )


def _by_channel(flag: str, given: list[str]) -> tuple[float, ...]:
    field = f"--{flag}={','.join(given)}"
    try:
        values = tuple(float(value) for value in given)
    except ValueError as error:
        raise ConfigError(f"{field}: must be numbers joined by commas") from error
    if values and len(values) != 3:
        raise ConfigError(f"{field}: must be three numbers, for red, green and blue")
    if not all(math.isfinite(value) and (flag == "mean" or value > 0) for value in values):
        raise ConfigError(f"{field}: must be finite" + (" and > 0" if flag == "std" else ""))
    return values


if __name__ == "__main__":
    commandline.run(main)
