"""With `remat` a network computes what it did before, and keeps less for its backward pass."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import jaxprs_in_params

from tests import methods
from tgeo_jax import assemble, bilevel, distill, models, parallel
from tgeo_jax import config as configs
from tgeo_jax.dispatch import Resident
from tgeo_jax.errors import ConfigError
from tgeo_jax.models.build import default_options
from tgeo_jax.models.resnet import ResNet
from tgeo_jax.models.row_encoder import RowEncoder
from tgeo_jax.models.vit import ViT
from tgeo_jax.models.wrn import WideResNet

K = methods.NUM_CLASSES
WITHOUT_BLOCKS = (
    "mlp", "cnn", "vgg8", "vgg11", "vgg13", "vgg16", "vgg19", "wide_deep", "deepfm", "dcn_v2",
)  # fmt: skip
# Blocks of one network of each kind, as their papers count them.
BLOCKS = {
    "resnet56": 27,
    "wrn_16_1": 6,
    "ResNet50": 16,
    "MobileNetV2": 17,
    "ShuffleV1": 16,
    "ShuffleV2": 16,
    "mobilenetv1": 13,
    "mobilenetv2": 17,
    "deit_tiny": 12,
    "row_encoder": 4,
}
# One of each kind of block, small enough to compile: (network, side of its images).
TINY = {
    "basic": (ResNet(K, (1, 1), (3, 3, 4)), 5),
    "bottleneck": (ResNet(K, (1, 1), (3, 2, 2), bottleneck=True), 5),
    "wide": (WideResNet(K, 10, 1), 5),
    "transformer": (ViT(K, width=6, depth=2, heads=2), 16),
    "rows": (RowEncoder(K, layers=2, width=6, heads=2, norm="post"), 3),
}


def with_remat(module):
    return dataclasses.replace(module, remat=True)


def shape_of(module, side, batch):
    """Of images, or of rows with `side` features."""
    return (batch, side) if isinstance(module, RowEncoder) else (batch, side, side, 3)


def shapes(module, side, batch=2):
    images = jax.ShapeDtypeStruct(shape_of(module, side, batch), jnp.float32)
    return images, jax.eval_shape(module.init, jax.random.key(0), images)


def double(tree):
    floats = lambda x: jnp.issubdtype(x.dtype, jnp.floating)  # noqa: E731
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float64) if floats(x) else x, tree)


def recomputed(jaxpr) -> int:
    """Calls in a traced program that are marked to be run again."""
    inner = sum(recomputed(part) for e in jaxpr.eqns for part in jaxprs_in_params(e.params))
    return inner + sum("prevent_cse" in e.params for e in jaxpr.eqns)


@pytest.mark.parametrize("name", models.MODELS)
def test_every_network_keeps_its_variables_or_says_that_it_has_no_blocks(name):
    if name in WITHOUT_BLOCKS:
        said = rf"^remat=True: model '{name}' has no blocks to recompute; use remat=False, or a"
        with pytest.raises(ValueError, match=said):
            models.build(name, K, remat=True)
        return
    side = 32 if name in models.SMALL else 64
    plain, thrifty = models.build(name, K), models.build(name, K, remat=True)
    assert (plain.remat, thrifty.remat) == (False, True)
    assert shapes(plain, side)[1] == shapes(thrifty, side)[1]


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(("name", "blocks"), BLOCKS.items())
def test_every_block_is_recomputed_and_nothing_else(name, blocks, train):
    for remat in (False, True):
        module = models.build(name, K, remat=remat)
        images, variables = shapes(module, 32)
        apply = functools.partial(module.apply, train=train, mutable=["batch_stats"])
        program = jax.make_jaxpr(apply)(variables, images)
        assert recomputed(program.jaxpr) == remat * blocks


def test_remat_is_no_option_of_a_network():
    for name in models.MODELS:
        assert "remat" not in default_options(name)


@pytest.mark.parametrize("name", TINY)
def test_logits_statistics_and_gradients_are_those_without(name, x64):
    module, side = TINY[name]
    images = np.random.RandomState(0).randn(*shape_of(module, side, 6))

    def all_of_it(module):
        variables = module.init(jax.random.key(0), images)

        def loss(params):
            full = {**double(variables), "params": params}
            logits, updated = module.apply(full, images, train=True, mutable=["batch_stats"])
            return jnp.mean(jax.nn.log_softmax(logits)[:, 0] ** 2), (logits, updated)

        found = jax.value_and_grad(loss, has_aux=True)(double(variables["params"]))
        return variables, found, module.apply(double(variables), images)

    expected, found = (
        methods.quick_jit(functools.partial(all_of_it, net))()
        for net in (module, with_remat(module))
    )
    assert methods.same(expected[0], found[0])  # drawn from the same random numbers
    methods.close(expected[1:], found[1:], rtol=1e-9, atol=1e-12)


def _products(function, *args) -> int:
    """Convolutions and matrix products in a traced program."""

    def count(jaxpr):
        inner = sum(count(part) for e in jaxpr.eqns for part in jaxprs_in_params(e.params))
        names = [equation.primitive.name for equation in jaxpr.eqns]
        return inner + names.count("conv_general_dilated") + names.count("dot_general")

    return count(jax.make_jaxpr(function)(*args).jaxpr)


def test_each_pass_over_what_is_not_kept_costs_one_more_forward_pass():
    in_blocks = 2 + 3  # convolutions, one of which projects
    sgd = optax.sgd(0.1)
    found = []
    for net in (TINY["basic"][0], with_remat(TINY["basic"][0])):
        images, variables = shapes(net, 5)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), variables)

        def loss(params, meta, net=net, shape=images.shape, stats=zeros["batch_stats"]):
            full = {"params": params, "batch_stats": stats}
            logits, _ = net.apply(full, jnp.zeros(shape), train=True, mutable=["batch_stats"])
            return jnp.mean(meta * jax.nn.log_softmax(logits)[:, 0])

        def hypergradient(params, meta, loss=loss):
            outer = functools.partial(loss, meta=1.0)
            return bilevel.one_step(loss, outer, params, meta, sgd, sgd.init(params)).meta_grads

        params = zeros["params"]
        found.append([_products(f, params, 1.0) for f in (loss, jax.grad(loss), hypergradient)])
    plain, thrifty = np.array(found)
    # The inner gradient, the outer one, and the pass along the inner one.
    assert list(thrifty - plain) == [0, in_blocks, 3 * in_blocks]


def _step(student, order, estimator):
    """A step with a hypergradient, which the fusion's new parameters show: SGD at a rate of 1."""
    view = lambda keys, images: images.astype(jnp.float64) / 64  # noqa: E731
    method = methods.method(
        student=student,
        order=order,
        estimator=estimator,
        training_view=view,
        clean_view=functools.partial(view, None),
    )
    state = methods.start(method)
    random = np.random.RandomState(0)  # a fresh fusion network hardly has a gradient
    fusion = jax.tree.map(lambda x: random.randn(*x.shape), state.fusion.params)
    state = double(state.replace(fusion=state.fusion.replace(params=fusion)))
    teacher = double(methods.teacher())
    step = methods.quick_jit(distill.train_step(method, teacher))
    stepped, _ = step(state, methods.examples(6), methods.examples(8, seed=1))
    moved = jax.tree.map(
        lambda a, b: np.abs(a - b).max(), state.fusion.params, stepped.fusion.params
    )
    assert min(jax.tree.leaves(moved)) > 1e-7
    return stepped


@pytest.mark.parametrize(
    ("order", "estimator"),
    [*((order, "mixed") for order in distill.ORDERS), (distill.ORDERS[0], "reverse")],
)
def test_a_bilevel_step_is_that_without(order, estimator, x64):
    student = TINY["basic"][0]
    expected = _step(student, order, estimator)
    found = _step(with_remat(student), order, estimator)
    # The ratio looks at probabilities in float32.
    methods.close(expected.student, found.student, rtol=1e-8, atol=1e-10)
    methods.close(expected.fusion, found.fusion, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("order", ["student_first", "prequential"])
def test_steps_in_a_scan_and_seeds_side_by_side_are_those_without(order):
    data = Resident(methods.examples(24), methods.examples(16, seed=1))

    def after(student):
        method = methods.method(student=student, order=order, optimizer=optax.sgd(0.01))
        images = data.train.images_BxHxWxC[:1]
        init = jax.vmap(
            lambda seed: distill.init_state(method, seed, images), out_axes=parallel.SEED_AXES
        )
        states = jax.jit(init)(np.asarray([3, 4], np.uint32))
        return methods.dispatch(method, states, methods.teacher(), data, 3)

    student = TINY["basic"][0]
    (expected, outcome), (found, other) = after(student), after(with_remat(student))
    methods.close(expected, found, rtol=2e-4, atol=1e-5)
    methods.close(outcome, other, rtol=2e-4, atol=1e-5)
    assert np.all(found.step == 3)


def _kept(module, side, batch, differentiate) -> int:
    """Bytes that a derivative with respect to the parameters keeps, beside parameters and images.

    Counted in the traced program, each array once: nothing is computed, and XLA has no say yet.
    """
    images, variables = shapes(module, side, batch)

    def keep(variables, images):
        rest = {name: part for name, part in variables.items() if name != "params"}

        def apply(params):
            full = {"params": params, **rest}
            return module.apply(full, images, train=True, mutable=["batch_stats"])[0]

        return jax.tree.leaves(differentiate(apply, variables["params"]))

    program = jax.make_jaxpr(keep)(variables, images).jaxpr
    given = {*program.invars, *program.constvars}
    made = {v for equation in program.eqns for v in equation.outvars}
    kept = {v for v in program.outvars if not hasattr(v, "val") and v in made and v not in given}
    return sum(math.prod(v.aval.shape) * v.aval.dtype.itemsize for v in kept)


def _backward(apply, params):
    return jax.vjp(apply, params)[1]


def _twice(apply, params):
    """As `bilevel.one_step` linearises the gradients with respect to parameters of the loss."""
    value = lambda p, m: jnp.mean(m * jax.nn.log_softmax(apply(p))[:, 0])  # noqa: E731
    gradient = lambda p: jax.value_and_grad(value, argnums=1)(p, 1.0)  # noqa: E731
    return jax.linearize(gradient, params)[1]


# Of a deep and narrow network: what is kept of a block of n = B H W C numbers, 4 bytes each, is
# without `remat` at least the inputs of two convolutions and of two norms, so 4n, and with it n.
def _resnet56(batch):
    stages = [batch * side * side * width for side, width in ((32, 16), (16, 32), (8, 64))]
    inputs = [*[stages[0]] * 10, *[stages[1]] * 9, *[stages[2]] * 8]  # the first before it strides
    inside = [3 * stage for stage in stages for _ in range(9)]
    return sum(inputs), sum(inside), 4 * stages[0]  # and the stem's


# Of tokens D wide: without it at least the inputs of two norms and four matrix products (the last
# 4D wide), of the attention (3D) and of the GELU (4D), and a square of numbers for each head.
def _deit_tiny(batch):
    tokens, heads = (64 // 16) ** 2 + 1, 3
    one = batch * tokens * 192
    inside = 12 * ((1 + 3 + 4 + 3 + 4) * one + batch * heads * tokens**2)
    return 12 * one, inside, 8 * one


@pytest.mark.parametrize("differentiate", [_backward, _twice])
@pytest.mark.parametrize(
    ("name", "side", "count"), [("resnet56", 32, _resnet56), ("deit_tiny", 64, _deit_tiny)]
)
def test_only_the_inputs_of_the_blocks_are_kept(name, side, count, differentiate):
    inputs, inside, ends = (4 * numbers for numbers in count(4))
    plain, thrifty = (
        _kept(models.build(name, K, remat=remat), side, 4, differentiate) for remat in (False, True)
    )
    assert inputs < thrifty < inputs + ends
    assert plain > inputs + inside
    assert plain > thrifty * (inputs + inside) / (inputs + ends) > 3 * thrifty


def test_in_bfloat16_what_is_kept_is_half_and_gradients_are_float32():
    exact, rounded = (
        _kept(models.build("resnet56", K, remat=True, precision=precision), 32, 4, _backward)
        for precision in models.PRECISIONS
    )
    assert rounded < 0.6 * exact
    module = models.build("resnet8", K, remat=True, precision="bfloat16")
    images, variables = shapes(module, 32)
    loss = lambda v, x: jnp.sum(module.apply(v, x))  # noqa: E731
    grads = jax.eval_shape(jax.grad(loss), variables, images)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(grads)} == {"float32"}


def test_gradients_in_bfloat16_are_those_without_up_to_its_rounding():
    module = dataclasses.replace(TINY["transformer"][0], dtype=jnp.bfloat16)
    images = np.random.RandomState(0).randn(4, 16, 16, 3).astype(np.float32)
    variables = methods.quick_jit(module.init)(jax.random.key(0), images)

    def gradients(net):
        loss = lambda v: jnp.mean(jax.nn.log_softmax(net.apply(v, images))[:, 0])  # noqa: E731
        return methods.quick_jit(jax.grad(loss))(variables)

    expected, found = gradients(module), gradients(with_remat(module))
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    methods.close(expected, found, rtol=0.05, atol=0.01 * scale)


def _config(digits_dir, student="resnet8"):
    config = configs.default()
    config.data.dir = digits_dir
    config.student.name, config.role.name, config.remat = student, "alone", True
    return config


def test_another_value_than_true_and_false_is_refused():
    config = configs.default().to_dict()
    config["remat"] = "blocks"
    with pytest.raises(ConfigError, match=r"^remat='blocks': must be true or false"):
        configs.check(configs.ConfigDict(config))


def test_a_student_without_blocks_is_refused(digits_dir):
    with pytest.raises(ConfigError, match="'cnn': remat=True: model 'cnn' has no blocks"):
        assemble.assemble(_config(digits_dir, "cnn"))


def test_the_student_and_a_teacher_that_trains_along_are_built_with_it(digits_dir):
    config = _config(digits_dir)
    assert assemble.assemble(config).method.student.remat
    config.role.name, config.teacher.name = "dml", "resnet8"
    method = assemble.assemble(config).method
    assert method.student.remat
    assert method.role.peer.remat
    config.teacher.name = "mlp"  # the switch is the student's: its peer may be without blocks
    assert assemble.assemble(config).method.student.remat
    config.teacher.name, config.remat = "resnet8", False
    method = assemble.assemble(config).method
    assert (method.student.remat, method.role.peer.remat) == (False, False)
