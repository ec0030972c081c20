"""The PyTorch steps that ours are timed against do what ours do, in float64."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests import methods
from tgeo_jax import distill, geometry, losses, models, ratios, roles
from tgeo_jax.errors import ConfigError
from tgeo_jax.state import Batch, Teacher

torch = pytest.importorskip("torch")

from benchmarks import torch_nets, torch_small, torch_steps  # noqa: E402

pytestmark = pytest.mark.usefixtures("x64", "one_thread")

CLASSES = 3
SHAPE = (6, 5, 2)  # an even side, an odd one, and more than one channel to lay out
TEACHER = {"hidden": ()}
NETS = {
    "mlp": ({"hidden": (4,)}, {"hidden": (4,), "inputs": 60}),
    "cnn": ({"widths": (3, 4)}, {"widths": (3, 4), "channels": 2}),
}
SETTING = torch_steps.Setting(learning_rate=0.1, dtype=torch.float64)
SETTINGS = {
    "sgd": dataclasses.replace(SETTING, momentum=0.0, nesterov=False, weight_decay=0.0),
    "momentum": dataclasses.replace(SETTING, nesterov=False, weight_decay=0.05),
    "nesterov": dataclasses.replace(SETTING, weight_decay=0.05, only_fusion=True),
}
FUSION_RATE = 1.0
BILEVEL = ["create_graph", "higher"]


@pytest.fixture
def one_thread():
    """Of several, those that wait for work that small take the processor from other tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def double(tree):
    floating = lambda leaf: jnp.issubdtype(leaf.dtype, jnp.floating)  # noqa: E731
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float64) if floating(x) else x, tree)


def optimizer(setting: torch_steps.Setting) -> optax.GradientTransformation:
    """The chain of `optimizers.build`."""
    sgd = optax.sgd(setting.learning_rate, setting.momentum or None, setting.nesterov)
    return optax.chain(optax.add_decayed_weights(setting.weight_decay), sgd)


def exact_tgeo():
    """`ratios.tgeo`, which looks at probabilities in float32, in the precision of the logits."""

    def weights(meta_params, situation):
        features_BxF = geometry.trilateral_features(
            jax.nn.softmax(situation.student_logits_BxK),
            jax.nn.softmax(situation.teacher_logits_BxK),
            situation.labels_B,
            situation.class_means_KxK,
        )
        alpha_B = ratios.FusionNetwork().apply(meta_params, features_BxF)
        return 1 - alpha_B, alpha_B

    return ratios.tgeo()._replace(weights=weights)


class Ours:
    """Our step on a constant batch; `after` are the states, the first one included."""

    def __init__(self, net: str, setting: torch_steps.Setting, ratio, num_steps: int = 3):
        random = np.random.RandomState(0)
        self.batch = Batch(random.randn(6, *SHAPE), np.arange(6) % CLASSES)
        self.val_batch = Batch(random.randn(5, *SHAPE), np.arange(5) % CLASSES)
        module = models.build("mlp", CLASSES, **TEACHER)
        variables = module.init(jax.random.key(1), self.batch.images_BxHxWxC)
        means = jax.nn.softmax(random.randn(CLASSES, CLASSES))
        self.teacher = Teacher(double(variables), means)
        self.method = methods.method(
            student=models.build(net, CLASSES, **NETS[net][0]),
            num_classes=CLASSES,
            role=roles.frozen(module),
            soft_loss=losses.soft_loss("kl", temperature=setting.temperature),
            ratio=ratio,
            optimizer=optimizer(setting),
            fusion_optimizer=optax.sgd(FUSION_RATE, momentum=0.0),  # which stores the gradient
            training_view=lambda keys, images: images,
            clean_view=lambda images: images,
        )
        start = distill.init_state(self.method, 0, self.batch.images_BxHxWxC)
        # A fresh fusion network has next to no gradient below its last layer.
        fusion = jax.tree.map(lambda x: 0.5 * random.randn(*x.shape), start.fusion.params)
        start = start.replace(fusion=start.fusion.replace(params=fusion))
        self.after = [double(start)]
        step = methods.quick_jit(distill.train_step(self.method, self.teacher))
        for _ in range(num_steps):
            self.after.append(step(self.after[-1], self.batch, self.val_batch)[0])


@functools.cache
def started(net: str) -> Ours:
    """Ours before its first step."""
    return Ours(net, SETTING, exact_tgeo(), num_steps=0)


def torch_batches(ours: Ours) -> torch_steps.Batches:
    means = ours.teacher.class_means_KxK
    return torch_steps.Batches(*ours.batch[:2], *ours.val_batch[:2], means)


def theirs(kind: str, net: str, setting: torch_steps.Setting, ours: Ours):
    """The PyTorch step, from where ours starts."""
    student = torch_nets.build(net, CLASSES, **NETS[net][1]).double()
    state = ours.after[0].student
    torch_small.copy_variables({"params": state.params, "batch_stats": state.batch_stats}, student)
    teacher = torch_nets.build("mlp", CLASSES, inputs=60, **TEACHER).double()
    torch_small.copy_variables(ours.teacher.variables, teacher)
    steps = torch_steps.STEPS[kind](student, teacher, torch_batches(ours), setting)
    if kind != "plain":
        torch_small.copy_variables(ours.after[0].fusion.params, steps.fusion)
        steps.fusion_optimizer = torch.optim.SGD(steps.fusion.parameters(), FUSION_RATE)
    return steps


def assert_equal(found, module, wanted) -> None:
    """PyTorch tensors by name against a tree of Flax params."""
    wanted = torch_small.as_torch({"params": wanted}, module)
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        np.testing.assert_allclose(tensor.detach(), wanted[name], rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("net", NETS)
def test_the_plain_step_is_ours(net, setting):
    setting = dataclasses.replace(SETTINGS[setting], alpha=0.3)
    ours = Ours(net, setting, ratios.constant(alpha=0.3))
    steps = theirs("plain", net, setting, ours)
    for after in ours.after[1:]:
        steps.step()
        assert_equal(dict(steps.student.named_parameters()), steps.student, after.student.params)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("net", NETS)
def test_a_bilevel_step_is_ours(net, setting):
    pytest.importorskip("higher")
    setting = SETTINGS[setting]
    ours = Ours(net, setting, exact_tgeo())
    for kind in BILEVEL:
        steps = theirs(kind, net, setting, ours)
        for after in ours.after[1:]:
            hypergradient = after.fusion.opt_state[0].trace["params"]
            assert_equal(steps.hypergradient(), steps.fusion, hypergradient)
            steps.step()
            for module, params in (
                (steps.student, after.student.params),
                (steps.fusion, after.fusion.params["params"]),
            ):
                assert_equal(dict(module.named_parameters()), module, params)


def test_the_ratio_of_this_test_is_the_package_s():
    ours = [Ours("mlp", SETTING, ratio).after[-1] for ratio in (ratios.tgeo(), exact_tgeo())]
    methods.close(ours[0].student.params, ours[1].student.params, rtol=1e-6)
    methods.close(ours[0].fusion.params, ours[1].fusion.params, rtol=1e-5)


@pytest.mark.parametrize("kind", BILEVEL)
def test_running_statistics_move_as_in_one_real_step(kind):
    """Those of ours are of biased variances: the reference is PyTorch's own forward pass."""
    pytest.importorskip("higher")
    ours = Ours("cnn", SETTING, exact_tgeo())
    steps = theirs(kind, "cnn", SETTING, ours)
    reference = theirs("plain", "cnn", SETTING, ours)
    for before in ours.after[:-1]:
        params = torch_small.as_torch({"params": before.student.params}, reference.student)
        tensors = {name: torch.tensor(value) for name, value in params.items()}
        reference.student.load_state_dict(tensors, strict=False)
        reference.student(reference.images)
        steps.hypergradient()
        steps.step()
    wanted = dict(reference.student.named_buffers())
    assert wanted["BatchNorm_1.num_batches_tracked"] == 3
    for name, buffer in steps.student.named_buffers():
        torch.testing.assert_close(buffer, wanted[name], rtol=1e-6, atol=0, msg=name)


def test_teacher_logits_can_be_given():
    ours = started("mlp")
    logits = models.build("mlp", CLASSES, **TEACHER).apply(
        ours.teacher.variables, ours.batch.images_BxHxWxC
    )
    steps = theirs("create_graph", "mlp", SETTING, ours)
    batches = torch_batches(ours)._replace(teacher_logits_BxK=logits)
    given = torch_steps.CreateGraph(steps.student, None, batches, SETTING)
    given.fusion.load_state_dict(steps.fusion.state_dict())
    found, wanted = given.hypergradient(), steps.hypergradient()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, wanted[name])


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("kind", torch_steps.STEPS)
def test_other_formats_and_precisions_take_nearly_the_same_steps(kind, dtype, atol):
    pytest.importorskip("higher")
    exact = theirs(kind, "cnn", SETTING, started("cnn"))
    changes = {"dtype": dtype, "channels_last": True}
    steps = theirs(kind, "cnn", dataclasses.replace(SETTING, **changes), started("cnn"))
    for _ in range(3):
        found, wanted = steps.step(), exact.step()
        assert abs(float(found) - float(wanted)) < atol
    for found, wanted in zip(steps.student.parameters(), exact.student.parameters(), strict=True):
        torch.testing.assert_close(found, wanted.float(), rtol=0, atol=atol)
    kernel = steps.student.Conv_1.weight
    assert kernel.is_contiguous(memory_format=torch.channels_last)


def test_variables_of_another_network_are_refused():
    variables = models.build("mlp", 3, hidden=(4,)).init(jax.random.key(0), jnp.ones((1, 2, 2, 1)))
    with pytest.raises(ValueError, match=r"not in both networks: .*1\.weight"):
        torch_small.copy_variables(variables, torch_nets.build("mlp", 3, inputs=4, hidden=()))


def import_afresh():
    spec = importlib.util.find_spec("benchmarks.torch_steps")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


@pytest.mark.parametrize(
    ("library", "use"),
    [
        ("torch", import_afresh),
        ("higher", lambda: torch_steps.Higher(None, None, None, SETTING)),
    ],
)
def test_a_library_that_is_missing_is_named_with_its_cure(library, use, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ConfigError, match=r"install it by pip install -e '\.\[benchmarks\]'"):
        use()
