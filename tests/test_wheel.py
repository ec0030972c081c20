"""What the wheel must hold; `.ci/wheel` builds it and tests it in an empty environment."""

from __future__ import annotations

import configparser
import fnmatch
import importlib.util
import os
import re
import subprocess

from packaging.requirements import Requirement
from packaging.version import Version

from tests.conftest import ROOT

SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")


def test_every_file_of_the_package_that_is_not_python_is_packaged():
    globs = SETUP["options.package_data"]["tgeo_jax"].split()
    package = ROOT / "tgeo_jax"
    others = {
        str(path.relative_to(package))
        for path in package.rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    assert others == {name for name in others if any(fnmatch.fnmatch(name, g) for g in globs)}
    assert {"py.typed", "templates/report.html"} <= others
    assert all(
        (folder / "__init__.py").exists() for folder in {p.parent for p in package.rglob("*.py")}
    )


def test_the_pinned_versions_satisfy_every_lower_bound():
    pinned = dict(
        re.findall(r"^([\w.-]+)==([\w.+]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    )
    pinned = {_normal(name): version for name, version in pinned.items()}
    wanted = SETUP["options"]["install_requires"].split("\n")
    for extra in ("dev", "docs", "torch", "gcs", "s3", "benchmarks"):
        wanted += SETUP["options.extras_require"][extra].split("\n")
    requirements = [Requirement(line) for line in wanted if line]
    assert len(requirements) > 30
    for requirement in requirements:
        version = Version(pinned[_normal(requirement.name)])
        assert requirement.specifier.contains(version, prereleases=True), requirement


def test_the_tests_of_the_wheel_pass_here_too(command, tmp_path):
    """Those that do not ask whether it is a wheel."""
    script = tmp_path / "test_installed.py"
    script.write_text((ROOT / ".ci" / "installed.py").read_text())
    done = command(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--rootdir={tmp_path}", str(script),
        "-k", "from_a_teacher or without_the_checkout or data_files",
        TGEO_JAX_CHECKOUT=str(ROOT),
    )  # fmt: skip
    assert re.search(r"\b4 passed", done.stdout), done.stdout


def test_the_release_script_is_a_program():
    script = ROOT / ".ci" / "wheel"
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", str(script)], check=True)
    modules = re.findall(r"tgeo_jax\.\{(.*?)\}", script.read_text())
    names = [name for group in modules for name in group.split(",")]
    assert len(names) > 10
    for name in names:
        assert importlib.util.find_spec(f"tgeo_jax.{name}"), name


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
