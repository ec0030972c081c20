"""A PyTorch checkpoint becomes a teacher: the command, and runs that use what it made."""

from __future__ import annotations

import json
import re

import jax
import numpy as np
import pytest

from configs.cifar100 import longtail, pair
from configs.imagenet import pair as imagenet_pair
from configs.teachers import cifar100 as cifar100_teacher
from tests import tiny_cifar
from tgeo_jax import config as configs
from tgeo_jax import models, origins, train
from tgeo_jax.assemble import assemble
from tgeo_jax.data import sources
from tgeo_jax.errors import CheckpointError, ConfigError

torch = pytest.importorskip("torch")
from benchmarks import torch_nets  # noqa: E402

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
        CheckpointError, match=r"normalised by mean \(0\.5071, .*this run's by \(0\.5"
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
    with pytest.raises(ConfigError, match=r"exists already; name another folder"):
        origins.save_converted(
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
        (
            ["--name=resnet56", "--checkpoint=x.pth", "--workdir=w", "--std=0.5"],
            "--std=0.5: must be three numbers",
        ),
        (
            ["--name=resnet56", "--checkpoint=x.pth", "--workdir=w", "--std=1,0,1"],
            "--std=1,0,1: must be finite and > 0",
        ),
        (
            ["--name=resnet56", "--checkpoint=x.pth", "--workdir=w", "--num_classes=1"],
            "--num_classes=1: a classifier needs at least 2 classes",
        ),
        (["--name=resnet56", "--checkpoint=x.pth", "--workdir=w"], "x.pth: no such file"),
    ],
)
def test_the_command_says_what_it_lacks(command, arguments, said):
    done = command("-m", "experiments.convert", *arguments, check=False)
    assert done.returncode == 2
    assert f"error: {said}" in done.stderr


def told(config, role="teacher.workdir"):
    return origins.how_to_get(config, role, "runs/t")


def test_a_teacher_that_is_not_there_can_be_trained_converted_or_downloaded():
    said = told(pair.get_config("resnet32x4-resnet8x4,tgeo"))
    assert "--config=configs/teachers/cifar100.py:resnet32x4 --workdir=runs/t" in said
    assert "experiments.convert --name=resnet32x4 --checkpoint=FILE --workdir=runs/t" in said
    assert "resnet32x4_vanilla/ckpt_epoch_240.pth" in said
    said = told(imagenet_pair.get_config("resnet34-resnet18,kd"))
    assert "--config=configs/teachers/imagenet2012.py:resnet34 --workdir" in said
    assert "resnet34-b627a593.pth" in said


def test_the_way_to_a_teacher_is_to_one_that_the_run_will_accept(data_dir, tmp_path):
    config = longtail.get_config("cifar100,2,bikd")
    config.data.update(dir=data_dir, validation_fraction=0.25, batch_size=50)
    said = told(config)
    for field in ("validation_fraction=0.25", "imbalance=2.0", f"dir={data_dir}"):
        assert f"--config.data.{field}" in said
    # The named config with these changes holds the same examples out.
    taught = cifar100_teacher.get_config(config.teacher.name)
    taught.data.update(dir=data_dir, validation_fraction=0.25, imbalance=2.0)
    taught.student.name = config.teacher.name = NAME
    taught.data.batch_size, taught.train.epochs = 50, 1
    config.teacher.workdir = str(tmp_path)
    train.run(taught, tmp_path, progress=False)
    assert assemble(config).teacher is not None


def test_networks_that_cannot_be_converted_or_named_are_told_otherwise():
    config = pair.get_config("resnet32x4-resnet8x4,tgeo")
    config.teacher.name = "cnn"
    said = told(config)
    assert "configs/teachers/cifar100.py --config.student.name=cnn" in said
    assert "convert" not in said
    assert "--config.role.name=alone --workdir=runs/t" in told(config, "role.trikd.anchor")
    assert "cifar100.py:NAME" in told(config, "role.several.workdirs")
    of_cifar10 = longtail.get_config("cifar10,10,kd")
    said = told(of_cifar10)
    assert "--num_classes=10 --mean=0.4914,0.4822,0.4465" in said
    assert "ckpt_epoch_240" not in said  # that one is of CIFAR-100
    assert "runs/t" in told(configs.default())


def test_a_half_made_conversion_is_not_there(data_dir, converted, tmp_path, monkeypatch):
    def killed(*arguments):
        raise KeyboardInterrupt

    variables = assemble(chosen(data_dir, converted)).teacher.variables
    arguments = (tmp_path / "teacher", NAME, variables)
    options = {"source": converted / "config.json", "mean": (0.5,), "std": (1.0,)}
    with monkeypatch.context() as patched:
        patched.setattr(origins.workdir.Workdir, "write_result", killed)
        with pytest.raises(KeyboardInterrupt):
            origins.save_converted(*arguments, **options)
    assert not (tmp_path / "teacher").exists()
    origins.save_converted(*arguments, **options)
    assert (tmp_path / "teacher" / "result.json").exists()
