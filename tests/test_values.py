"""Sizes of values: what 32 bits, a file system or this machine's memory cannot hold is refused."""

from __future__ import annotations

import re

import pytest

from tests.test_config import changed
from tgeo_jax import config as configs
from tgeo_jax import memory, values
from tgeo_jax.assemble import assemble
from tgeo_jax.errors import ConfigError, DataError


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("train.epochs", 2**31, "train.epochs=2147483648: must be an integer below 2**31 in size"),
        ("generation", -(2**40), "generation=-1099511627776: must be an integer below 2**31"),
        ("loss.kl.temperature", 2**31, "loss.kl.temperature=2147483648: must be an integer below"),
        ("loss.kl.temperature", 2e6, "loss.kl.temperature=2000000.0: must lie in [1e-6, 1e6]"),
        ("loss.kl.temperature", 2_000_000, "loss.kl.temperature=2000000: must lie in [1e-6, 1e6]"),
        ("optimizer.learning_rate", 1e39, "optimizer.learning_rate=1e+39: must be 0 or have"),
        ("optimizer.weight_decay", 1e-40, "optimizer.weight_decay=1e-40: must be 0 or have a size"),
        ("student.mlp.hidden", (8, 2**31), "student.mlp.hidden=(8, 2147483648): each must be an"),
        ("student.mlp.hidden", (1,) * 1001, "student.mlp.hidden: holds 1001 numbers: must hold at"),
        ("data.dir", "a\0b", r"data.dir='a\x00b': must be text in Unicode, without the character"),
        ("teacher.workdir", "\ud800", r"teacher.workdir='\ud800': must be text in Unicode"),
        ("role.several.workdirs", ("a", "\0"), r"role.several.workdirs=('a', '\x00'): each must"),
        ("optimizer.drop_epochs", (float("inf"),), "optimizer.drop_epochs=(inf,): must be > 0"),
        ("ratio.wls.beta", float("nan"), "ratio.wls.beta=nan: must be finite"),
        ("data.image_size", 4096, "data.image_size=4096: must be an integer in [1, 2048]"),
        ("data.randaugment_layers", 101, "data.randaugment_layers=101: must be an integer in [0"),
    ],
)
def test_a_value_that_no_run_can_use_is_refused(field, value, said):
    with pytest.raises(ConfigError, match=f"^{re.escape(said)}"):
        configs.check(changed({field: value}))


@pytest.mark.parametrize("field", ["seed", "data.split_seed", "train.epochs"])
def test_an_integer_that_python_does_not_write_is_told_by_its_length(field):
    with pytest.raises(ConfigError, match=rf"^{re.escape(field)}=an integer of 19932 bits: must "):
        configs.check(changed({field: 10**6000}))


def test_seeds_have_32_bits():
    configs.check(changed({"seed": 2**32 - 1, "data.split_seed": 2**32 - 1}))


@pytest.mark.parametrize("field", ["loss.kl.temperature", "loss.cmkd.temperature"])
def test_the_square_of_a_whole_temperature_needs_no_32_bits(field):
    configs.check(changed({"loss.name": field.split(".")[1], field: 46341}))


def test_a_value_is_shown_in_part():
    assert len(values.shown("x" * 10**6)) < 300
    assert len(values.shown((1.5,) * 10**5)) < 1100
    assert values.shown([1, 2]) == "(1, 2)"


# What depends on the dataset or the machine.


def refused(digits_dir, changes, said, error=ConfigError):
    with pytest.raises(error, match=f"^{said}"):
        assemble(changed({"data.dir": digits_dir, "student.name": "mlp", **changes}))


def test_more_steps_than_can_be_counted_are_refused(digits_dir):
    last = (2**31 - 1) // 20  # 20 steps in an epoch
    chosen = {"data.dir": digits_dir, "student.name": "mlp", "train.epochs": last}
    assert assemble(changed(chosen)).method.total_steps < 2**31
    said = rf"train\.epochs={last + 1}: must stay below {last + 1}, "
    refused(digits_dir, {"train.epochs": last + 1}, said)
    drops = {"optimizer.schedule": "step", "optimizer.drop_epochs": (5, last + 1)}
    refused(digits_dir, drops, rf"optimizer\.drop_epochs={last + 1}: must stay below")


def test_crops_that_show_nothing_are_refused(digits_dir):
    said = r"data\.crop_padding=9: must be at most the side of an image, 8, "
    refused(digits_dir, {"data.crop_padding": 9}, said)


@pytest.mark.parametrize(
    "changes", [{"student.mlp.hidden": (2**20, 2**20)}, {"seeds": 2**31 - 1, "seed": 0}]
)
def test_networks_that_memory_cannot_hold_are_refused(digits_dir, changes):
    refused(digits_dir, changes, r"student\.name='mlp': its parameters need [\d,.]+ MB for seeds=")


def test_where_nobody_knows_the_memory_nothing_is_refused(digits_dir, monkeypatch):
    monkeypatch.setattr(memory, "free", lambda device: None)
    chosen = {"data.dir": digits_dir, "student.name": "mlp", "student.mlp.hidden": (2**20,) * 2}
    assert assemble(changed(chosen)).steps_per_epoch == 20


@pytest.mark.parametrize("folder", ["x" * 5000, "/dev/null/x"])
def test_folders_that_cannot_be_are_not_prepared(folder):
    refused(folder, {}, r"data\.name='digits'", DataError)
