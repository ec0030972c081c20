"""Tests of the installed package, copied to a folder that holds nothing else of the project."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.resources
import os
import pathlib
import pkgutil

import pytest

import tgeo_jax
from tgeo_jax import config as configs
from tgeo_jax import report, train
from tgeo_jax.data import sources
from tgeo_jax.errors import CheckpointError
from tgeo_jax.workdir import Workdir

CHECKOUT = pathlib.Path(os.environ["TGEO_JAX_CHECKOUT"])
MODULES = [module.name for module in pkgutil.walk_packages(tgeo_jax.__path__, "tgeo_jax.")]


def test_it_is_the_installed_package():
    assert CHECKOUT not in pathlib.Path(tgeo_jax.__file__).parents
    assert importlib.metadata.version("tgeo_jax") == tgeo_jax.__version__


def test_the_wheel_holds_the_package_and_nothing_else():
    files = importlib.metadata.files("tgeo_jax") or []
    assert {path.parts[0].split("-")[0] for path in files} == {"tgeo_jax"}
    own = {str(path.relative_to(CHECKOUT)) for path in CHECKOUT.glob("tgeo_jax/**/*.py")}
    assert own <= {str(path) for path in files}


@pytest.mark.parametrize("name", ["py.typed", "templates/report.html"])
def test_data_files_are_there(name):
    assert importlib.resources.files("tgeo_jax").joinpath(name).is_file()


@pytest.mark.parametrize("name", ["torch", "tensorflow", "configs", "experiments", "pandas"])
def test_what_is_not_needed_is_not_there(name):
    with pytest.raises(ImportError):
        importlib.import_module(name)


@pytest.mark.parametrize("name", MODULES)
def test_every_module_imports(name):
    importlib.import_module(name)


def test_a_student_learns_from_a_teacher_and_gets_a_report(tmp_path):
    sources.prepare("digits")
    teacher = configs.default()
    teacher.role.name = "alone"
    teacher.student.name = "mlp"
    teacher.train.epochs = 5
    taught = train.run(teacher, tmp_path / "teacher", progress=False)
    assert taught["test_accuracy"]["last"]["mean"] > 0.8
    student = configs.default()
    student.ratio.name = "tgeo"
    student.student.name = "mlp"
    student.student.mlp.hidden = (16,)
    student.teacher.workdir = str(tmp_path / "teacher")
    student.train.epochs = 5
    found = train.run(student, tmp_path / "student", progress=False)
    assert found["test_accuracy"]["last"]["mean"] > 0.6
    page = report.write({"student": Workdir(tmp_path / "student")}, tmp_path / "report")
    assert "<figure" in pathlib.Path(page).read_text()


def test_a_teacher_that_is_missing_is_told_without_the_checkout(tmp_path):
    config = configs.default()
    config.teacher.workdir = str(tmp_path / "nobody")
    with pytest.raises(CheckpointError, match="no run there; train one with"):
        train.run(config, tmp_path / "student", progress=False)
