"""A PyTorch checkpoint becomes a teacher: the command, and runs that use what it made."""

from __future__ import annotations

import json
import re

import jax
import numpy as np
import pytest

from configs.cifar100 import pair
from configs.imagenet import pair as imagenet_pair
from tests import tiny_cifar
from tgeo_jax import config as configs
from tgeo_jax import models, teachers, train
from tgeo_jax.assemble import assemble
from tgeo_jax.data import sources
from tgeo_jax.errors import CheckpointError, ConfigError

torch = pytest.importorskip("torch")
from tests import torch_nets  # noqa: E402

NAME = "resnet8"


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("tiny"))
    tiny_cifar.prepare("cifar100", folder)
    return folder


@pytest.fixture(scope="module")
def original():
    return torch_nets.randomised(torch_nets.build(NAME, 100), seed=0)


@pytest.fixture(scope="module")
def converted(command, original, tmp_path_factory):
    """A folder made by the documented command from a wrapped checkpoint."""
    folder = tmp_path_factory.mktemp("converted")
    path = folder / "ckpt_epoch_240.pth"
    torch.save({"epoch": 240, "model": original.state_dict(), "best_acc": 72.3}, path)
    done = command(
        "-m", "experiments.convert", f"--name={NAME}", f"--checkpoint={path}",
        "--num_classes=100", f"--workdir={folder / 'teacher'}",
    )  # fmt: skip
    assert "--config.teacher.name=resnet8 --config.teacher.workdir=" in done.stdout
    assert "may have seen the examples" in done.stdout
    return folder / "teacher"


def chosen(data_dir, teacher, **changes):
    config = pair.get_config(f"{NAME}-{NAME},kd")
    config.data.update(dir=data_dir, validation_fraction=0.25, batch_size=50, eval_batch_size=50)
    config.teacher.workdir = str(teacher)
    config.train.epochs = 1
    config.data.update(changes)
    return config


def test_a_run_gets_the_logits_of_the_pytorch_network(data_dir, converted, original):
    run = assemble(chosen(data_dir, converted))
    images = run.dataset.test.images[:20]
    found = jax.jit(run.teacher.predict(run.method.clean_view))(run.teacher.variables, images)
    # The recipe's normalisation, written out.
    pixels = images / 255 - np.array(sources.CIFAR100_NORMALISATION[0])
    pixels /= np.array(sources.CIFAR100_NORMALISATION[1])
    with torch.no_grad():
        wanted = original(torch.tensor(pixels.transpose(0, 3, 1, 2), dtype=torch.float32)).numpy()
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_a_student_learns_from_it(data_dir, converted, tmp_path):
    result = train.run(chosen(data_dir, converted), tmp_path, progress=False)
    assert result["dataset"]["train"] == 300
    assert 0 <= result["per_seed"][0]["last"]["test/teacher_agreement"] <= 1
    assert result["per_seed"][0]["last"]["test/teacher_kl"] > 0


def test_it_says_where_it_came_from(converted):
    there = json.loads((converted / "config.json").read_text())
    assert there["student"] == {"name": NAME}
    assert there["converted"]["file"] == "ckpt_epoch_240.pth"
    assert re.fullmatch(r"[0-9a-f]{64}", there["converted"]["sha256"])
    assert there["converted"]["mean"] == [0.5071, 0.4867, 0.4408]


def test_another_normalisation_than_its_own_is_refused(data_dir, converted):
    config = chosen(data_dir, converted, mean=(0.5, 0.5, 0.5))
    with pytest.raises(
        CheckpointError, match=r"normalised by mean \(0\.5071, .*this run has \(0\.5"
    ):
        assemble(config)


def test_it_is_one_of_several_teachers(data_dir, converted):
    config = chosen(data_dir, converted)
    config.role.name = "several"
    config.role.several.workdirs = (str(converted), str(converted))
    run = assemble(config)
    both = run.teacher.predict(run.method.clean_view)
    one = assemble(chosen(data_dir, converted))
    images = run.dataset.test.images[:3]
    alone = one.teacher.predict(one.method.clean_view)(one.teacher.variables, images)
    found = both(run.teacher.variables, images)
    np.testing.assert_allclose(jax.nn.softmax(found), jax.nn.softmax(alone), atol=1e-5)


def test_a_folder_that_holds_a_run_is_not_overwritten(converted, tmp_path):
    module = models.build(NAME, 100)
    variables = jax.jit(module.init)(jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))
    with pytest.raises(ConfigError, match=r"holds a run already; name another folder"):
        teachers.save_converted(
            converted, NAME, variables, source=converted / "config.json", mean=(0.5,), std=(1.0,)
        )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--name=resnet57"], "--name='resnet57': no network to convert to; did you mean"),
        (["--name=resnet56"], "--checkpoint='': needed"),
        (["--name=resnet56", "--checkpoint=x.pth"], "--workdir='': needed"),
        (
            ["--name=resnet56", "--checkpoint=x.pth", "--workdir=w", "--mean=a,b,c"],
            "--mean=a,b,c: must be numbers joined by commas",
        ),
        (["--name=resnet56", "--checkpoint=x.pth", "--workdir=w"], "x.pth: no such file"),
    ],
)
def test_the_command_says_what_it_lacks(command, arguments, said):
    done = command("-m", "experiments.convert", *arguments, check=False)
    assert done.returncode == 2
    assert f"error: {said}" in done.stderr


def test_a_teacher_that_is_not_there_can_be_trained_converted_or_downloaded():
    config = pair.get_config("resnet32x4-resnet8x4,tgeo")
    said = teachers.how_to_get(config, config.teacher.workdir)
    workdir = "--workdir=runs/cifar100/teachers/resnet32x4"
    assert f"--config=configs/teachers/cifar100.py:resnet32x4 {workdir}" in said
    assert f"experiments.convert --name=resnet32x4 --checkpoint=FILE {workdir}" in said
    assert "resnet32x4_vanilla/ckpt_epoch_240.pth" in said
    of_imagenet = imagenet_pair.get_config("resnet34-resnet18,kd")
    said = teachers.how_to_get(of_imagenet, "t")
    assert "resnet34-b627a593.pth" in said
    config.teacher.workdir = "runs/nobody"
    configs.check(config)
