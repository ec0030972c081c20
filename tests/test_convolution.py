"""Both spellings of a convolution are the same function, and so are their derivatives."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tgeo_jax import models
from tgeo_jax.models import convolution

CASES = {  # size, channels, features, kernel, strides, padding
    "same": ((6, 6), 2, 3, (3, 3), (1, 1), "SAME"),
    "same, strided": ((6, 7), 2, 3, (3, 3), (2, 2), "SAME"),
    "as PyTorch pads": ((8, 8), 2, 3, (3, 3), (2, 2), ((1, 1), (1, 1))),
    "uneven": ((7, 5), 3, 2, (2, 3), (2, 1), ((0, 2), (1, 0))),
    "valid": ((6, 6), 1, 4, (5, 5), (1, 1), "VALID"),
    "pointwise, strided": ((6, 6), 3, 4, (1, 1), (2, 2), ((0, 0), (0, 0))),
}


def _of_xla(x, w, strides, padding):
    names = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, w, strides, padding, dimension_numbers=names)


@pytest.mark.parametrize("name", CASES)
def test_patches_equal_xlas_convolution_in_value_and_both_derivatives(x64, name):
    (height, width), channels, features, kernel, strides, padding = CASES[name]
    x = jax.random.normal(jax.random.key(0), (2, height, width, channels), jnp.float64)
    w = jax.random.normal(jax.random.key(1), (*kernel, channels, features), jnp.float64)

    def ours(x, w):
        return convolution.convolve(x, w, strides, padding)

    assert not convolution.has_convolutions(ours, x, w)
    found, pull_back = jax.vjp(ours, x, w)
    expected, pull_back_expected = jax.vjp(lambda x, w: _of_xla(x, w, strides, padding), x, w)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)
    cotangent = jax.random.normal(jax.random.key(2), expected.shape, jnp.float64)
    for a, b in zip(pull_back(cotangent), pull_back_expected(cotangent), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)
    tangents = jax.jvp(ours, (x, w), (x, w))[1], 2 * expected  # bilinear
    np.testing.assert_allclose(*tangents, rtol=1e-12, atol=1e-12)


def test_large_and_grouped_convolutions_stay_xlas():
    x, w = jnp.ones((1, 32, 32, 16)), jnp.ones((3, 3, 16, 16))
    assert convolution.has_convolutions(
        lambda x, w: convolution.convolve(x, w, (1, 1), "SAME"), x, w
    )
    small, depthwise = jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 1, 2))
    grouped = lambda x: convolution.convolve(  # noqa: E731
        x, depthwise, (1, 1), "SAME", feature_group_count=2
    )
    assert convolution.has_convolutions(grouped, small)
    np.testing.assert_allclose(grouped(small)[0, :, :, 0].max(), 9.0)


@pytest.mark.parametrize(
    ("name", "side", "expected"),
    [("cnn", 8, False), ("resnet20", 8, False), ("resnet20", 32, True), ("mlp", 32, False)],
)
def test_which_networks_keep_convolutions_on_a_cpu(name, side, expected):
    images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    init = models.build(name, 10).init
    assert convolution.has_convolutions(init, jax.random.key(0), images) == expected


def test_on_an_accelerator_all_are_xlas(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    x, w = jnp.ones((1, 4, 4, 1)), jnp.ones((3, 3, 1, 1))
    assert convolution.has_convolutions(
        lambda x, w: convolution.convolve(x, w, (1, 1), "SAME"), x, w
    )
