"""What the commands share: flags with readable errors, and problems told without a traceback."""

from __future__ import annotations

import pathlib
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import app, flags, logging
from ml_collections import ConfigDict

from tgeo_jax import config as configs
from tgeo_jax.errors import ConfigError, TgeoError


def run(main: Callable[[Sequence[str]], Any]) -> None:
    """Runs a command; a problem its user can solve is one message and exit status 2."""

    def told_plainly(argv: Sequence[str]) -> int:
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # libraries narrate every file they open
        try:
            main(argv)
        except TgeoError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        return 0

    app.run(told_plainly, flags_parser=_parse)


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
