import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal

from tgeo_jax import models

CLASSES = 3
SMALL = {"mlp": {"hidden": (5,)}, "cnn": {"widths": (4, 6)}}


def images(seed=0, batch=4, height=8, width=8, channels=1):
    return np.random.RandomState(seed).randn(batch, height, width, channels).astype(np.float32)


def made(name, **options):
    """A small model with random parameters and the running statistics of a new one."""
    module = models.build(name, CLASSES, **(SMALL[name] | options))
    shapes = jax.eval_shape(module.init, jax.random.key(0), images())
    random = np.random.RandomState(1)

    def value(path, leaf):
        if path[-1].key in ("mean", "var"):
            return np.full(leaf.shape, path[-1].key == "var", np.float32)
        return 0.3 * random.randn(*leaf.shape).astype(np.float32)

    return module, jax.tree_util.tree_map_with_path(value, shapes)


@pytest.fixture(scope="module")
def cnn():
    return made("cnn")


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("shape", [(4, 8, 8, 1), (1, 6, 9, 3)])
@pytest.mark.parametrize("name", SMALL)
def test_logits_are_one_row_of_k_for_each_image(name, shape, train):
    module = models.build(name, CLASSES)

    def forward():
        variables = module.init(jax.random.key(0), jnp.zeros(shape))
        return module.apply(variables, jnp.zeros(shape), train=train, mutable=["batch_stats"])[0]

    assert jax.eval_shape(forward).shape == (shape[0], CLASSES)


@pytest.mark.parametrize(
    ("name", "collections"), [("mlp", {"params"}), ("cnn", {"params", "batch_stats"})]
)
def test_only_the_cnn_has_batch_statistics(name, collections):
    module = models.build(name, CLASSES)
    assert set(jax.eval_shape(module.init, jax.random.key(0), images())) == collections


@pytest.mark.parametrize("name", SMALL)
def test_evaluation_of_an_image_does_not_depend_on_its_companions(name):
    module, variables = made(name)
    evaluate = jax.jit(lambda x: module.apply(variables, x, train=False))
    both = evaluate(images())
    changed = images().copy()
    changed[1:] *= -3
    other = evaluate(changed)
    np.testing.assert_allclose(other[0], both[0], rtol=1e-5, atol=1e-6)
    assert np.abs(other[1] - both[1]).max() > 1e-3


def test_training_normalises_by_the_batch(cnn):
    module, variables = cnn
    train = jax.jit(lambda x: module.apply(variables, x, train=True, mutable=["batch_stats"])[0])
    changed = images().copy()
    changed[1:] *= -3
    first, second = train(images()), train(changed)
    assert np.abs(first[0] - second[0]).max() > 1e-3


def test_running_statistics_do_not_change_in_evaluation(cnn):
    module, variables = cnn
    evaluate = jax.jit(lambda x: module.apply(variables, x, train=False, mutable=["batch_stats"]))
    _, mutated = evaluate(images())
    jax.tree.map(np.testing.assert_array_equal, mutated["batch_stats"], variables["batch_stats"])


def convolved(batch, kernel):
    """3x3 convolution with zero padding by SciPy, one input channel."""
    maps = [
        [scipy.signal.correlate2d(image[..., 0], kernel[..., 0, k], "same") for image in batch]
        for k in range(kernel.shape[-1])
    ]
    return np.moveaxis(np.array(maps), 0, -1)


def test_running_statistics_move_a_tenth_of_the_way_in_training(cnn):
    module, variables = cnn
    train = jax.jit(lambda x: module.apply(variables, x, train=True, mutable=["batch_stats"]))
    _, mutated = train(images())
    found = mutated["batch_stats"]["BatchNorm_0"]
    maps = convolved(images(), np.asarray(variables["params"]["Conv_0"]["kernel"]))
    # From mean 0 and variance 1.
    np.testing.assert_allclose(found["mean"], 0.1 * maps.mean((0, 1, 2)), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(found["var"], 0.9 + 0.1 * maps.var((0, 1, 2)), rtol=1e-3)


def test_cnn_is_convolution_norm_relu_average_dense():
    module, variables = made("cnn", widths=(4,))
    params = jax.tree.map(np.asarray, variables["params"])
    statistics = {"mean": np.float32([0.1, -0.2, 0.3, 0]), "var": np.float32([1, 2, 0.5, 1])}
    x = convolved(images(), params["Conv_0"]["kernel"])
    x = (x - statistics["mean"]) / np.sqrt(statistics["var"] + 1e-5)
    x = x * params["BatchNorm_0"]["scale"] + params["BatchNorm_0"]["bias"]
    x = np.maximum(x, 0).mean((1, 2))
    expected = x @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"]
    variables = {"params": params, "batch_stats": {"BatchNorm_0": statistics}}
    np.testing.assert_allclose(
        jax.jit(module.apply)(variables, images()), expected, rtol=1e-3, atol=1e-5
    )


def test_every_convolution_after_the_first_halves_the_resolution():
    module = models.build("cnn", CLASSES, widths=(4, 6, 5))

    def seen():
        variables = module.init(jax.random.key(0), images())
        _, found = module.apply(
            variables, images(), capture_intermediates=True, mutable=["intermediates"]
        )
        return found["intermediates"]

    found = jax.eval_shape(seen)
    shapes = [found[f"Conv_{i}"]["__call__"][0].shape for i in range(3)]
    assert shapes == [(4, 8, 8, 4), (4, 4, 4, 6), (4, 2, 2, 5)]


def test_mlp_is_dense_relu_dense_over_flat_pixels():
    module, variables = made("mlp")
    params = jax.tree.map(np.asarray, variables["params"])
    x = images().reshape(4, 64)
    x = np.maximum(x @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"], 0)
    expected = x @ params["Dense_1"]["kernel"] + params["Dense_1"]["bias"]
    np.testing.assert_allclose(
        jax.jit(module.apply)(variables, images()), expected, rtol=1e-3, atol=1e-5
    )


def test_an_unknown_model_is_answered_with_the_nearest_or_the_known():
    with pytest.raises(ValueError, match=r"model 'cn' is unknown; did you mean 'cnn'\?"):
        models.build("cn", 10)
    with pytest.raises(ValueError, match=r"model 'zzz' is unknown; known: mlp, cnn"):
        models.build("zzz", 10)


@pytest.mark.parametrize(
    ("name", "option", "nearest"), [("mlp", "hiden", "hidden"), ("cnn", "width", "widths")]
)
def test_an_unknown_option_is_answered_with_the_nearest_of_that_model(name, option, nearest):
    said = f"model '{name}' has no option '{option}'; did you mean '{nearest}'"
    with pytest.raises(ValueError, match=said):
        models.build(name, 10, **{option: (4,)})


def test_the_parent_that_flax_adds_to_every_module_is_no_option():
    with pytest.raises(ValueError, match=r"model 'cnn' has no option 'parent'; known: widths$"):
        models.build("cnn", 10, parent=None)


@pytest.mark.parametrize("num_classes", [1, 0, -2])
def test_fewer_than_two_classes_raise(num_classes):
    with pytest.raises(ValueError, match=f"num_classes={num_classes}: .*at least 2 classes"):
        models.build("mlp", num_classes)
