"""A meta-objective of one's own: the ratio of the teacher that makes the worst class better.

    python examples/own_meta_objective.py

The trainer's outer loss is the mean loss on held-out samples. `bilevel.one_step` takes any other:
here a smooth maximum over the classes' mean losses. To make the two disagree, 40 % of the training
labels are wrong, and the teacher is right except that it takes 3s for 8s; what is learned is one
number, the ratio of the teacher for all samples.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tgeo_jax import bilevel, losses, models
from tgeo_jax.data import sources, views

NUM_CLASSES, BATCH, STEPS, TEMPERATURE = 10, 64, 600, 2.0


def mean_loss(logits_BxK: jax.Array, labels_B: jax.Array) -> jax.Array:
    """What the trainer minimises: the mean over samples."""
    return jnp.mean(losses.cross_entropy(logits_BxK, labels_B))


def worst_class(logits_BxK: jax.Array, labels_B: jax.Array) -> jax.Array:
    """Smooth maximum over the classes' mean losses: `s log sum_c exp(L_c / s)`, s = 0.2."""
    loss_B = losses.cross_entropy(logits_BxK, labels_B)
    is_class_KxB = jax.nn.one_hot(labels_B, NUM_CLASSES).T
    count_K = is_class_KxB.sum(axis=1)
    loss_K = is_class_KxB @ loss_B / jnp.maximum(count_K, 1)
    return 0.2 * jax.nn.logsumexp(loss_K / 0.2, b=count_K > 0, axis=0)


def train_teacher(images: jax.Array, labels: np.ndarray):
    """A network's logits, as it was taught by the true labels, but with 8 for every 3."""
    taught = jnp.asarray(np.where(labels == 3, 8, labels))
    module, optimizer = models.build("mlp", NUM_CLASSES, hidden=(64,)), optax.adam(3e-3)

    def step(carry, _):
        variables, state = carry
        grads = jax.grad(lambda v: mean_loss(module.apply(v, images), taught))(variables)
        updates, state = optimizer.update(grads, state)
        return (optax.apply_updates(variables, updates), state), None

    variables = module.init(jax.random.key(1), images[:1])
    start = (variables, optimizer.init(variables))
    (variables, _), _ = jax.jit(lambda s: jax.lax.scan(step, s, length=200))(start)
    return module.apply(variables, images)


def distil(outer_objective, train, validation, teacher_logits_NxK: jax.Array):
    """Trains the student, and by the outer objective the ratio: (module, variables, alpha)."""
    images, labels = train
    student = models.build("mlp", NUM_CLASSES, hidden=(16,))
    sgd, adam = optax.sgd(0.1, momentum=0.9), optax.adam(2e-2)

    def step(carry, key):
        params, opt_state, logit, meta_state = carry
        chosen = jax.random.randint(key, (BATCH,), 0, len(labels))

        def inner_loss(params, logit):
            logits_BxK = student.apply(params, images[chosen])
            hard_B = losses.cross_entropy(logits_BxK, labels[chosen])
            soft_B = losses.kl(logits_BxK, teacher_logits_NxK[chosen], temperature=TEMPERATURE)
            alpha = jax.nn.sigmoid(logit)
            return jnp.mean((1 - alpha) * hard_B + alpha * soft_B)

        def outer_loss(params):
            return outer_objective(student.apply(params, validation[0]), validation[1])

        found = bilevel.one_step(inner_loss, outer_loss, params, logit, sgd, opt_state)
        updates, meta_state = adam.update(found.meta_grads, meta_state)
        logit = optax.apply_updates(logit, updates)
        return (found.params, found.opt_state, logit, meta_state), None

    params, logit = student.init(jax.random.key(2), images[:1]), jnp.zeros(())
    start = (params, sgd.init(params), logit, adam.init(logit))
    keys = jax.random.split(jax.random.key(3), STEPS)
    (params, _, logit, _), _ = jax.jit(lambda s, k: jax.lax.scan(step, s, k))(start, keys)
    return student, params, jax.nn.sigmoid(logit)


def main() -> None:
    sources.prepare("digits")
    noisy, clean = sources.load("digits", label_noise=0.4), sources.load("digits")
    view = views.clean(clean)
    train, validation, test = (
        (view(jnp.asarray(split.images)), jnp.asarray(split.labels))
        for split in (noisy.train, noisy.validation, noisy.test)
    )
    teacher_logits_NxK = train_teacher(train[0], clean.train.labels)
    for name, objective in (("mean loss", mean_loss), ("worst class", worst_class)):
        student, params, alpha = distil(objective, train, validation, teacher_logits_NxK)
        right_N = student.apply(params, test[0]).argmax(axis=1) == test[1]
        recall_K = np.array([np.mean(right_N[test[1] == c]) for c in range(NUM_CLASSES)])
        print(
            f"{name}: ratio {alpha:.3f}, worst recall {recall_K.min():.3f} "
            f"(class {recall_K.argmin()}), mean recall {recall_K.mean():.3f}"
        )


if __name__ == "__main__":
    main()
