"""A role of one's own: a frozen teacher that is asked about several shifts of an image.

    python examples/own_role.py --workdir=runs/own_role

or, since this is a configuration file too (the teacher must be there then):

    python -m experiments.main --config=examples/own_role.py --workdir=runs/own_role/student \\
        --config.role.shifted.reach=2
"""

import argparse
import itertools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from tgeo_jax import config as configs
from tgeo_jax import generations, roles
from tgeo_jax.data import sources

TEACHER = "runs/own_role/teacher"


def shifted(teacher: nn.Module | None, *, reach: int = 1) -> roles.Role:
    """`t_i = log mean_shift softmax(f_T(shift x_i))` over all shifts of at most `reach` pixels.

    `teach(variables, inputs)` is all that a role of a frozen teacher needs: the trainer loads the
    variables from `teacher.workdir` because of `needs_trained`. Keyword-only arguments become
    `role.shifted.*`; a ValueError should name its field in full.
    """
    if teacher is None:
        raise ValueError("role.name='shifted' needs a teacher: set teacher.name")
    if reach < 0:
        raise ValueError(f"role.shifted.reach={reach}: must be >= 0; 0 is role.name='frozen'")
    shifts = list(itertools.product(range(-reach, reach + 1), repeat=2))

    def teach(variables: Any, images_BxHxWxC: jax.Array) -> jax.Array:
        logits_SxBxK = jnp.stack(
            [
                teacher.apply(variables, jnp.roll(images_BxHxWxC, shift, (1, 2)), train=False)
                for shift in shifts
            ]
        )
        return jax.lax.stop_gradient(roles.mean_prediction(logits_SxBxK))

    return roles.Role(teach=teach, needs_trained=True)


roles.ROLES["shifted"] = shifted  # before config.default() is called


def get_config() -> ConfigDict:
    """Any loss and any ratio go with it."""
    config = configs.default()
    config.role.name = "shifted"
    config.teacher.update(name="mlp", workdir=TEACHER)
    config.student.name = "mlp"
    config.student.mlp.hidden = (16,)
    config.loss.kl.temperature = 2.0
    config.optimizer.schedule = "cosine"
    config.train.update(epochs=20, checkpoint_every=10)
    return config


def get_teacher_config() -> ConfigDict:
    """Trained on shifted images, or it would know nothing of them."""
    config = configs.default()
    config.role.name = "alone"
    config.student.name = "mlp"
    config.data.crop_padding = 1
    config.optimizer.schedule = "cosine"
    config.train.update(epochs=40, checkpoint_every=10)
    return config


def main(workdir: str) -> None:
    sources.prepare("digits")
    taught = generations.run(get_teacher_config(), f"{workdir}/teacher")
    config = get_config()
    config.teacher.workdir = f"{workdir}/teacher"
    found = generations.run(config, f"{workdir}/student")
    for name, result in (("teacher", taught), ("student", found)):
        print(f"{name}: test accuracy {result['test_accuracy']['last']['mean']:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", default="runs/own_role", help="folder of both runs")
    main(parser.parse_args().workdir)
