"""Strictness and shared fixtures.

Rank promotion raises: a ratio of shape [B, 1] against losses of shape [B] must never broadcast.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

# Tests compile many small programs once: what LLVM would gain is not worth its time.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

# Tests compile the same programs again and again: what one of them has compiled the others load,
# also those of the other workers, which inherit the variable.
_IS_FIRST = "TGEO_JAX_TESTS_COMPILED" not in os.environ
if _IS_FIRST:
    os.environ["TGEO_JAX_TESTS_COMPILED"] = tempfile.mkdtemp()
_COMPILED = os.environ["TGEO_JAX_TESTS_COMPILED"]
jax.config.update("jax_compilation_cache_dir", _COMPILED)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

ROOT = pathlib.Path(__file__).resolve().parent.parent


def pytest_sessionfinish():
    if _IS_FIRST:
        shutil.rmtree(_COMPILED, ignore_errors=True)


@pytest.fixture
def x64():
    """Float64 inside a test that compares derivatives."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def digits_dir(tmp_path_factory) -> str:
    """A TFDS folder with the digits prepared."""
    from tgeo_jax.data import sources

    directory = tmp_path_factory.mktemp("tfds")
    sources.prepare("digits", str(directory))
    return str(directory)


@pytest.fixture(scope="session")
def command(digits_dir, tmp_path_factory):
    """Runs `python ...` in the repository's root as a user would; returns the finished process."""

    def run(*arguments: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess:
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=command_environment(digits_dir, **environment),
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        if check:
            assert done.returncode == 0, done.stdout + done.stderr
        return done

    return run


def command_environment(digits_dir: str, **extra: str) -> dict[str, str]:
    """Commands of one test session share their compiled programs, as a user's would."""
    return {
        **os.environ,
        "TFDS_DATA_DIR": digits_dir,
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": f"{digits_dir}/compiled",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        **extra,
    }
