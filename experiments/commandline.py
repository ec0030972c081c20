"""What the commands share: readable errors of flags and of runs, and a cache of compiled programs.

Compiled programs are kept in ~/.cache/tgeo_jax/compiled (or under XDG_CACHE_HOME);
JAX_COMPILATION_CACHE_DIR says otherwise, JAX_ENABLE_COMPILATION_CACHE=0 keeps none.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
import platform
import re
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict

from tgeo_jax import config as configs
from tgeo_jax import peers
from tgeo_jax.errors import ConfigError, Interrupted, TgeoError


def run(main: Callable[[Sequence[str]], Any]) -> None:
    """Runs a command; a problem its user can solve is one message and exit status 2.

    A run that SIGTERM stopped, having saved, exits with 75, which schedulers are told to restart.
    """

    def told_plainly(argv: Sequence[str]) -> int:
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # libraries narrate every file they open
        _keep_compiled_programs()
        try:
            main(argv)
        except Interrupted as error:
            print(error, file=sys.stderr)
            return 130 if error.signal == signal.SIGINT else peers.RESTART
        except TgeoError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        return 0

    app.run(told_plainly, flags_parser=_parse)


def _keep_compiled_programs() -> None:
    """Lets the next run of a command load what this one compiles, unless its user chose where."""
    if jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        return
    try:
        folder = _compiled()
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: no home
        return
    if not os.access(folder, os.W_OK):
        return  # JAX would warn of every program
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # A run's start compiles many programs that each take less than JAX's second.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def _compiled() -> pathlib.Path:
    """The folder of this JAX and this machine.

    A home may be shared by machines, and a program that one CPU compiled can be an illegal
    instruction to another.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    machine = hashlib.sha256(_cpu().encode()).hexdigest()[:8]
    return pathlib.Path(cache) / "tgeo_jax" / "compiled" / f"{jax.__version__}-{machine}"


def _cpu() -> str:
    """What tells instruction sets apart: the first CPU's flags where Linux lists them."""
    try:
        listed = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        listed = ""
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", listed, re.MULTILINE)
    words = found[1].split() if found else [platform.processor()]
    return " ".join([platform.machine(), *sorted(words)])


def _parse(argv: Sequence[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        # What a config file says of its argument comes with the traceback as text around it.
        said = re.search(r"^tgeo_jax\.errors\.\w+: (.*)", str(error), re.DOTALL | re.MULTILINE)
        told = said[1].strip() if said else error
        print(f"error: {_unknown_field(argv) or told}", file=sys.stderr)
        sys.exit(2)


def _unknown_field(argv: Sequence[str]) -> str | None:
    """The first `--config.x.y` that the configuration does not have, with the nearest name."""
    for argument in argv[1:]:
        name, _, _ = argument.lstrip("-").partition("=")
        if name.startswith("config."):
            said = configs.unknown_field(configs.default(), name.removeprefix("config."))
            if said is not None:
                return f"--{name}: {said}"
    return None


def checked(config: Any, path: str) -> ConfigDict:
    """The configuration that a config file returned.

    Raises:
        ConfigError: there is no such file, or it returned something else.
    """
    if not pathlib.Path(path.partition(":")[0]).is_file():
        raise ConfigError(f"--config={path}: no such file; see configs/")
    if not isinstance(config, ConfigDict):
        raise ConfigError(
            f"--config={path}: get_config() returned {type(config).__name__}, not a ConfigDict"
        )
    return config
