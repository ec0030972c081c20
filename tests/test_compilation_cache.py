"""Commands keep their compiled programs from one run to the next, where their user lets them."""

import hashlib
import os
import pathlib
import platform

import jax
import pytest

from experiments import commandline

DIR, SECONDS = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"


@pytest.fixture
def settings(monkeypatch):
    """JAX's own, as of a fresh process whose user set nothing; put back afterwards."""
    before = {name: getattr(jax.config, name) for name in (DIR, SECONDS)}
    monkeypatch.delenv(DIR.upper(), raising=False)
    monkeypatch.delenv(SECONDS.upper(), raising=False)
    jax.config.update(DIR, None)
    jax.config.update(SECONDS, 1.0)
    yield lambda: (getattr(jax.config, DIR), getattr(jax.config, SECONDS))
    for name, value in before.items():
        jax.config.update(name, value)


def test_a_command_leaves_its_compiled_programs_for_the_next(command, tmp_path):
    def run(name):
        command(
            *("-m", "experiments.main", "--config=configs/digits/plain.py"),
            *(f"--workdir={tmp_path / name}", "--config.train.epochs=1"),
            JAX_COMPILATION_CACHE_DIR="",
            XDG_CACHE_HOME=str(tmp_path / "cache"),
        )
        (folder,) = (tmp_path / "cache" / "tgeo_jax" / "compiled").iterdir()
        assert folder.name.startswith(f"{jax.__version__}-")
        return {path.name for path in folder.glob("*-cache")}

    first = run("first")
    assert any(name.startswith("jit__run-") for name in first)  # the training steps
    assert run("second") == first  # the second compiled nothing that was not there


def test_a_folder_that_the_user_chose_is_respected(command, tmp_path):
    cache = tmp_path / "cache"
    command("-m", "experiments.prepare", "--dataset=digits", XDG_CACHE_HOME=str(cache))
    assert not (cache / "tgeo_jax").exists()


def test_the_folder_is_this_machines_and_programs_of_a_tenth_of_a_second_are_kept(
    settings, monkeypatch, tmp_path
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(commandline, "_cpu", lambda: "abacus")
    commandline._keep_compiled_programs()
    machine = hashlib.sha256(b"abacus").hexdigest()[:8]
    folder = tmp_path / "tgeo_jax" / "compiled" / f"{jax.__version__}-{machine}"
    assert settings() == (str(folder), 0.1)
    assert folder.is_dir()


@pytest.mark.parametrize("unset", [True, False])
def test_without_another_word_the_cache_is_in_the_home(unset, settings, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    if unset:
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", "")
    commandline._keep_compiled_programs()
    assert pathlib.Path(settings()[0]).parent == tmp_path / ".cache" / "tgeo_jax" / "compiled"


def test_what_the_user_set_stays(settings, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    jax.config.update(DIR, "/somewhere")
    commandline._keep_compiled_programs()
    assert settings() == ("/somewhere", 1.0)
    assert list(tmp_path.iterdir()) == []
    jax.config.update(DIR, None)
    jax.config.update(SECONDS, 7.0)
    monkeypatch.setenv(SECONDS.upper(), "7")
    commandline._keep_compiled_programs()
    assert settings()[1] == 7.0


def made_of_a_file(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))


def read_only(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(os, "access", lambda *_: False)  # tests may run as root


def homeless(monkeypatch, tmp_path):
    def unknown():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(pathlib.Path, "home", unknown)


@pytest.mark.parametrize("hindered", [made_of_a_file, read_only, homeless])
def test_without_a_folder_commands_go_on(hindered, settings, monkeypatch, tmp_path):
    hindered(monkeypatch, tmp_path)
    commandline._keep_compiled_programs()
    assert settings() == (None, 1.0)


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        ("processor: 0\nflags\t\t: sse avx\n\nprocessor: 1\nflags\t\t: amx\n", "avx sse"),
        ("Features\t: neon fp\nCPU part: 0\n", "fp neon"),
        ("vmx flags\t: ept\n", platform.processor()),
    ],
)
def test_a_machine_is_its_cpus_flags(listed, expected, monkeypatch):
    monkeypatch.setattr(pathlib.Path, "read_text", lambda _: listed)
    assert commandline._cpu() == f"{platform.machine()} {expected}"
