"""Examples per second of the input pipelines: on the device, and read by threads or workers.

    python -m benchmarks.inputs --dataset=cifar100
    python -m benchmarks.inputs --dataset=criteo --batch_size=1024

Prints, for each way, the median and the range over repeats of a fixed number of batches; of a
categorical table, which is only streamed here, also the hours of a pass over Criteo's whole log.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import time
from collections.abc import Callable, Generator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments import commandline
from tgeo_jax.data import resident, row_streaming, sources, streaming, tables, views
from tgeo_jax.data.readable import Readable
from tgeo_jax.randomness import Purpose

_DATASET = flags.DEFINE_string("dataset", "digits", "A prepared dataset.")
_DATA_DIR = flags.DEFINE_string("data_dir", "", "TFDS folder; TFDS's own default if empty.")
_BATCH = flags.DEFINE_integer("batch_size", 128, "Images, or rows, in a batch.", lower_bound=1)
_BATCHES = flags.DEFINE_integer("batches", 50, "Batches that are timed together.", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 5, "How often.", lower_bound=1)
_SIZE = flags.DEFINE_integer("image_size", 32, "Of streamed images.", lower_bound=1)
_WORKERS = flags.DEFINE_integer("workers", 2, "Most worker processes tried.", lower_bound=0)
_CRITEO_ROWS = 45_840_617  # of the Display Advertising Challenge's train.txt
_AUGMENTATIONS = {
    "crop, flip": {},
    "crop, flip, Cutout": {"cutout": 8},
    "crop, flip, RandAugment-lite": {"randaugment_layers": 2},
}


def main(argv: Sequence[str]) -> None:
    del argv
    device = jax.devices()[0].device_kind
    is_table = _DATASET.value in tables.LAYOUTS
    what = "rows" if is_table else "images"
    print(f"{_DATASET.value}, batches of {_BATCH.value}, {device}; {what}/s: median (range)")
    if is_table:
        _tables()
        return
    if _DATASET.value not in sources.TOO_LARGE:
        dataset = sources.load(_DATASET.value, _DATA_DIR.value)
        for name, options in _AUGMENTATIONS.items():
            _report(f"resident: {name}", _resident(dataset, options))
    for workers in range(_WORKERS.value + 1):
        with contextlib.closing(_stream(workers)) as opened:
            name = f"stream: {workers} worker processes" if workers else "stream: threads"
            _report(name, functools.partial(_take, opened))


def _tables() -> None:
    rates = {}
    for workers in range(_WORKERS.value + 1):
        found = row_streaming.load(_DATASET.value, _DATA_DIR.value, workers=workers)
        name = f"stream: {workers} worker processes" if workers else "stream: threads"
        with contextlib.closing(found.train.batches(0, 0, _BATCH.value, crop=False)) as opened:
            rates[name] = _report(name, functools.partial(_take, opened))
        if not workers:
            name = "sweep: threads"
            with contextlib.closing(_endless(found.train)) as opened:
                rates[name] = _report(name, functools.partial(_take, opened))
    for name, rate in rates.items():
        print(f"{name}: {_CRITEO_ROWS / rate / 3600:.2f} hours for {_CRITEO_ROWS:,} rows")


def _endless(split: Readable) -> Generator:
    while True:
        yield from split.sweep(_BATCH.value)


def _resident(dataset: sources.Dataset, options: dict) -> Callable[[], None]:
    view = views.augment(
        views.normalise(dataset.mean, dataset.std), crop_padding=4, flip=True, **options
    )
    images, count = jnp.asarray(dataset.train.images), len(dataset.train)

    @jax.jit
    def batches(first_step: jax.Array) -> jax.Array:
        order = resident.batch_indices(
            jnp.uint32(0), first_step, _BATCHES.value, _BATCH.value, count, Purpose.TRAIN_ORDER
        )

        def one(total: jax.Array, indices_B: jax.Array) -> tuple[jax.Array, None]:
            keys_B = jax.random.split(jax.random.key(0), _BATCH.value)
            return total + view(keys_B, images[indices_B]).sum(), None

        return jax.lax.scan(one, jnp.zeros(()), order)[0]

    return lambda: jax.block_until_ready(batches(jnp.int32(0)))


def _stream(workers: int) -> Generator:
    whole = sources.builder(_DATASET.value, _DATA_DIR.value)
    sources.check_prepared(whole, _DATASET.value, _DATA_DIR.value)
    positions = np.arange(whole.info.splits["train"].num_examples)
    records = streaming.Records(_DATASET.value, _DATA_DIR.value, "train", positions)
    channels = whole.info.features["image"].shape[-1]
    stream = streaming.Stream(records, _SIZE.value, channels, workers)
    return stream.batches(0, 0, _BATCH.value, crop=True)


def _take(opened: Generator) -> None:
    for _ in itertools.islice(opened, _BATCHES.value):
        pass


def _report(name: str, run: Callable[[], None]) -> float:
    run()  # compiles, or starts the workers
    rates = []
    for _ in range(_REPEATS.value):
        started = time.perf_counter()
        run()
        rates.append(_BATCH.value * _BATCHES.value / (time.perf_counter() - started))
    print(f"{name:40} {np.median(rates):>10,.0f}  ({min(rates):,.0f} to {max(rates):,.0f})")
    return float(np.median(rates))


if __name__ == "__main__":
    commandline.run(main)
