import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tgeo_jax import config, optimizers


def section(**changes):
    plain = config.default().optimizer
    plain.update(learning_rate=0.1, momentum=0.0, weight_decay=0.0)
    plain.update(**changes)
    return plain


def rates(steps, steps_per_epoch=10, epochs=5, **changes):
    schedule = optimizers.schedule(section(**changes), steps_per_epoch, epochs)
    return [float(schedule(step)) for step in steps]


def walk(gradients, start, **changes):
    """Parameter after each of some steps, one scalar parameter."""
    optimizer = optimizers.build(section(**changes), 1, 100)
    param = jnp.float32(start)
    state = optimizer.init(param)
    path = []
    for gradient in gradients:
        update, state = optimizer.update(jnp.float32(gradient), state, param)
        param = optax.apply_updates(param, update)
        path.append(float(param))
    return path


def test_constant_schedule_never_changes():
    assert rates([0, 1, 49, 1000]) == pytest.approx([0.1] * 4)


def test_step_schedule_drops_at_the_first_step_of_its_epochs():
    found = rates([0, 19, 20, 39, 40, 49], schedule="step", drop_epochs=(2, 4))
    assert found == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


def test_step_schedule_multiplies_by_its_factor():
    found = rates([9, 10], schedule="step", drop_epochs=(1,), drop_factor=0.5)
    assert found == pytest.approx([0.1, 0.05])


def test_step_schedule_counts_its_epochs_from_the_start_of_warm_up():
    found = rates([10, 19, 20], schedule="step", drop_epochs=(2,), warmup_epochs=1.0)
    assert found == pytest.approx([0.1, 0.1, 0.01])


def test_cosine_schedule_is_half_a_cosine_over_training():
    steps = range(50)
    expected = [0.1 * (1 + math.cos(math.pi * step / 50)) / 2 for step in steps]
    assert rates(steps, schedule="cosine") == pytest.approx(expected, rel=1e-4, abs=1e-7)


def test_cosine_schedule_ends_near_zero():
    # 1/2 (1 + cos(pi 49/50)) = .001
    assert 0 < rates([49], schedule="cosine")[0] < 0.002 * 0.1


def test_warm_up_is_linear_from_zero():
    found = rates([0, 1, 5, 19, 20, 21], warmup_epochs=2.0)
    assert found == pytest.approx([0, 0.005, 0.025, 0.095, 0.1, 0.1])


def test_warm_up_may_be_part_of_an_epoch():
    assert rates([0, 1, 4, 5], warmup_epochs=0.5) == pytest.approx([0, 0.02, 0.08, 0.1])


def test_cosine_schedule_after_warm_up_still_ends_with_training():
    # 10 steps up, then 40 steps of cosine: half way at 30, at the end by 50.
    found = rates([10, 30, 50], schedule="cosine", warmup_epochs=1.0)
    assert found == pytest.approx([0.1, 0.05, 0.0], abs=1e-7)


def test_sgd_takes_the_rate_of_its_schedule():
    found = walk([1, 1, 1], 0, schedule="step", drop_epochs=(2,))
    # Steps of .1, .1 and .01.
    assert found == pytest.approx([-0.1, -0.2, -0.21])


@pytest.mark.parametrize(
    ("nesterov", "expected"),
    [
        # Step 1: 2 + .1 = 2.1; buffer 2.1; p = 1 - .21.
        # Step 2: 2 + .079 = 2.079; buffer .9 * 2.1 + 2.079 = 3.969; p = .79 - .3969.
        (False, [0.79, 0.3931]),
        # Step 1: 2.1 + .9 * 2.1 = 3.99; p = 1 - .399.
        # Step 2: 2 + .0601 = 2.0601; buffer 1.89 + 2.0601 = 3.9501;
        #         2.0601 + .9 * 3.9501 = 5.61519; p = .601 - .561519.
        (True, [0.601, 0.039481]),
    ],
)
def test_sgd_adds_weight_decay_before_momentum_as_pytorch_does(nesterov, expected):
    found = walk([2, 2], 1, momentum=0.9, weight_decay=0.1, nesterov=nesterov)
    assert found == pytest.approx(expected, rel=1e-5)


def test_clipping_scales_the_whole_gradient_to_the_norm():
    optimizer = optimizers.build(section(learning_rate=1.0, clip_norm=1.0), 1, 1)
    gradient = {"a": jnp.float32(3), "b": jnp.float32(4)}  # norm 5
    update, _ = optimizer.update(gradient, optimizer.init(gradient), gradient)
    assert jax.tree.map(float, update) == pytest.approx({"a": -0.6, "b": -0.8})


def test_clipping_leaves_a_short_gradient_alone():
    assert walk([0.5], 0, learning_rate=1.0, clip_norm=1.0) == pytest.approx([-0.5])


@pytest.mark.parametrize("norm", [10**18, 1e200])
def test_clipping_at_a_huge_norm_clips_nothing(norm):
    path = walk([0.5, -2.0], 0, learning_rate=1.0, clip_norm=norm)
    assert path == pytest.approx([-0.5, 1.5])


def test_clipping_does_not_count_weight_decay():
    # Gradient 3 is cut to 1, then decay .1 * 2 is added.
    found = walk([3], 2, learning_rate=1.0, clip_norm=1.0, weight_decay=0.1)
    assert found == pytest.approx([2 - 1.2])


def numpy_adam(gradients, start, rate, coupled, decoupled):
    first = second = 0.0
    param, path = np.float64(start), []
    for step, gradient in enumerate(gradients, 1):
        gradient = gradient + coupled * param
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        slope = (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
        param = param - rate * (slope + decoupled * param)
        path.append(param)
    return path


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_adam_takes_the_published_steps(name):
    gradients = [-0.5, 1.0, 0.25, -2.0]
    coupled, decoupled = {"adam": (0.5, 0.0), "adamw": (0.0, 0.5)}[name]
    expected = numpy_adam(gradients, 2.0, 0.1, coupled, decoupled)
    found = walk(gradients, 2.0, name=name, weight_decay=0.5)
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("adam", 1.9),  # sign(-.5 + .5 * 2) = 1: decay turns the first step round
        ("adamw", 2.0),  # sign(-.5) + .5 * 2 = 0: decay is added to it
    ],
)
def test_weight_decay_is_decoupled_in_adamw_only(name, expected):
    assert walk([-0.5], 2.0, name=name, weight_decay=0.5) == pytest.approx([expected])


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_derivative_of_the_update_at_a_zero_gradient_is_finite(name, weight_decay):
    # The hypergradient goes through the update; plain Adam has 0/0 here.
    optimizer = optimizers.build(section(name=name, weight_decay=weight_decay), 1, 1)
    param = jnp.float32(0)
    state = optimizer.init(param)
    derivative = jax.grad(lambda gradient: optimizer.update(gradient, state, param)[0])
    assert np.isfinite(derivative(jnp.float32(0)))


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_derivative_of_a_clipped_update_at_a_zero_gradient_is_finite(name):
    optimizer = optimizers.build(section(name=name, clip_norm=1.0), 1, 1)
    param = jnp.zeros(2)
    state = optimizer.init(param)
    derivative = jax.grad(lambda gradient: jnp.sum(optimizer.update(gradient, state, param)[0]))
    assert np.isfinite(derivative(jnp.zeros(2))).all()


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_every_optimizer_goes_downhill(name):
    path = walk([1.0, 1.0], 0.0, name=name)
    assert 0 > path[0] > path[1]


def test_a_schedule_follows_training_steps_where_updates_are_rarer():
    section = config.default().optimizer
    section.update(momentum=0.0, weight_decay=0.0, learning_rate=1.0, schedule="step")
    section.drop_epochs = (2,)
    optimizer = optimizers.build(section, steps_per_epoch=4, epochs=4, every=4)
    param, grad = jnp.asarray(0.0), jnp.asarray(1.0)
    state, found = optimizer.init(param), []
    for _ in range(4):  # at training steps 0, 4, 8, 12; the rate drops at step 8
        update, state = optimizer.update(grad, state, param)
        found.append(-float(update))
    np.testing.assert_allclose(found, [1.0, 1.0, 0.1, 0.1], rtol=1e-6)
