"""A ratio of one's own: two learned numbers say how much a teacher's margin at the label counts.

    python examples/own_ratio.py --workdir=runs/own_ratio

or, since this is a configuration file too (the teacher must be there then):

    python -m experiments.main --config=examples/own_ratio.py --workdir=runs/own_ratio/student \\
        --config.ratio.margin.initial_ratio=0.5
"""

import argparse
import math

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from tgeo_jax import config as configs
from tgeo_jax import generations, ratios
from tgeo_jax.data import sources

TEACHER = "runs/own_ratio/teacher"


def margin(*, initial_ratio: float = 0.8) -> ratios.FusionRatio:
    """`soft_i = alpha_i`, `hard_i = 1 - alpha_i`, `alpha_i = sigmoid(bias + slope m_i)`.

    `m_i = T_y - max_{k != y} T_k` in [-1, 1] is the teacher's margin at the label. `bias` and
    `slope` are trained by the hypergradient of the validation loss. Keyword-only arguments become
    `ratio.margin.*`; what is wrong with one is a ValueError, which names the field.
    """
    if not 0 < initial_ratio < 1:
        raise ValueError(f"initial_ratio={initial_ratio}: must lie strictly in (0, 1)")

    def init(key: jax.Array, num_classes: int) -> dict[str, jax.Array]:
        del key, num_classes
        logit = math.log(initial_ratio / (1 - initial_ratio))
        return {"bias": jnp.full((), logit), "slope": jnp.zeros(())}

    def weights(meta_params, situation: ratios.Situation) -> tuple[jax.Array, jax.Array]:
        # The trainer has stopped every gradient of the situation: a ratio is a constant to the
        # student, and `meta_params` is all that is differentiated here.
        probs_BxK = jax.nn.softmax(situation.teacher_logits_BxK)
        is_true_BxK = jax.nn.one_hot(situation.labels_B, probs_BxK.shape[-1], dtype=bool)
        true_B = jnp.max(jnp.where(is_true_BxK, probs_BxK, 0), axis=-1)
        other_B = jnp.max(jnp.where(is_true_BxK, 0, probs_BxK), axis=-1)
        alpha_B = jax.nn.sigmoid(meta_params["bias"] + meta_params["slope"] * (true_B - other_B))
        return 1 - alpha_B, alpha_B

    return ratios.FusionRatio(init, weights, reads_class_means=False)


ratios.RATIOS["margin"] = margin  # before config.default() is called


def get_config() -> ConfigDict:
    """Any loss and any role go with it."""
    config = configs.default()
    config.ratio.name = "margin"
    config.teacher.update(name="mlp", workdir=TEACHER)
    config.teacher.mlp.hidden = (256, 256)  # as it was trained
    config.student.name = "mlp"
    config.student.mlp.hidden = (32,)
    config.loss.kl.temperature = 2.0
    config.optimizer.schedule = "cosine"
    config.meta.optimizer.learning_rate = 2e-2  # two numbers, 600 steps
    config.train.update(epochs=30, checkpoint_every=10)
    return config


def get_teacher_config() -> ConfigDict:
    """It learns from labels of which 40 % are wrong, so that there is something to decide."""
    config = configs.default()
    config.role.name = "alone"
    config.student.name = "mlp"
    config.student.mlp.hidden = (256, 256)
    config.data.label_noise = 0.4
    config.optimizer.update(learning_rate=0.1, schedule="cosine")
    config.train.update(epochs=40, checkpoint_every=10)
    return config


def main(workdir: str) -> None:
    sources.prepare("digits")
    generations.run(get_teacher_config(), f"{workdir}/teacher")
    config = get_config()
    config.teacher.workdir = f"{workdir}/teacher"
    result = generations.run(config, f"{workdir}/student")
    samples = np.load(f"{workdir}/student/samples.npz")  # the ratio of every training sample
    alpha_N, right_N = samples["ratio"][0], samples["teacher_right"][0]
    print(f"teacher: test accuracy {result['teacher']['test_accuracy']:.3f}")
    print(f"student: test accuracy {result['test_accuracy']['last']['mean']:.3f}")
    print(f"mean ratio where the teacher is right {alpha_N[right_N].mean():.3f}")
    print(f"mean ratio where the teacher is wrong {alpha_N[~right_N].mean():.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", default="runs/own_ratio", help="folder of both runs")
    main(parser.parse_args().workdir)
