"""What is said of the three axes before data or devices are touched."""

from __future__ import annotations

import inspect
import json
import re
import sys

import flax.linen as nn
import jax
import numpy as np
import pytest
from absl import flags
from ml_collections import ConfigDict, config_flags

from tests.test_config import changed
from tgeo_jax import choices, losses, ratios, roles
from tgeo_jax import config as configs
from tgeo_jax.errors import ConfigError

TAUGHT = {"role.name": "frozen", "teacher.workdir": "runs/teacher"}
NAN, INF = float("nan"), float("inf")


def refused(changes, said):
    with pytest.raises(ConfigError, match=f"^{said}"):
        configs.check(changed(changes))


# Losses.


def logits(seed):
    return 3 * np.random.RandomState(seed).randn(6, 5).astype(np.float32)


LABELS = np.arange(6) % 5


@pytest.mark.parametrize(
    ("weights", "shares"), [((), (1, 1)), ((0.5, 3.0), (0.5, 3)), ((0, 2), (0, 2))]
)
def test_losses_joined_by_plus_are_added_with_their_weights(weights, shares):
    config = changed({"loss.name": "kl+cmkd", "loss.weights": weights})
    configs.check(config)
    found = choices.soft_loss(config.loss)(logits(0), logits(1), LABELS)
    parts = (
        losses.kl(logits(0), logits(1), temperature=4.0),
        losses.cmkd(logits(0), logits(1), LABELS, temperature=4.0),
    )
    expected = sum(w * np.asarray(part) for w, part in zip(shares, parts, strict=True))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_single_loss_may_have_a_weight():
    config = changed({"loss.weights": (2.5,), "loss.kl.temperature": 2.0})
    configs.check(config)
    found = choices.soft_loss(config.loss)(logits(0), logits(1), LABELS)
    expected = losses.kl(logits(0), logits(1), temperature=2.0)
    np.testing.assert_allclose(found, 2.5 * expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "weights", "count"),
    [("kl+cmkd", (1.0,), 2), ("kl+cmkd", (1.0, 2.0, 3.0), 2), ("kl", (1.0, 2.0), 1)],
)
def test_a_wrong_number_of_weights_is_counted(name, weights, count):
    said = rf"loss\.weights={re.escape(str(weights))}: must hold one weight for each of the {count}"
    refused({"loss.name": name, "loss.weights": weights}, f"{said} .*{re.escape(repr(name))}")


def test_a_loss_named_twice_is_refused_with_what_to_do():
    said = r"loss\.name='kl\+cmkd\+kl': must name each loss once; weigh it instead"
    refused({"loss.name": "kl+cmkd+kl"}, said)


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("kl+cmkdd", "did you mean 'cmkd'?"),
        ("logit_sdt+kl", "did you mean 'logit_std'?"),
        ("kl+zzz", "known: kl, dkd, dist, logit_std, cmkd"),
        ("kl+", ""),
        ("", "known: kl, dkd, dist, logit_std, cmkd"),
    ],
)
def test_an_unknown_part_of_a_loss_is_answered(name, end):
    refused({"loss.name": name}, rf"loss\.name='{re.escape(name)}': unknown; .*{re.escape(end)}")


@pytest.mark.parametrize(
    ("name", "nearest"), [("kl+cmdk", "cmkd"), ("cmkd+dits", "dist"), ("logit_std+cmdk", "cmkd")]
)
def test_it_is_the_unknown_part_of_a_loss_that_gets_the_nearest_name(name, nearest):
    refused({"loss.name": name}, rf"loss\.name='{re.escape(name)}': .*did you mean '{nearest}'\?")


def _numbers():
    """Every numeric option of every loss: (loss, option, whether 0 is allowed)."""
    for name, function in losses.SOFT_LOSSES.items():
        for option, parameter in inspect.signature(function).parameters.items():
            if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
                continue
            if parameter.default is None or type(parameter.default) in (int, float):
                yield name, option, not re.search("temperature|rank_strength", option)


NUMBERS = list(_numbers())


def test_the_numbers_of_the_losses_are_all_here():
    assert len(NUMBERS) == 12
    assert [f"{name}.{option}" for name, option, zero in NUMBERS if zero] == [
        "dkd.alpha", "dkd.beta", "dist.inter", "dist.intra", "cmkd.intra",
    ]  # fmt: skip


@pytest.mark.parametrize(("name", "option", "zero"), NUMBERS)
def test_a_number_that_a_loss_cannot_take_is_named(name, option, zero):
    field, bound = f"loss.{name}.{option}", ">= 0" if zero else "> 0"
    for value in (-1.0, NAN, INF, *(() if zero else (0, 0.0))):
        said = rf"{re.escape(field)}={value}: must be a finite number {bound}$"
        refused({"loss.name": name, field: value}, said)
        refused({"loss.name": f"kl+{name}" if name != "kl" else "dist+kl", field: value}, said)
    if zero:
        configs.check(changed({"loss.name": name, field: 0.0}))
    configs.check(changed({"loss.name": name, field: 7}))


def test_numbers_of_a_loss_that_is_not_chosen_do_not_matter():
    configs.check(changed({"loss.name": "dist", "loss.kl.temperature": -1.0}))


@pytest.mark.parametrize(
    ("option", "known"), [("direction", "hard_to_spearman"), ("difficulty", "entropy")]
)
@pytest.mark.parametrize("name", ["cmkd", "dist+cmkd"])
def test_a_choice_inside_cmkd_is_named_with_its_section(name, option, known):
    said = rf"loss\.cmkd\.{option}='up': use one of {known}, "
    refused({"loss.name": name, f"loss.cmkd.{option}": "up"}, said)


@pytest.mark.parametrize("value", [None, 0.3, 1])
def test_an_option_chosen_for_you_takes_none_or_a_number(value):
    config = changed({"loss.name": "cmkd", "loss.cmkd.rank_strength": value})
    configs.check(config)
    read = ConfigDict(json.loads(configs.to_json(config)))
    configs.check(read)
    assert read.loss.cmkd.rank_strength == value
    strength = 3 / 5 if value is None else value  # 3/K
    expected = losses.cmkd(logits(0), logits(1), LABELS, rank_strength=strength)
    found = choices.soft_loss(read.loss)(logits(0), logits(1), LABELS)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def _from_command_line(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["main", *arguments])  # config_flags looks there
    values = flags.FlagValues()
    config_flags.DEFINE_config_dict("config", configs.default(), flag_values=values)
    values(sys.argv)
    return values["config"].value


def test_an_option_chosen_for_you_can_be_set_on_the_command_line(monkeypatch):
    config = _from_command_line(monkeypatch, "--config.loss.cmkd.rank_strength=0.25")
    assert config.loss.cmkd.rank_strength == 0.25
    assert _from_command_line(monkeypatch).loss.cmkd.rank_strength is None


def test_tuples_of_the_axes_can_be_set_on_the_command_line(monkeypatch):
    config = _from_command_line(
        monkeypatch, "--config.loss.name=kl+dist", "--config.loss.weights=(1,0.5)",
        "--config.role.name=several", "--config.role.several.workdirs=('runs/a','runs/b')",
        "--config.role.trikd.anchor_student=(1,100)",
    )  # fmt: skip
    configs.check(config)
    assert tuple(config.loss.weights) == (1, 0.5)
    assert tuple(config.role.several.workdirs) == ("runs/a", "runs/b")
    assert tuple(config.role.trikd.anchor_student) == (1, 100)


@pytest.mark.parametrize("name", losses.SOFT_LOSSES)
def test_of_two_classes_only_some_losses_can_teach(name):
    loss = losses.soft_loss(name)
    choices.check_loss(name, loss, num_classes=3)
    if name in ("kl", "dist"):
        choices.check_loss(name, loss, num_classes=2)
        return
    with pytest.raises(ConfigError, match=rf"^loss '{name}' with K = 2 classes.*use 'kl'$"):
        choices.check_loss(name, loss, num_classes=2)


def test_of_two_classes_cmkd_can_teach_by_the_columns_of_raw_logits():
    loss = losses.soft_loss("cmkd", intra=1.0, standardise=False)
    choices.check_loss("cmkd", loss, num_classes=2)


# Ratios.


@pytest.mark.parametrize("name", ratios.RATIOS)
def test_every_ratio_is_built_from_its_section(name):
    config = changed({"ratio.name": name})
    configs.check(config)
    assert choices.ratio(config.ratio).init(jax.random.key(0), 3) is not None


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("constant.alpha", NAN, "must lie in"),
        ("constant.warmup_epochs", -1, "must be >= 0"),
        ("weighted.soft", INF, "must be a finite number >= 0"),
        ("annealed.shape", "round", "use one of linear, cosine"),
        ("wls.beta", -1.0, "must be a finite number >= 0"),
        ("bikd.hidden", (0,), "must be positive integers"),
    ],
)
def test_an_option_that_a_ratio_refuses_is_named_with_its_section(field, value, told):
    said = rf"ratio\.{re.escape(f'{field}={value!r}')}: .*{told}"
    refused({"ratio.name": field.partition(".")[0], f"ratio.{field}": value}, said)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"meta.accumulate": 2}, r"meta\.accumulate=2: must be 1 with ratio\.name='rw', which"),
        ({"meta.order": "prequential", "meta.estimator": "reverse"}, r"meta\.estimator='reverse'"),
    ],
)
def test_a_ratio_that_does_not_go_with_the_meta_section_is_refused(changes, said):
    refused({**TAUGHT, "ratio.name": "rw", **changes}, said)


# Roles.


@pytest.mark.parametrize("role", ["dml", "trikd"])
@pytest.mark.parametrize("values", [(), (-1.0,), (1.0, NAN), (INF,)])
def test_every_weight_of_a_role_must_hold_finite_numbers(role, values):
    weights = [w for w in roles.Weights._fields if role == "trikd" or "anchor" not in w]
    assert len(weights) == (6 if role == "trikd" else 4)
    for weight in weights:
        field = f"role.{role}.{weight}"
        said = re.escape(f"{field}={values}: must hold one or more finite numbers >= 0")
        refused({"role.name": role, field: values}, said)


@pytest.mark.parametrize(
    ("role", "field", "value", "told"),
    [
        ("trikd", "start", "warm", "use one of fresh, trained, frozen"),
        ("trikd", "generations", 0, "must be >= 1"),
        ("cached", "views", -1, "must be >= 0; 0 is the clean image"),
        ("cached", "augmentation_seed", -1, r"must be in \[0, 2\*\*32\)"),
        ("cached", "augmentation_seed", 2**32, r"must be in \[0, 2\*\*32\)"),
        ("several", "combine", "max", "use one of mean, each"),
        ("several", "workdirs", (), "two or more trained teachers; for one use .*'frozen'"),
        ("several", "workdirs", ("runs/a",), "two or more trained teachers; for one use"),
    ],
)
def test_an_option_that_a_role_refuses_is_named_with_its_section(role, field, value, told):
    said = rf"role\.{re.escape(f'{role}.{field}={value!r}')}: .*{told}"
    refused({**TAUGHT, "role.name": role, f"role.{role}.{field}": value}, said)


def test_options_of_a_role_that_is_not_chosen_do_not_matter():
    configs.check(changed({"role.name": "alone", "role.trikd.start": "warm"}))


@pytest.mark.parametrize("role", ["dml", "trikd"])
@pytest.mark.parametrize("schedule", ["constant", "cosine", "step"])
def test_weights_that_change_need_a_drop_for_each_change(role, schedule):
    field = f"role.{role}.student_teacher"
    chosen = {"role.name": role, field: (1, 10, 100), "optimizer.schedule": schedule}
    said = rf"{re.escape(field)}=\(1, 10, 100\): .*schedule='step' and optimizer\.drop_epochs"
    refused({**chosen, "optimizer.drop_epochs": (5,)}, said)
    enough = {**chosen, "optimizer.drop_epochs": (5, 9)}
    if schedule == "step":
        configs.check(changed(enough))
    else:  # drops that the schedule does not use
        refused(enough, said)


@pytest.mark.parametrize(
    ("changes", "needed"),
    [
        ({"role.name": "frozen"}, True),
        ({"role.name": "cached"}, True),
        ({"role.name": "trikd", "role.trikd.start": "trained"}, True),
        ({"role.name": "trikd", "role.trikd.start": "frozen"}, True),
        ({"role.name": "trikd"}, False),
        ({"role.name": "dml"}, False),
        ({"role.name": "several", "role.several.workdirs": ("runs/a", "runs/b")}, False),
        ({"role.name": "alone"}, False),
    ],
)
def test_a_trained_teacher_is_asked_for_where_it_is_needed(changes, needed):
    if needed:
        refused(changes, r"teacher\.workdir='': role\.name='\w+' needs a trained teacher; name the")
    configs.check(changed({**changes, "teacher.workdir": "runs/teacher" if needed else ""}))


def test_stored_views_need_an_augmentation():
    chosen = {**TAUGHT, "role.name": "cached", "role.cached.views": 2}
    refused(chosen, r"role\.cached\.views=2: nothing is augmented.*views=0 \(or data\.crop_padding")
    configs.check(changed({**chosen, "data.flip": True}))
    configs.check(changed({**chosen, "data.crop_padding": 1}))
    configs.check(changed({**chosen, "role.cached.views": 0}))


def test_the_role_is_known_as_far_as_it_can_be_without_its_networks():
    section = changed({"role.name": "trikd", "role.trikd.start": "frozen"}).role
    assert choices.any_role(section).anchored
    assert choices.any_role(section).needs_trained
    without = {"role.trikd.anchor_student": (0.0,), "role.trikd.anchor_teacher": (0, 0)}
    assert not choices.any_role(changed({"role.name": "trikd", **without}).role).anchored
    module = nn.Dense(7)
    assert choices.role(changed({"role.name": "dml"}).role, module).peer is module


def test_a_role_without_a_network_says_what_to_set():
    with pytest.raises(ConfigError, match=r"role\.name='dml' needs a teacher: set teacher\.name"):
        choices.role(changed({"role.name": "dml"}).role, None)
