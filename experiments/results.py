"""The ledger of real runs in results/, and its table beside the published figures.

    python -m experiments.results add runs/cifar100/kd runs/cifar100/tgeo
    python -m experiments.results render --output=results/README.md

`add` takes finished runs only, whose code is in a commit. `render` shows all of results/*.jsonl, or
the ledgers that --ledger names.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence

from absl import flags

from experiments import commandline
from tgeo_jax import ledger, results_table, storage
from tgeo_jax.errors import ConfigError, DataError, nearest
from tgeo_jax.workdir import Workdir

FOLDER = pathlib.Path("results")
_LEDGER = flags.DEFINE_list(
    "ledger", [], f"JSON lines; add: {FOLDER}/cifar100.jsonl if empty, render: all in {FOLDER}/."
)
_ALLOW_DIRTY = flags.DEFINE_bool(
    "allow_dirty", False, "add: take runs of code with changes that are in no commit."
)
_OUTPUT = flags.DEFINE_string("output", "", "render: also write the page to this file.")
_PUBLISHED = flags.DEFINE_string(
    "published", str(FOLDER / "published.json"), "render: the published figures."
)


def main(argv: Sequence[str]) -> None:
    commands = {"add": _add, "render": _render}
    if len(argv) < 2:
        raise ConfigError(f"no command: use one of {', '.join(commands)}")
    name, *arguments = argv[1:]
    if name not in commands:
        raise ConfigError(f"{name}: no such command{nearest(name, commands)}")
    commands[name](arguments)


def _add(folders: list[str]) -> None:
    if not folders:
        raise ConfigError("add: no workdir; name the folder of one or more finished runs")
    paths = _LEDGER.value or [str(FOLDER / "cifar100.jsonl")]
    if len(paths) > 1:
        raise ConfigError(f"--ledger={','.join(paths)}: add writes to one ledger; name one")
    path = pathlib.Path(paths[0])
    # All of them are read before the first is added: a mistake in a name leaves the ledger alone.
    entries = [ledger.entry(Workdir(storage.path(folder))) for folder in folders]
    for folder, entry in zip(folders, entries, strict=True):
        ledger.add(path, entry, allow_dirty=_ALLOW_DIRTY.value)
        print(f"{folder}: {entry['method']}, {entry['pair']}, added to {path}.")


def _render(arguments: list[str]) -> None:
    if arguments:
        raise ConfigError(f"render {arguments[0]}: unexpected; ledgers are named by --ledger=...")
    paths = [pathlib.Path(path) for path in _LEDGER.value] or sorted(FOLDER.glob("*.jsonl"))
    if not paths:
        raise DataError(f"{FOLDER}/*.jsonl: no ledger; add a finished run first")
    published = pathlib.Path(_PUBLISHED.value)
    try:
        figures = json.loads(published.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise DataError(f"--published={published}: cannot be read ({error})") from error
    page = results_table.render([record for path in paths for record in ledger.read(path)], figures)
    print(page, end="")
    if _OUTPUT.value:
        output = pathlib.Path(_OUTPUT.value)
        output.parent.mkdir(parents=True, exist_ok=True)
        storage.write_atomically(output, page)


if __name__ == "__main__":
    commandline.run(main)
