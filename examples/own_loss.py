"""A soft loss of one's own: the Jensen-Shannon divergence between student and teacher.

    python examples/own_loss.py --workdir=runs/own_loss

or, since this is a configuration file too (the teacher must be there then):

    python -m experiments.main --config=examples/own_loss.py --workdir=runs/own_loss/student \\
        --config.loss.jensen_shannon.temperature=4.0
"""

import argparse

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from tgeo_jax import config as configs
from tgeo_jax import generations, losses, numeric, shapes
from tgeo_jax.data import sources

TEACHER = "runs/own_loss/teacher"


def jensen_shannon(
    student_logits_BxK: jax.Array, teacher_logits_BxK: jax.Array, *, temperature: float = 2.0
) -> jax.Array:
    """`loss_i = T^2 / 2 [KL(p || m) + KL(q || m)]`, m = (p + q) / 2; one number per sample.

    The student comes first. Keyword-only arguments become `loss.jensen_shannon.*`; ask for
    `labels_B` as a third positional argument if the loss needs the labels, as `losses.dkd` does.
    """
    shapes.check(student_logits_BxK=student_logits_BxK, teacher_logits_BxK=teacher_logits_BxK)
    numeric.check_temperature(temperature)
    log_p_BxK, log_q_BxK = (
        jax.nn.log_softmax(numeric.at_least_float32(logits_BxK) / temperature)
        for logits_BxK in (teacher_logits_BxK, student_logits_BxK)
    )
    log_m_BxK = jnp.logaddexp(log_p_BxK, log_q_BxK) - jnp.log(2.0)
    parts_BxK = (jnp.exp(log) * (log - log_m_BxK) for log in (log_p_BxK, log_q_BxK))
    return temperature**2 / 2 * jnp.sum(sum(parts_BxK), axis=-1)


losses.SOFT_LOSSES["jensen_shannon"] = jensen_shannon  # before config.default() is called


def get_config() -> ConfigDict:
    """Any ratio and any role go with it; here TGeo-KD's ratio and a frozen teacher."""
    config = configs.default()
    config.loss.name = "jensen_shannon"
    config.ratio.name = "tgeo"
    config.teacher.update(name="mlp", workdir=TEACHER)
    config.student.name = "mlp"
    config.student.mlp.hidden = (16,)
    config.optimizer.schedule = "cosine"
    config.meta.optimizer.learning_rate = 3e-3
    config.train.update(epochs=20, checkpoint_every=10)
    return config


def get_teacher_config() -> ConfigDict:
    """The teacher is trained by the same program, alone."""
    config = configs.default()
    config.role.name = "alone"
    config.student.name = "mlp"
    config.optimizer.schedule = "cosine"
    config.train.update(epochs=20, checkpoint_every=10)
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
    parser.add_argument("--workdir", default="runs/own_loss", help="folder of both runs")
    main(parser.parse_args().workdir)
