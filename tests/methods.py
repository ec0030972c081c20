"""Small methods, states and batches that several tests train."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tgeo_jax import distill, losses, models, parallel, randomness, ratios, roles
from tgeo_jax.data import views
from tgeo_jax.dispatch import Dispatcher, Resident
from tgeo_jax.state import Batch, Teacher

NUM_CLASSES = 4
TEMPERATURE = 4.0
RATE = 0.1


def method(**changes) -> distill.Distillation:
    """TGeo-KD with a BatchNorm student and a linear teacher; any field can be changed."""
    teacher = models.build("mlp", NUM_CLASSES, hidden=())
    clean_view = views.normalise((0.5,), (0.25,))
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
        "training_view": views.augment(clean_view, crop_padding=1, flip=False),
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


@functools.cache
def _quick_options() -> dict[str, bool | int]:
    """XLA's older emitters, which compile several times faster; nothing where they are unknown."""
    options = {"xla_cpu_use_fusion_emitters": False, "xla_cpu_parallel_codegen_split_count": 1}
    try:
        jax.jit(lambda x: x + 1, compiler_options=options)(0.0)
    except Exception:  # whatever a backend says to an option that it does not know
        return {}
    return options


def quick_jit(function):
    """`jax.jit` for tests that compile many programs and run each a few times."""
    return jax.jit(function, compiler_options=_quick_options())


@functools.cache
def trained(module, seed: int):
    """Variables as of a trained network: not those of an initialisation, nor are its statistics."""
    with jax.ensure_compile_time_eval():  # kept for later: must not belong to a trace
        variables = module.init(jax.random.key(seed), jnp.zeros((1, 5, 5, 1)))
    random = np.random.RandomState(seed)
    away = lambda leaf: leaf + np.float32(0.5 * random.randn(*leaf.shape))  # noqa: E731
    positive = lambda leaf: np.float32(0.5 + random.rand(*leaf.shape))  # noqa: E731
    by_collection = {"params": away, "batch_stats": positive}
    return {
        name: jax.tree.map(by_collection[name], jax.device_get(values))
        for name, values in variables.items()
    }


def close(a, b, rtol=1e-5, atol=1e-6) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


def same(a, b) -> bool:
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: np.array_equal(x, y), a, b)))


def train_mode(module, params, batch_stats, images):
    """(logits, updated collections), without dropout."""
    variables = {"params": params, "batch_stats": batch_stats}
    return module.apply(variables, images, train=True, mutable=["batch_stats"])


def augmented(chosen: distill.Distillation, seed: int, step: int, batch: Batch):
    """What the networks see at a step, unless views are stored."""
    key = randomness.key(seed, step, randomness.Purpose.AUGMENT)
    return chosen.training_view(jax.random.split(key, len(batch.labels_B)), batch.images_BxHxWxC)


def hard_by_hand(logits, labels):
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)[:, 0]


def soft_by_hand(learner, target):
    """T^2 KL(target, learner) of each sample, the target constant."""
    p = jax.nn.softmax(jax.lax.stop_gradient(target) / TEMPERATURE)
    log_q = jax.nn.log_softmax(learner / TEMPERATURE)
    return TEMPERATURE**2 * jnp.sum(p * (jnp.log(p) - log_q), axis=-1)


def dispatch(chosen, states, frozen: Teacher, data: Resident, num_steps: int, meta_batch_size=8):
    """Some steps of several seeds on one device: (states, outcome)."""
    mesh = parallel.make_mesh(1, jax.devices()[:1])
    dispatcher = Dispatcher(chosen, mesh, 8, meta_batch_size)
    return jax.device_get(dispatcher.run(states, frozen, data, num_steps))


def failed(outcome) -> list[list[str]]:
    """What a dispatch blamed, seed by seed."""
    (seeds,) = next(iter(outcome.failed.values())).shape
    return [[name for name, bad in outcome.failed.items() if bad[seed]] for seed in range(seeds)]
