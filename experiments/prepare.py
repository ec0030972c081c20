"""Prepares a dataset for training: `python -m experiments.prepare --dataset=digits`."""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags

from experiments import commandline
from tgeo_jax.data import sources

_DATASET = flags.DEFINE_string("dataset", "", f"One of: {', '.join(sources.BUILDERS)}.")
_DATA_DIR = flags.DEFINE_string("data_dir", "", "TFDS folder; TFDS's own default if empty.")


def main(argv: Sequence[str]) -> None:
    del argv
    print(f"Prepared: {sources.prepare(_DATASET.value, _DATA_DIR.value)}")


if __name__ == "__main__":
    commandline.run(main)
