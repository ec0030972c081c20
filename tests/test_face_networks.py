"""Networks of faces: their sizes by hand, their numbers by PyTorch, their cosines."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.methods import close, quick_jit
from tests.test_zoo import multiply_adds
from tgeo_jax import models
from tgeo_jax.models.cosine import CosineHead, normalised

TINY = {"iresnet": {"widths": (4, 4, 6), "depths": (2, 1), "embedding": 8}, "mobilefacenet": {}}


class Count:
    """Parameters and multiply-adds of a backbone, added up layer by layer from its table."""

    def __init__(self, channels=3, side=112):
        self.width, self.side, self.parameters, self.products = channels, side, 0, 0

    def conv(self, kernel, features, strides=1, *, prelu=False, depthwise=False):
        """A convolution without bias, its norm, and perhaps a PReLU."""
        weights = kernel * kernel * features * (1 if depthwise else self.width)
        self.side = math.ceil(self.side / strides)
        self.parameters += weights + (2 + prelu) * features
        self.products += self.side**2 * weights
        self.width = features

    def linear(self, fan_in, features):
        self.parameters += fan_in * features
        self.products += fan_in * features


def iresnet(depths, widths=(64, 64, 128, 256, 512), embedding=512):
    count = Count()
    count.conv(3, widths[0], prelu=True)
    for depth, planes in zip(depths, widths[1:], strict=True):
        for index in range(depth):
            strides, before, side = (2 if index == 0 else 1), count.width, count.side
            count.parameters += 2 * before  # the first norm
            count.conv(3, planes, prelu=True)
            count.conv(3, planes, strides)
            if index == 0:
                after, count.width, count.side = count.width, before, side
                count.conv(1, planes, strides)
                assert count.width == after
    count.parameters += 2 * count.width
    count.linear(count.side**2 * count.width, embedding)
    # Bias, and the last norm's: the original keeps a scale of 1 for each number besides.
    count.parameters += 2 * embedding
    return count


def mobilefacenet(embedding):
    """Table 1 of the paper: (expansion, channels, repeats, stride)."""
    count = Count()
    count.conv(3, 64, 2, prelu=True)
    count.conv(3, 64, prelu=True, depthwise=True)
    for expansion, channels, repeats, first in (
        (2, 64, 5, 2),
        (4, 128, 1, 2),
        (2, 128, 6, 1),
        (4, 128, 1, 2),
        (2, 128, 2, 1),
    ):
        for repeat in range(repeats):
            inside = expansion * count.width
            count.conv(1, inside, prelu=True)
            count.conv(3, inside, first if repeat == 0 else 1, prelu=True, depthwise=True)
            count.conv(1, channels)
    count.conv(1, 512, prelu=True)
    assert count.side == 7
    count.conv(7, 512, 7, depthwise=True)
    count.linear(512, embedding)
    count.parameters += 2 * embedding
    return count


# By the functions above; the published 24.0, 43.6 and 0.99 million are these, rounded.
COUNTS = [
    ("iresnet18", {}, iresnet((2, 2, 2, 2)), 24_025_088),
    ("iresnet50", {}, iresnet((3, 4, 14, 3)), 43_590_336),
    ("mobilefacenet", {"embedding": 128}, mobilefacenet(128), 1_003_136),
    ("mobilefacenet", {}, mobilefacenet(512), 1_200_512),
]


@pytest.mark.parametrize(("name", "options", "by_hand", "count"), COUNTS)
def test_a_backbone_has_the_size_and_cost_of_the_published_one(name, options, by_hand, count):
    module = models.build(name, 7, **options)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 112, 112, 3)))
    found = {
        part: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(values))
        for part, values in shapes["params"].items()
    }
    assert found == {"features": count, "head": 7 * module.embedding}
    assert by_hand.parameters == count
    images = jnp.zeros((1, 112, 112, 3))
    program = jax.make_jaxpr(lambda v: module.apply(v, images, method="embed"))(shapes)
    assert multiply_adds(program.jaxpr) == by_hand.products


@pytest.mark.parametrize("shape", [(112, 112, 3), (112, 92, 1), (33, 20, 1)])
@pytest.mark.parametrize("name", models.FACES)
def test_images_of_any_size_have_logits_and_embeddings(name, shape):
    module = models.build(name, 5, embedding=24)
    images = jnp.zeros((2, *shape))
    variables = jax.eval_shape(module.init, jax.random.key(0), images)
    logits, embeddings = jax.eval_shape(
        lambda v: (module.apply(v, images), module.apply(v, images, method="embed")), variables
    )
    assert (logits.shape, embeddings.shape) == ((2, 5), (2, 24))


def made(name, precision="float32", **options):
    """A network with random parameters and statistics, and images for it."""
    module = models.build(name, 3, precision=precision, **(TINY[name] | options))
    random = np.random.RandomState(0)
    images = random.randn(3, 17, 12, 2).astype(np.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), images)

    def value(path, leaf):
        drawn = random.randn(*leaf.shape).astype(np.float32)
        if path[-1].key == "var":
            return 0.5 + np.abs(drawn)
        fan_in = math.prod(leaf.shape[:-1]) if path[-1].key == "kernel" else 4
        return drawn / np.float32(math.sqrt(fan_in))

    return module, jax.tree_util.tree_map_with_path(value, shapes), images


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", TINY)
def test_logits_are_scaled_cosines_between_embeddings_and_weights(name, precision):
    module, variables, images = made(name, precision, soft_scale=7.0)
    logits, embeddings = quick_jit(
        lambda v: (module.apply(v, images), module.apply(v, images, method="embed"))
    )(variables)
    assert logits.dtype == embeddings.dtype == jnp.float32
    weight = np.float64(variables["params"]["head"]["weight"])
    e = np.float64(embeddings)
    lengths = np.linalg.norm(e, axis=1)[:, None] * np.linalg.norm(weight, axis=1)
    np.testing.assert_allclose(logits, 7 * e @ weight.T / lengths, rtol=1e-4, atol=1e-5)


def test_the_iresnet_is_that_of_pytorch():
    torch = pytest.importorskip("torch")
    nn = torch.nn

    class Block(nn.Module):
        def __init__(self, width, planes, strides):
            super().__init__()
            self.bn1 = nn.BatchNorm2d(width)
            self.conv1 = nn.Conv2d(width, planes, 3, 1, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(planes)
            self.prelu = nn.PReLU(planes)
            self.conv2 = nn.Conv2d(planes, planes, 3, strides, 1, bias=False)
            self.bn3 = nn.BatchNorm2d(planes)
            if strides > 1:
                conv = nn.Conv2d(width, planes, 1, strides, bias=False)
                self.downsample = nn.Sequential(conv, nn.BatchNorm2d(planes))

        def forward(self, x):
            y = self.prelu(self.bn2(self.conv1(self.bn1(x))))
            aside = self.downsample(x) if hasattr(self, "downsample") else x
            return self.bn3(self.conv2(y)) + aside

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1 = nn.Conv2d(2, 4, 3, 1, 1, bias=False)
            self.bn1, self.prelu = nn.BatchNorm2d(4), nn.PReLU(4)
            self.layer1 = nn.Sequential(Block(4, 4, 2), Block(4, 4, 1))
            self.layer2 = nn.Sequential(Block(4, 6, 2))
            self.bn2, self.fc = nn.BatchNorm2d(6), nn.Linear(6 * 5 * 3, 8)
            self.features = nn.BatchNorm1d(8)

        def forward(self, x):
            x = self.prelu(self.bn1(self.conv1(x)))
            x = self.bn2(self.layer2(self.layer1(x)))
            return self.features(self.fc(torch.flatten(x, 1)))

    module, variables, images = made("iresnet", dropout=0.0)
    net = Net()
    state = {"features.weight": torch.ones(8)}
    for collection in ("params", "batch_stats"):
        leaves = jax.tree_util.tree_leaves_with_path(variables[collection]["features"])
        for path, leaf in leaves:
            *parts, last = [key.key.replace("_", ".") for key in path]
            names = {"mean": "running_mean", "var": "running_var", "bias": "bias"}
            tensor = leaf
            if last == "kernel":
                tensor = leaf.transpose(3, 2, 0, 1) if leaf.ndim == 4 else leaf.T
            state[".".join([*parts, names.get(last, "weight")])] = torch.tensor(tensor)
    missing, unexpected = net.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name.endswith("num_batches_tracked") for name in missing)
    pixels = torch.tensor(images.transpose(0, 3, 1, 2))
    for train in (False, True):
        with torch.no_grad():
            expected = net.train(train)(pixels).numpy()
        found, _ = quick_jit(
            lambda v, train=train: module.apply(
                v, images, train=train, method="embed", mutable=["batch_stats"]
            )
        )(variables)
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=2e-4)


def test_dropout_is_of_the_embedding_and_in_training_alone():
    module, variables, images = made("iresnet", dropout=0.5, widths=(3, 3), depths=(1,))

    def run(train, seed):
        rngs = {"dropout": jax.random.key(seed)}
        return module.apply(variables, images, train=train, rngs=rngs, mutable=["batch_stats"])[0]

    first, second = quick_jit(lambda: (run(True, 0), run(True, 1)))()
    assert np.abs(first - second).max() > 1e-3
    np.testing.assert_array_equal(*quick_jit(lambda: (run(False, 0), run(False, 1)))())


@pytest.mark.parametrize("name", TINY)
def test_recomputed_blocks_have_the_same_variables(name):
    plain, remat = (models.build(name, 3, remat=r, **TINY[name]) for r in (False, True))
    images = jnp.zeros((2, 17, 12, 2))
    there, here = (jax.eval_shape(m.init, jax.random.key(0), images) for m in (plain, remat))
    assert jax.tree.structure(there) == jax.tree.structure(here)
    assert jax.tree.leaves(there) == jax.tree.leaves(here)
    programs = [
        str(jax.make_jaxpr(lambda v, m=m: m.apply(v, images))(there)) for m in (plain, remat)
    ]
    assert ["remat" in program for program in programs] == [False, True]


def test_recomputed_blocks_give_the_same_gradients():
    plain, variables, images = made("iresnet", widths=(3, 3), depths=(1,))
    remat = models.build("iresnet", 3, remat=True, widths=(3, 3), depths=(1,), embedding=8)

    def gradients(module):
        def loss(params):
            full = {**variables, "params": params}
            rngs = {"dropout": jax.random.key(0)}
            logits, _ = module.apply(full, images, train=True, mutable=["batch_stats"], rngs=rngs)
            return jnp.sum(jnp.sin(logits))

        return quick_jit(jax.grad(loss))(variables["params"])

    close(gradients(remat), gradients(plain), rtol=1e-3, atol=1e-4)


def test_an_embedding_of_zero_has_finite_derivatives():
    head = CosineHead(3, 16.0)
    variables = head.init(jax.random.key(0), jnp.ones((1, 4)))
    grads = jax.grad(lambda e: jnp.sum(head.apply(variables, e)))(jnp.zeros((1, 4)))
    assert np.isfinite(grads).all()
    np.testing.assert_array_equal(normalised(jnp.zeros(3)), np.zeros(3))


def test_published_networks_let_their_depth_be():
    with pytest.raises(ValueError, match=r"model 'iresnet18' has no option 'depths'; known: emb"):
        models.build("iresnet18", 10, depths=(1, 1, 1, 1))
    with pytest.raises(ValueError, match=r"zip\(\)"):
        models.build("iresnet", 10, depths=(1,)).init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
