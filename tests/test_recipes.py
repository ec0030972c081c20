"""The configs of the published experiments hold the published values."""

from __future__ import annotations

import itertools

import pytest

from configs import methods, recipes
from configs.attack import nsl_kdd, power_attack
from configs.cifar100 import longtail, pair
from configs.imagenet import pair as imagenet_pair
from configs.teachers import cifar10 as cifar10_teacher
from configs.teachers import cifar100 as teacher
from configs.teachers import imagenet2012 as imagenet_teacher
from experiments import compare
from tgeo_jax import config as configs
from tgeo_jax import models, optimizers, origins
from tgeo_jax.errors import ConfigError

PUBLISHED_PAIRS = [
    "resnet56-resnet20",
    "resnet110-resnet32",
    "resnet32x4-resnet8x4",
    "wrn_40_2-wrn_16_2",
    "wrn_40_2-wrn_40_1",
    "vgg13-vgg8",
    "resnet32x4-ShuffleV1",
    "resnet32x4-ShuffleV2",
    "wrn_40_2-ShuffleV1",
    "vgg13-MobileNetV2",
    "ResNet50-MobileNetV2",
    "ResNet50-vgg8",
]


def test_the_twelve_published_pairs_are_there():
    assert list(pair.PAIRS) == PUBLISHED_PAIRS


@pytest.mark.parametrize(
    ("nets", "method"), list(itertools.product(PUBLISHED_PAIRS, methods.METHODS)), ids="-".join
)
def test_every_method_is_a_valid_config_for_every_pair(nets, method):
    for preset in recipes.PRESETS:
        config = pair.get_config(f"{nets},{method},{preset}")
        configs.check(config)
    first, second = nets.split("-")
    assert (config.teacher.name, config.student.name) == (first, second)


def test_every_method_of_the_comparison_has_its_settings():
    assert set(methods.METHODS) == set(compare.METHODS)


@pytest.mark.parametrize(
    ("student", "rate"), [("resnet8x4", 0.05), ("MobileNetV2", 0.01), ("ShuffleV1", 0.01)]
)
def test_the_standard_recipe_is_the_published_one(student, rate):
    config = pair.get_config(f"resnet32x4-{student},kd")
    data, sgd = config.data, config.optimizer
    assert (data.name, data.batch_size, data.crop_padding, data.flip) == ("cifar100", 64, 4, True)
    assert tuple(data.mean) == (0.5071, 0.4867, 0.4408)
    assert tuple(data.std) == (0.2675, 0.2565, 0.2761)
    assert (sgd.name, sgd.momentum, sgd.nesterov, sgd.weight_decay) == ("sgd", 0.9, False, 5e-4)
    assert (config.train.epochs, config.precision) == (240, "float32")
    assert (config.loss.name, config.loss.kl.temperature) == ("kl", 4.0)
    assert config.ratio.constant.alpha == 0.9
    # 703 batches of 45,000 images; the first epoch at the lower rate is number 151.
    by_step = optimizers.schedule(sgd, 703, 240)
    for epoch, drops in ((1, 0), (150, 0), (151, 1), (180, 1), (181, 2), (210, 2), (211, 3)):
        step = (epoch - 1) * 703
        assert float(by_step(step)) == pytest.approx(rate * 0.1**drops), epoch


@pytest.mark.parametrize(
    ("method", "values"),
    [
        ("plain", {"role.name": "alone"}),
        ("tgeo", {"ratio.name": "tgeo", "meta.optimizer.learning_rate": 1e-3}),
        ("wls", {"ratio.wls.beta": 2.25, "ratio.wls.convex": False}),
        ("dkd", {"loss.dkd.beta": 8.0, "loss.dkd.alpha": 1.0, "ratio.weighted.warmup_epochs": 20}),
        ("dist", {"loss.dist.temperature": 4.0, "ratio.weighted.soft": 2.0}),
        ("logit_std", {"loss.logit_std.temperature": 2.0, "ratio.weighted.soft": 9.0}),
        ("cmkd", {"loss.cmkd.temperature": 4.0, "ratio.weighted.soft": 2.0}),
        ("bikd", {"meta.accumulate": 5, "meta.optimizer.drop_factor": 0.8}),
        ("dml", {"role.name": "dml", "teacher.workdir": "", "loss.kl.temperature": 1.0}),
    ],
)
def test_methods_have_their_published_values(method, values):
    config = pair.get_config(f"resnet32x4-resnet8x4,{method}").to_dict()
    for field, value in values.items():
        found = config
        for part in field.split("."):
            found = found[part]
        assert found == value, field


@pytest.mark.parametrize(
    ("nets", "beta"),
    [("resnet56-resnet20", 2), ("wrn_40_2-wrn_16_2", 6), ("vgg13-MobileNetV2", 6)],
)
def test_dkd_weighs_by_pair(nets, beta):
    assert pair.get_config(f"{nets},dkd").loss.dkd.beta == beta


def test_the_presets_differ_from_the_standard_where_they_say_so():
    standard, long, large = (
        pair.get_config(f"resnet56-resnet20,tgeo,{preset}") for preset in recipes.PRESETS
    )
    assert standard == pair.get_config("resnet56-resnet20,tgeo")
    assert (long.train.epochs, tuple(long.optimizer.drop_epochs)) == (400, (250, 300, 350))
    assert long.loss.kl.temperature == 1.0
    assert (long.meta.optimizer.learning_rate, long.meta.optimizer.weight_decay) == (0.1, 0.05)
    assert (large.data.batch_size, large.precision) == (512, "bfloat16")
    assert large.optimizer.learning_rate == 0.05 * 8
    assert (large.optimizer.warmup_epochs, large.optimizer.schedule) == (5.0, "cosine")


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
@pytest.mark.parametrize("factor", [10, 50, 100])
def test_the_long_tailed_recipe_is_bikds(dataset, factor):
    config = longtail.get_config(f"{dataset},{factor},bikd")
    configs.check(config)
    assert (config.data.imbalance, config.data.batch_size) == (factor, 100)
    assert config.data.validation_fraction * 50_000 == 1000
    assert (config.train.epochs, config.optimizer.learning_rate) == (120, 0.1)
    assert tuple(config.optimizer.drop_epochs) == (80, 100)
    assert tuple(config.meta.optimizer.drop_epochs) == (80, 100)
    assert tuple(config.ratio.bikd.hidden) == ((64,) if dataset == "cifar10" else (64, 64))
    trained = longtail.get_config(f"{dataset},{factor},teacher")
    assert (trained.role.name, trained.student.name) == ("alone", "resnet32x4")
    assert trained.data == config.data


@pytest.mark.parametrize("nets", imagenet_pair.PAIRS)
@pytest.mark.parametrize("method", ["plain", "kd", "tgeo", "dkd", "dist", "wls"])
def test_imagenet_pairs_are_valid_configs_with_the_published_recipe(nets, method):
    config = imagenet_pair.get_config(f"{nets},{method}")
    configs.check(config)
    assert (config.train.epochs, config.data.batch_size) == (100, 256)
    assert config.optimizer.learning_rate == 0.1
    assert tuple(config.optimizer.drop_epochs) == (30, 60, 90)
    if method == "kd":
        assert (config.ratio.constant.alpha, config.loss.kl.temperature) == (0.5, 1.0)
    if method == "wls":
        assert (config.ratio.wls.beta, config.loss.kl.temperature) == (2.5, 2.0)


def test_the_strong_teacher_comes_with_the_normalisation_of_its_checkpoint():
    assert tuple(imagenet_pair.get_config("vit_base-resnet18,kd").data.mean) == (0.5, 0.5, 0.5)
    assert tuple(imagenet_pair.get_config("deit_small-resnet18,kd").data.mean) == ()


@pytest.mark.parametrize("name", models.SMALL)
def test_every_small_network_can_be_a_teacher(name):
    for module, dataset in ((teacher, "cifar100"), (cifar10_teacher, "cifar10")):
        config = module.get_config(name)
        configs.check(config)
        assert (config.role.name, config.student.name, config.data.name) == ("alone", name, dataset)
    assert teacher.get_config(f"{name},large_batch").data.batch_size == 512


@pytest.mark.parametrize("name", models.LARGE)
def test_every_large_network_can_be_a_teacher(name):
    configs.check(imagenet_teacher.get_config(name))


ENCODERS = [(nsl_kdd.get_config, ""), (power_attack.get_config, "37class,")]


@pytest.mark.parametrize("method", [*compare.OF_TABLES, "teacher"])
@pytest.mark.parametrize(("get_config", "variant"), ENCODERS, ids=["nsl_kdd", "power_attack"])
def test_attacks_can_be_told_by_berts_encoders_of_the_papers_depths(get_config, variant, method):
    found = get_config(f"{variant}row_encoder,{method}")
    configs.check(found)
    layers = 12 if method == "teacher" else 4
    assert (found.student.name, found.student.row_encoder.layers) == ("row_encoder", layers)
    folder = f"runs/{found.data.name}/row_encoder/teacher"
    if found.role.name == "frozen":
        assert (found.teacher.name, found.teacher.row_encoder.layers) == ("row_encoder", 12)
        assert (found.teacher.workdir, found.loss.kl.temperature) == (folder, 1.5)
        said = origins.how_to_get(found, "teacher.workdir", folder)
        assert f"{variant}row_encoder,teacher --workdir={folder}" in said
    perceptrons = get_config(f"{variant}{method}")
    assert get_config(f"{variant}mlp,{method}").to_dict() == perceptrons.to_dict()
    assert perceptrons.student.mlp.hidden[0] == (512 if method == "teacher" else 64)


@pytest.mark.parametrize(
    ("get_config", "argument", "said"),
    [
        (nsl_kdd.get_config, "row_encode,kd", r"network 'row_encode': unknown network; did you"),
        (nsl_kdd.get_config, "row_encoder", r"method 'row_encoder': unknown"),
        (nsl_kdd.get_config, ",kd", r"network '': unknown network"),
        (pair.get_config, "resnet56-resnet20", r"must end in teacher-student,method"),
        (pair.get_config, "resnet56,kd", r"pair 'resnet56': must be teacher-student"),
        (pair.get_config, "resnet56-resnet2,kd", r"student 'resnet2': unknown network; did you"),
        (pair.get_config, "resnet56-resnet20,tgoe", r"method 'tgoe': unknown; did you mean 'tgeo'"),
        (pair.get_config, "resnet56-resnet20,kd,epoch400", r"preset 'epoch400': unknown"),
        (longtail.get_config, "cifar1,10,kd", r"must end in dataset,factor,method"),
        (imagenet_pair.get_config, "resnet34-resnet18", r"must end in teacher-student,method"),
        (imagenet_pair.get_config, "resnet32x4-resnet18,kd", r"teacher 'resnet32x4': unknown"),
        (teacher.get_config, "resnet57", r"teacher 'resnet57': unknown network; did you mean"),
    ],
)
def test_a_wrong_argument_is_named(get_config, argument, said):
    with pytest.raises(ConfigError, match=said):
        get_config(argument)
