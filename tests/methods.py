"""Small methods, states and batches that several tests train."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tgeo_jax import distill, losses, models, ratios, roles
from tgeo_jax.data import resident
from tgeo_jax.state import Batch, Teacher

NUM_CLASSES = 4
TEMPERATURE = 4.0
RATE = 0.1


def method(**changes) -> distill.Distillation:
    """TGeo-KD with a BatchNorm student and a linear teacher; any field can be changed."""
    teacher = models.build("mlp", NUM_CLASSES, hidden=())
    clean_view = resident.normalise((0.5,), (0.25,))
    fields = {
        "student": models.build("cnn", NUM_CLASSES, widths=(3,)),
        "num_classes": NUM_CLASSES,
        "role": roles.frozen(teacher),
        "soft_loss": losses.soft_loss("kl", temperature=TEMPERATURE),
        "ratio": ratios.tgeo(hidden=(4,)),
        "optimizer": optax.sgd(RATE, momentum=0.9),
        "fusion_optimizer": optax.sgd(1.0),
        "steps_per_epoch": 10,
        "num_epochs": 10,
        "training_view": resident.augment(clean_view, crop_padding=1, flip=False),
        "clean_view": clean_view,
    }
    return distill.Distillation(**{**fields, **changes})


def teacher() -> Teacher:
    module = models.build("mlp", NUM_CLASSES, hidden=())
    variables = jax.jit(module.init)(jax.random.key(7), jnp.zeros((1, 5, 5, 1)))
    means = jax.nn.softmax(jax.random.normal(jax.random.key(8), (NUM_CLASSES, NUM_CLASSES)))
    return Teacher(jax.tree.map(lambda leaf: 3 * leaf, variables), means)


def examples(count: int, seed: int = 0) -> Batch:
    """Random images whose brightness tells the class, so that there is something to learn."""
    random = np.random.RandomState(seed)
    labels = np.arange(count) % NUM_CLASSES
    images = random.randint(0, 60, (count, 5, 5, 1)) + 60 * labels[:, None, None, None]
    return Batch(jnp.asarray(images, jnp.uint8), jnp.asarray(labels, jnp.int32))


def start(chosen: distill.Distillation, seed: int = 0):
    return jax.jit(lambda: distill.init_state(chosen, seed, examples(1).images_BxHxWxC))()
