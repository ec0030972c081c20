"""Streamed tables: which rows come when, their hashes, and whole runs on them."""

from __future__ import annotations

import dataclasses
import multiprocessing
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from tensorflow_datasets.proto import tf_example_pb2

from tests import tiny_tables
from tgeo_jax import checkpoint, feeds, origins, placement, rows, teachers, train
from tgeo_jax import config as configs
from tgeo_jax.assemble import assemble
from tgeo_jax.data import (
    fitting,
    records,
    resident,
    row_streaming,
    shuffling,
    sources,
    tables,
)
from tgeo_jax.data.layouts import MISSING
from tgeo_jax.dispatch import Dispatcher
from tgeo_jax.errors import CheckpointError, ConfigError, DataError
from tgeo_jax.writers import read_records

ROWS = 600  # of the stand-in for Frappe
BUCKETS = 50


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A TFDS folder with stand-ins for Frappe and Criteo."""
    folder = tmp_path_factory.mktemp("rows")
    for path in tiny_tables.frappe(folder / "frappe", rows=ROWS, train=True).iterdir():
        rows = [line.split() for line in path.read_text().splitlines()]
        # The first field has seven values, of which three tell the class.
        told = [
            ["1" if values[0] in ("0:1", "1:1", "2:1") else "-1", *values] for _, *values in rows
        ]
        path.write_text("\n".join(map(" ".join, told)) + "\n")
    tiny_tables.criteo(folder / "criteo")
    for name in ("frappe", "criteo"):
        tables.prepare(name, folder / name, str(folder / "tfds"))
    return str(folder / "tfds")


@pytest.fixture(scope="module")
def distinct(tmp_path_factory) -> str:
    """A TFDS folder where every row of MovieLens is of a person of its own: 80 of them train."""
    source = tmp_path_factory.mktemp("distinct")
    tiny_tables.movielens(source)
    lines = (source / "ratings.csv").read_text().splitlines()
    numbered = [f"{n},{line.partition(',')[2]}" for n, line in enumerate(lines[1:], 1)]
    (source / "ratings.csv").write_text("\n".join([lines[0], *numbered]) + "\n")
    tables.prepare("movielens", source, str(source / "tfds"))
    return str(source / "tfds")


def load(folder, name="frappe", **options):
    return row_streaming.load(name, folder, **{"hash_buckets": BUCKETS, **options})


def joined(batches):
    return [np.concatenate(part) for part in zip(*batches, strict=True)]


def read(stream, steps, batch_size=5, *, seed=0, first_step=0, **options):
    batches = stream.batches(seed, first_step, batch_size, **options)
    found = [next(batches) for _ in range(steps)]
    batches.close()
    return joined(found)


def by_hand(value: int, field: int, count: int) -> int:
    """The documented hash, with Python's integers."""
    if value == MISSING:
        return 0
    mixed = (value % 2**64) ^ ((field + 1) * 0x9E3779B97F4A7C15 % 2**64)
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        mixed = (mixed ^ (mixed >> 33)) * factor % 2**64
    return 1 + (mixed ^ (mixed >> 33)) % (count - 1)


def raw(folder, name, split):
    return tables.rows_and_labels(tables.builder(name, folder), split)


def positions(stream):
    return stream.part.positions(np.arange(len(stream)))


# The order.


@pytest.mark.parametrize("count", [1, 2, 3, 5, 64, 1000])
def test_the_permutation_is_that_of_the_device(count):
    key = jax.random.key(count)
    keys = np.asarray(jax.random.bits(key, (8,), jnp.uint32))
    found = shuffling.permuted(keys, np.arange(count), count)
    np.testing.assert_array_equal(found, resident.permuted(key, jnp.arange(count), count))


def test_large_orders_stay_inside_and_repeat_nothing():
    places = np.arange(2**40, 2**40 + 5000)
    found = shuffling.permuted(shuffling.keys(1), places, 2**40 + 5000)
    assert len(set(found.tolist())) == 5000
    assert found.min() >= 0
    assert found.max() < 2**40 + 5000


def test_every_epoch_sees_every_training_row_once_in_an_order_of_its_own(distinct):
    stream = load(distinct, "movielens", hash_buckets=2**30).train
    rows, _ = raw(distinct, "movielens", "train")
    person = {by_hand(value, 0, 2**30): index for index, value in enumerate(rows[:, 0].tolist())}
    ids, _ = read(stream, 27, 8)  # three epochs of 72 rows
    assert len(person) == 80
    epochs = np.reshape([person[i] for i in ids[:, 0].tolist()], (3, 72)).tolist()
    assert [sorted(epoch) for epoch in epochs] == [sorted(positions(stream).tolist())] * 3
    assert len({tuple(epoch) for epoch in epochs}) == 3
    np.testing.assert_array_equal(ids[:1], fitting.hashed(rows[epochs[0][:1]], 0, 2**30))


def test_the_order_depends_on_the_seed_and_not_on_the_batch_size(distinct):
    stream = load(distinct, "movielens", hash_buckets=2**30).train
    first, same, other = (
        read(stream, 60 // size, size, seed=seed)[0] for size, seed in ((5, 7), (3, 7), (5, 8))
    )
    np.testing.assert_array_equal(first, same)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("first_step", [1, 13, 14, 40])
def test_a_restart_sees_the_rows_of_an_undisturbed_run(distinct, first_step):
    stream = load(distinct, "movielens", hash_buckets=2**30).train
    undisturbed = read(stream, 45)
    again = read(stream, 45 - first_step, first_step=first_step)
    for found, expected in zip(again, undisturbed, strict=True):
        np.testing.assert_array_equal(found, expected[5 * first_step :])


def test_workers_give_the_rows_of_threads_and_end(folder):
    expected = read(load(folder).train, 9, first_step=5)
    found = read(load(folder, workers=1).train, 9, first_step=5)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("count", [2, 3])
def test_the_shards_of_processes_joined_are_the_global_batches(distinct, count):
    stream = load(distinct, "movielens", hash_buckets=2**30).train
    whole = read(stream, 20, 6, first_step=2)
    rows = 6 // count
    parts = [read(stream, 20, rows, first_step=2, shard=(i, count)) for i in range(count)]
    for name, expected in enumerate(whole):
        steps = [part[name].reshape(20, rows, *expected.shape[1:]) for part in parts]
        np.testing.assert_array_equal(np.concatenate(steps, 1).reshape(expected.shape), expected)


# What comes.


@pytest.mark.parametrize("name", ["frappe", "criteo"])
@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_a_sweep_is_the_stored_split_hashed_by_hand(folder, name, batch_size):
    stream = load(folder, name).test
    rows, labels = raw(folder, name, "test")
    if batch_size == 1:
        stream = dataclasses.replace(stream, part=row_streaming.Part(len(rows), 3, 4))
        rows, labels = rows[3:7], labels[3:7]
    expected = [
        [by_hand(value, field, BUCKETS) for field, value in enumerate(row)]
        for row in fitting.buckets(rows, tables.LAYOUTS[name].buckets).tolist()
    ]
    ids, found, real = joined(stream.sweep(batch_size))
    assert (ids.dtype, found.dtype) == (np.int32, np.int32)
    assert len(ids) == -(-len(rows) // batch_size) * batch_size
    np.testing.assert_array_equal(ids[real], expected)
    np.testing.assert_array_equal(found[real], labels)
    assert real.tolist() == [True] * len(rows) + [False] * (len(ids) - len(rows))
    assert not ids[~real].any()
    if name == "criteo":
        assert (ids == 0).any()  # its empty fields


@pytest.mark.parametrize(("count", "batch_size"), [(2, 8), (4, 128), (2, 1000)])
def test_processes_sweep_their_rows_of_every_batch(folder, count, batch_size):
    stream = load(folder).test
    shards = [list(stream.sweep(batch_size, (index, count))) for index in range(count)]
    together = [joined(parts) for parts in zip(*shards, strict=True)]
    for found, expected in zip(together, stream.sweep(batch_size), strict=True):
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_array_equal(a, b)


def test_hashes_of_a_field_are_spread_evenly():
    ids = fitting.hashed(np.arange(40_000).reshape(-1, 2), 0, 101)
    assert (ids.min(), ids.max()) == (1, 100)
    for column in ids.T:
        counts = np.bincount(column, minlength=101)[1:]
        assert ((counts - 200) ** 2 / 200).sum() < 150  # chi-squared of 99 degrees: p = 0.0007


def test_records_of_either_order_and_of_large_labels_are_parsed_as_by_protobuf():
    random = np.random.default_rng(0)
    made, labels = [], (0, 1, 127, 128, 70_000, 5)
    rows = random.integers(-(2**63), 2**63, (len(labels), 3))
    for number, (row, label) in enumerate(zip(rows, labels, strict=True)):
        one, other = tf_example_pb2.Example(), tf_example_pb2.Example()
        one.features.feature["row"].bytes_list.value.append(row.tobytes())
        other.features.feature["label"].int64_list.value.append(label)
        parts = [e.features.SerializeToString() for e in (one, other)][:: (-1) ** number]
        body = b"".join(parts)
        assert len(body) < 128
        made.append(b"\n" + bytes([len(body)]) + body)  # field 1, its length, both entries
        assert set(tf_example_pb2.Example.FromString(made[-1]).features.feature) == {"row", "label"}
    found, told = records.parsed(made, 3, np.int64)
    np.testing.assert_array_equal(found, rows)
    assert told.tolist() == list(labels)
    with pytest.raises(ValueError, match="not a label and 4 values of 8 bytes"):
        records.parsed(made, 4, np.int64)


# Datasets.


def test_the_parts_are_disjoint_complete_and_fixed_by_their_seed(folder):
    teacher, student, whole = (load(folder, part=p) for p in ("teacher", "student", "all"))
    found = [positions(d) for d in (teacher.train, student.train, whole.validation)]
    assert [len(part) for part in found] == [378, 162, 60]
    assert sorted(np.concatenate(found).tolist()) == list(range(ROWS))
    np.testing.assert_array_equal(positions(teacher.validation), found[2])
    np.testing.assert_array_equal(positions(whole.train), np.concatenate(found[:2]))
    assert set(positions(load(folder, split_seed=1).validation)) != set(found[2])
    few = positions(load(folder, part="student", fraction=0.5).train)
    np.testing.assert_array_equal(few, found[1][:81])


def test_a_streamed_table_says_what_a_resident_one_does(folder):
    found, other = load(folder), sources.load("frappe", folder)
    assert found.vocabulary == (BUCKETS,) * 10
    for field in ("class_names", "feature_names", "mean", "std", "num_classes", "corrupt"):
        assert getattr(found, field) == getattr(other, field)
    assert found.example.shape == other.example.shape
    assert found.example.dtype == other.example.dtype
    assert {name: len(split) for name, split in found.extra.items()} == {"test_validation": ROWS}
    for name in ("train", "validation", "test"):
        assert len(getattr(found, name)) == len(getattr(other, name))


def test_the_digest_changes_with_what_is_in_which_split(folder):
    changes = ({}, {"split_seed": 1}, {"fraction": 0.5}, {"part": "student"}, {"hash_buckets": 9})
    found = [load(folder, **options).digest() for options in changes]
    assert len(set(found)) == 5
    assert load(folder).digest() == found[0]


def test_rows_are_not_held(distinct):
    """However many rows there are, as many bytes are taken: here of 80 and of a billion."""
    stream = load(distinct, "movielens").train

    def peak(total: int) -> int:
        part = row_streaming.Part(total, total // 10, total - total // 10, 0)
        long = dataclasses.replace(stream, rows=_Repeated(stream.rows), part=part)
        steps = row_streaming._Batches(long, 0, 64, (0, 1))
        steps[0]  # opens the files
        tracemalloc.start()  # by this thread alone: Python 3.11 cannot stop it among others
        for step in range(total // 200, total // 200 + 5):
            steps[step]
        long.take(np.arange(total // 2, total // 2 + 20))
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    few, many = peak(80), peak(10**9)
    assert many < few + 500_000  # 8 bytes for each would be 8 GB


class _Repeated:
    """As `row_streaming.Rows`, the same few over and over."""

    def __init__(self, rows):
        self._rows, self.name = rows, rows.name

    def __len__(self):
        return len(self._rows)

    def read(self, positions_B):
        return self._rows.read(positions_B % len(self._rows))


def test_what_cannot_be_read_is_named(folder, tmp_path):
    with pytest.raises(DataError, match=r"(?s)not prepared in .*--dataset=frappe"):
        load(str(tmp_path))
    with pytest.raises(DataError, match=r"data\.part='student': of 600 .* none is left"):
        load(folder, part="student", teacher_fraction=0.9999)
    tiny_tables.prepared("movielens", tmp_path)
    dataset = load(str(tmp_path / "tfds"), "movielens")
    (path,) = tables.builder("movielens", str(tmp_path / "tfds")).info.splits["train"].filepaths
    damaged = bytearray(path.read_bytes())
    damaged[100:5000] = bytes(4900)
    path.write_bytes(damaged)
    with pytest.raises(DataError, match=r"'movielens': rows of the train split cannot be read"):
        joined(dataset.train.sweep(10))


# Whole runs.


def config(folder, **changes):
    found = configs.default()
    found.data.update(
        name="frappe", dir=folder, pipeline="stream", hash_buckets=BUCKETS, batch_size=32
    )
    found.meta.batch_size = 20
    for network in (found.student, found.teacher):
        network.name = "wide_deep"
        network.wide_deep.hidden = (8,)
    found.optimizer.update(name="adam", learning_rate=0.02, weight_decay=0.0)
    found.train.update(epochs=2, steps_per_dispatch=5, select_by="auc", patience=5)
    for path, value in changes.items():
        section, _, field = path.rpartition("__")
        (found[section] if section else found)[field] = value
    return found


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory):
    """What runs again does not compile again."""
    options = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0,
    }
    before = {name: getattr(jax.config, name) for name in options}
    for values in (options, before):
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()  # it looks at its folder only once
        if values is options:
            yield


@pytest.fixture(scope="module")
def teacher(compiled_once, folder, tmp_path_factory):
    """The workdir of a teacher that learned from its part of the rows."""
    workdir = tmp_path_factory.mktemp("teacher")
    own = config(folder, role__name="alone", data__part="teacher", train__epochs=8)
    train.run(own, workdir, progress=False)
    return workdir


def student(folder, teacher, **changes):
    own = config(folder, data__part="student", ratio__name="tgeo", **changes)
    own.teacher.workdir = str(teacher)
    return own


def test_a_streamed_table_is_learned_and_chosen_by_auc(teacher):
    last = _timeless(teacher)[-1]
    assert last["test/auc"] > 0.9
    assert last["validation/auc"] > 0.9


class _Interrupted(Exception):
    """Stands for whatever ends a run from outside."""


def test_a_killed_tgeo_run_on_rows_goes_on_to_the_same_bits(folder, teacher, tmp_path, monkeypatch):
    own = student(folder, teacher, train__epochs=3)  # of 5 steps
    result = train.run(own, tmp_path / "undisturbed", progress=False)
    assert result["teacher"]["test_accuracy"] > 0.6
    assert {"train/ratio", "train/outer_loss"} <= set(_timeless(tmp_path / "undisturbed")[0])
    chunk = feeds.Streamed.chunk

    def interrupted(self, step, num_steps):
        if step >= 10:
            raise _Interrupted
        return chunk(self, step, num_steps)

    with monkeypatch.context() as patched:
        patched.setattr(feeds.Streamed, "chunk", interrupted)
        with pytest.raises(_Interrupted):
            train.run(own, tmp_path / "disturbed", progress=False)
    assert train.run(own, tmp_path / "disturbed", progress=False)["steps"] == 15
    runs = [tmp_path / "disturbed", tmp_path / "undisturbed"]
    jax.tree.map(
        np.testing.assert_array_equal,
        *(
            [checkpoint.load_network(run / "checkpoints", w) for w in ("last", "best")]
            for run in runs
        ),
    )
    assert _timeless(runs[0]) == _timeless(runs[1])


def _timeless(workdir):
    return [
        {name: value for name, value in record.items() if not name.startswith("time/")}
        for record in read_records(workdir / "metrics.jsonl")
    ]


def test_lazy_rows_of_a_stream_are_those_of_single_steps_in_memory(folder, teacher):
    own = student(folder, teacher)
    own.optimizer.lazy_rows, own.meta.every = True, 2
    run = assemble(own)
    placed, state = placement.data(run, 0), placement.first_state(run, (0,))[0]
    asked = placement.teacher(run)
    context = teachers.context(run.method, asked, placed.train, 2, 100)
    alone = jax.tree.map(lambda leaf: jnp.array(leaf[0]), state.replace(step=state.step[None]))
    before, chunk = alone, placed.feed.chunk(0, 5)
    placed.feed.close()
    dispatcher = Dispatcher(run.method, run.mesh, 32, 20, streamed=True)
    state, _ = dispatcher.run(state, context, chunk, 5)
    step = jax.jit(rows.train_step(run.method, context))
    for number in range(5):
        # Between hypergradients the stream has no outer batch, and memory any: here the last one.
        places = number, number - number % 2
        batches = (
            jax.tree.map(lambda leaf, place=place: leaf[place], split)
            for split, place in zip(chunk, places, strict=True)
        )
        alone, _ = step(alone, *batches)
    for found, expected in zip(
        jax.tree.leaves((state.student, state.fusion)),
        jax.tree.leaves((alone.student, alone.fusion)),
        strict=True,
    ):
        np.testing.assert_allclose(found[0], expected, rtol=1e-5, atol=1e-6)
    moved = (before.student.params["table"]["rows"] != alone.student.params["table"]["rows"]).any(1)
    assert 50 <= moved.sum() <= 70  # of the 500 rows those of seven values of ten fields


def test_a_held_out_split_of_one_class_cannot_be_ranked(folder, tmp_path):
    own = config(folder, role__name="alone")
    own.data.validation_fraction = 0.001  # a single row
    with pytest.raises(DataError, match=r"train\.select_by='auc': .* one class only"):
        train.run(own, tmp_path / "run", progress=False)


def test_a_teacher_of_other_hashes_or_of_the_other_pipeline_is_refused(folder, teacher):
    for field, value in (("hash_buckets", 60), ("pipeline", "resident")):
        own = student(folder, teacher, **{f"data__{field}": value})
        if field == "pipeline":
            own.data.hash_buckets = configs.default().data.hash_buckets
        with pytest.raises(CheckpointError, match=rf"trained with data\.{field}="):
            assemble(own)


def test_the_way_to_a_streamed_teacher_says_what_streams_need(folder):
    own = config(folder, data__part="student")
    said = origins.how_to_get(own, "teacher.workdir", "runs/t")
    for option in ("pipeline=stream", "hash_buckets=50", "oversample=False", "part=teacher"):
        assert f" --config.data.{option}" in said


@pytest.mark.parametrize(("field", "value"), [("oversample", True), ("min_count", 2)])
def test_what_needs_all_rows_beforehand_is_refused(folder, field, value):
    with pytest.raises(ConfigError, match=rf"^data\.{field}=.* with .*'stream', which reads no"):
        configs.check(config(folder, role__name="alone", **{f"data__{field}": value}))


@pytest.mark.parametrize("value", [0, 1])
def test_a_number_of_buckets_that_cannot_be_is_refused(folder, value):
    with pytest.raises(ConfigError, match=rf"^data\.hash_buckets={value}: must be an integer >= 2"):
        configs.check(config(folder, role__name="alone", data__hash_buckets=value))
