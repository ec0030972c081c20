"""Precision, roots and refusals that every loss relies on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tgeo_jax import numeric


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (jnp.bfloat16, jnp.float32),
        (jnp.float16, jnp.float32),
        (jnp.float32, jnp.float32),
        (jnp.float64, jnp.float64),
        (jnp.int32, jnp.float32),
        (bool, jnp.float32),
    ],
)
def test_at_least_float32_widens_and_never_narrows(x64, given, expected):
    found = numeric.at_least_float32(jnp.asarray([0, 1, 1], given))
    assert found.dtype == expected
    np.testing.assert_array_equal(found, [0, 1, 1])


def test_at_least_float32_keeps_every_bit_of_a_double(x64):
    assert numeric.at_least_float32(np.float64([1 + 1e-15]))[0] > 1


def test_safe_sqrt_is_the_square_root():
    values = np.float32([0, 1e-30, 0.25, 2, 9e10])
    np.testing.assert_allclose(numeric.safe_sqrt(values), np.sqrt(values), rtol=1e-6)


def test_safe_sqrt_has_the_derivative_of_the_square_root_except_at_zero(x64):
    values = np.float64([0.0, 0.25, 2.0, 9e10])
    found = jax.vmap(jax.grad(numeric.safe_sqrt))(values)
    np.testing.assert_allclose(found, [0, *(0.5 / np.sqrt(values[1:]))], rtol=1e-12)


def test_safe_sqrt_has_finite_second_derivatives_at_zero():
    # Forward over reverse, as in a meta-gradient.
    _, found = jax.jvp(jax.grad(numeric.safe_sqrt), (0.0,), (1.0,))
    assert found == 0


def test_safe_sqrt_of_what_rounding_made_negative_is_zero():
    value, slope = jax.value_and_grad(numeric.safe_sqrt)(-1e-9)
    assert (value, slope) == (0, 0)


@pytest.mark.parametrize("temperature", [0, 0.0, -2.5, float("nan")])
def test_check_temperature_refuses_what_is_not_positive(temperature):
    with pytest.raises(ValueError, match=rf"^temperature={temperature}: must be > 0 \(4 is usual"):
        numeric.check_temperature(temperature)


def test_check_temperature_names_the_field():
    with pytest.raises(ValueError, match=r"^difficulty_temperature=-1: must be > 0"):
        numeric.check_temperature(-1, "difficulty_temperature")


@pytest.mark.parametrize("temperature", [1e-9, 1, 4.0, float("inf")])
def test_check_temperature_accepts_what_is_positive(temperature):
    numeric.check_temperature(temperature)


def test_check_choice_names_field_value_and_the_known_ones():
    with pytest.raises(ValueError, match=r"^mode='up': use one of left, right$"):
        numeric.check_choice("mode", "up", ("left", "right"))


def test_check_choice_accepts_a_known_one():
    numeric.check_choice("mode", "left", ("left", "right"))
