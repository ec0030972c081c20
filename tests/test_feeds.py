"""Streamed batches as the steps of whole runs: the same in any chunks, and after a restart."""

from __future__ import annotations

import dataclasses
import itertools
import multiprocessing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict

from tests import methods, pictures
from tgeo_jax import (
    checkpoint,
    distill,
    evaluate,
    feeds,
    geometry,
    models,
    parallel,
    ratios,
    teachers,
    train,
)
from tgeo_jax import config as configs
from tgeo_jax.assemble import assemble
from tgeo_jax.data import resident, streaming
from tgeo_jax.dispatch import Dispatcher, Resident
from tgeo_jax.errors import CheckpointError, ConfigError
from tgeo_jax.randomness import Purpose
from tgeo_jax.state import Batch
from tgeo_jax.writers import read_records

NORMALISATION = {"mean": (0.3,), "std": (0.4,)}
BATCH, META_BATCH = 8, 6


def _stream(digits_dir, **options) -> streaming.StreamedDataset:
    return streaming.load("digits", digits_dir, image_size=5, **NORMALISATION, **options)


def _feed(digits_dir, *, seed=0, **changes) -> feeds.Streamed:
    config = configs.default()
    config.data.batch_size, config.meta.batch_size = BATCH, META_BATCH
    mesh = parallel.make_mesh(1, jax.devices()[:1])
    return feeds.Streamed(config, methods.method(**changes), _stream(digits_dir), mesh, seed)


def _same(a: Batch, b: Batch) -> None:
    np.testing.assert_array_equal(a.images_BxHxWxC, b.images_BxHxWxC)
    np.testing.assert_array_equal(a.labels_B, b.labels_B)


def _steps(batches: Batch, first: int, last: int | None = None) -> Batch:
    return jax.tree.map(lambda values: values[first:last], batches)


# The feed.


@pytest.mark.parametrize("order", distill.ORDERS)
def test_chunks_of_any_size_hold_the_batches_of_a_long_one(digits_dir, order):
    whole = _feed(digits_dir, order=order).chunk(0, 5)
    feed = _feed(digits_dir, order=order)
    parts = [feed.chunk(0, 2), feed.chunk(2, 3)]
    feed.close()
    for name in ("train", "validation"):
        expected = getattr(whole, name)
        for part, first in zip(parts, (0, 2), strict=True):
            own = getattr(part, name)
            _same(own, _steps(expected, first, first + len(own.labels_B)))
    assert whole.train.images_BxHxWxC.shape == (5 + (order == "prequential"), BATCH, 5, 5, 1)


def test_a_prequential_chunk_ends_with_the_batch_that_the_next_begins_with(digits_dir):
    feed = _feed(digits_dir, order="prequential")
    chunks = [feed.chunk(0, 2), feed.chunk(2, 1), feed.chunk(3, 4)]
    assert [len(chunk.train.labels_B) for chunk in chunks] == [3, 2, 5]
    for before, after in itertools.pairwise(chunks):
        _same(_steps(before.train, -1), _steps(after.train, 0, 1))


@pytest.mark.parametrize("order", distill.ORDERS)
def test_a_feed_that_starts_at_a_step_goes_on_as_an_undisturbed_one(digits_dir, order):
    undisturbed = _feed(digits_dir, order=order).chunk(0, 7)
    for feed in (_feed(digits_dir, order=order), used := _feed(digits_dir, order=order)):
        if feed is used:  # one that has read something else before, and was closed
            feed.chunk(0, 2)
            feed.close()
        chunk = feed.chunk(4, 3)
        _same(chunk.train, _steps(undisturbed.train, 4))
        _same(chunk.validation, _steps(undisturbed.validation, 4))


def test_the_batches_depend_on_the_seed(digits_dir):
    first, other = (_feed(digits_dir, seed=seed).chunk(0, 2).train for seed in (0, 1))
    assert not np.array_equal(first.images_BxHxWxC, other.images_BxHxWxC)


def test_outer_batches_are_of_the_validation_split_uncropped(digits_dir):
    chunk = _feed(digits_dir).chunk(0, 2)
    held_out = _stream(digits_dir).validation
    images, _, real = (np.concatenate(part) for part in zip(*held_out.sweep(50), strict=True))
    known = {image.tobytes() for image in images[real]}
    found = np.asarray(chunk.validation.images_BxHxWxC).reshape(-1, 5, 5, 1)
    assert len(found) == 2 * META_BATCH
    assert {image.tobytes() for image in found} <= known


def test_nothing_is_read_of_the_validation_split_without_an_outer_loss(digits_dir):
    chunk = _feed(digits_dir, ratio=ratios.constant()).chunk(0, 2)
    assert chunk.validation is chunk.train


def test_processes_together_read_the_batches_of_one(digits_dir, monkeypatch):
    whole = _feed(digits_dir).chunk(3, 2)
    parts = []
    for index in range(2):
        monkeypatch.setattr(streaming, "process_shard", lambda index=index: (index, 2))
        parts.append(_feed(digits_dir).chunk(3, 2))
    for name in ("train", "validation"):
        joined = jax.tree.map(
            lambda *values: np.concatenate(values, axis=1), *(getattr(p, name) for p in parts)
        )
        _same(joined, getattr(whole, name))


# The step.


@pytest.mark.parametrize("order", ["student_first", "prequential"])
def test_streamed_steps_equal_resident_ones_on_the_same_batches(order):
    student = models.build("mlp", methods.NUM_CLASSES, hidden=())
    method = methods.method(order=order, student=student)
    data = Resident(methods.examples(40), methods.examples(24, seed=1))
    mesh = parallel.make_mesh(1, jax.devices()[:1])

    def start():
        init = jax.vmap(
            lambda seed: distill.init_state(method, seed, data.train.images_BxHxWxC[:1]),
            out_axes=parallel.SEED_AXES,
        )
        return jax.jit(init)(np.array([5], np.uint32))

    def gathered(split, num_steps, size, purpose):
        rows = resident.batch_indices(5, 0, num_steps, size, len(split.labels_B), purpose)
        return jax.tree.map(lambda values: values[rows], split)

    ahead = order == "prequential"
    batches = Resident(
        gathered(data.train, 6 + ahead, BATCH, Purpose.TRAIN_ORDER),
        gathered(data.validation, 6, META_BATCH, Purpose.VALIDATION_ORDER),
    )
    if ahead:
        batches = batches._replace(validation=batches.train)
    found = []
    for streamed, given in ((False, data), (True, batches)):
        dispatcher = Dispatcher(method, mesh, BATCH, META_BATCH, streamed=streamed)
        state, outcome = dispatcher.run(start(), methods.teacher(), given, 6)
        found.append(jax.device_get((state.student, state.fusion, outcome.sums)))
    methods.close(*found, rtol=2e-4, atol=1e-5)


# Class means and evaluation over a stream.


@pytest.mark.parametrize("teachers_asked", [0, 2])
def test_streamed_class_means_are_those_over_all_logits(digits_dir, teachers_asked):
    split = _stream(digits_dir, fraction=0.1).train
    _, labels, real = (np.concatenate(part) for part in zip(*split.sweep(50), strict=True))
    without_nines = split.records.positions[labels[real] != 9]
    records = dataclasses.replace(split.records, positions=without_nines)
    split = dataclasses.replace(split, records=records)
    images, labels, real = (np.concatenate(part) for part in zip(*split.sweep(50), strict=True))
    weights = np.random.RandomState(0).randn(max(teachers_asked, 1), 25, 10).astype(np.float32)

    def predict(variables, images):
        logits = jnp.einsum("bp,mpk->mbk", images.reshape(len(images), 25) / 255.0, variables)
        return logits if teachers_asked else logits[0]

    asked = evaluate.Evaluator(predict, 50, seeds=False)
    found = teachers._streamed_means(asked, weights, split, 10)
    logits = np.asarray(predict(weights, images[real]))
    each = [
        geometry.class_mean_predictions(jax.nn.softmax(one), jnp.asarray(labels[real]), 10)
        for one in (logits if teachers_asked else logits[None])
    ]
    expected = np.stack(each) if teachers_asked else each[0]
    np.testing.assert_allclose(expected[..., 9, :], 0.1)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_what_cannot_be_decoded_counts_neither_in_metrics_nor_in_class_means(tmp_path):
    names = [pictures.file_name("train", number) for number in (4, 11)]
    pictures.prepare_imagenet(str(tmp_path), 20, 1, corrupt=names)
    records = streaming.Records("imagenet2012", str(tmp_path), "train", np.arange(20))
    split = streaming.Stream(records, 8)
    images, labels, real = (np.concatenate(part) for part in zip(*split.sweep(20), strict=True))
    assert real.sum() == 18

    def predict(scale, images):
        return scale * jax.nn.one_hot(images.mean((1, 2, 3)).astype(jnp.int32) % 7, 7)

    asked = evaluate.Evaluator(predict, 6, seeds=False)
    readable = Batch(jnp.asarray(images[real]), jnp.asarray(labels[real]))
    found, expected = (asked.metrics(2.0, part) for part in (split, readable))
    assert found["accuracy"].count == 18
    methods.close(found, expected)
    logits = asked.logits(2.0, split)
    assert logits.shape == (20, 7)
    np.testing.assert_allclose(logits[real], predict(2.0, readable.images_BxHxWxC))
    told = asked.metrics(2.0, split, jnp.asarray(logits))
    assert (told["teacher_agreement"].total, told["teacher_agreement"].count) == (18, 18)
    means = teachers._streamed_means(asked, 2.0, split, 7)
    by_hand = geometry.class_mean_predictions(
        jax.nn.softmax(logits[real]), jnp.asarray(labels[real]), 7
    )
    np.testing.assert_allclose(means, by_hand, atol=1e-6)


# Whole runs.


def _config(digits_dir) -> ConfigDict:
    config = configs.default()
    config.data.update(
        dir=digits_dir, pipeline="stream", image_size=8, flip=True, batch_size=64, **NORMALISATION
    )
    config.role.name = "alone"
    config.student.name = "mlp"
    config.student.mlp.hidden = (8,)
    config.train.update(epochs=2, steps_per_dispatch=5, checkpoint_every=1)
    return config


def _timeless(workdir):
    return [
        {name: value for name, value in record.items() if not name.startswith("time/")}
        for record in read_records(workdir / "metrics.jsonl")
    ]


def _networks(workdir):
    return [checkpoint.load_network(workdir / "checkpoints", which) for which in ("last", "best")]


class _Interrupted(Exception):
    """Stands for whatever ends a run from outside."""


@pytest.fixture(scope="module")
def compiled_once(digits_dir):
    """The runs of these tests compile the same programs; the cache is that of commands."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = [getattr(jax.config, name) for name in names]
    for values in ((f"{digits_dir}/compiled", 0), before):
        for name, value in zip(names, values, strict=True):
            jax.config.update(name, value)
        compilation_cache.reset_cache()  # it looks at the configuration only once
        if values is not before:
            yield


@pytest.fixture(scope="module")
def teacher_dir(compiled_once, digits_dir, tmp_path_factory):
    """A finished streamed run."""
    workdir = tmp_path_factory.mktemp("teacher")
    train.run(_config(digits_dir), workdir, progress=False)
    return workdir


@pytest.mark.parametrize("method", ["alone", "tgeo"])
def test_an_interrupted_run_goes_on_to_the_same_bits(
    digits_dir, teacher_dir, tmp_path, monkeypatch, method
):
    config, undisturbed = _config(digits_dir), teacher_dir
    if method == "tgeo":
        config.role.name = "frozen"
        config.teacher.update(name="mlp", workdir=str(teacher_dir))
        config.teacher.mlp.hidden = (8,)
        config.ratio.name = "tgeo"
        config.meta.batch_size = 32
        undisturbed = tmp_path / "undisturbed"
        result = train.run(config, undisturbed, progress=False)
        assert result["teacher"]["test_accuracy"] > 0.3
        assert {"train/ratio", "train/outer_loss"} <= set(_timeless(undisturbed)[0])

    chunk = feeds.Streamed.chunk

    def interrupted(self, step, num_steps):
        if step > 25:  # in the second epoch of 20 steps
            raise _Interrupted
        return chunk(self, step, num_steps)

    with monkeypatch.context() as patched:
        patched.setattr(feeds.Streamed, "chunk", interrupted)
        with pytest.raises(_Interrupted):
            train.run(config, tmp_path / "disturbed", progress=False)
    assert [record["step"] for record in _timeless(tmp_path / "disturbed")] == [20]
    kept = checkpoint.Checkpoints(tmp_path / "disturbed" / "checkpoints")
    assert kept.latest_step() == 30  # all that was trained before there was no next batch
    kept.close()
    result = train.run(config, tmp_path / "disturbed", progress=False)
    assert result["steps"] == 40
    jax.tree.map(
        np.testing.assert_array_equal, _networks(tmp_path / "disturbed"), _networks(undisturbed)
    )
    for found, expected in zip(*map(_timeless, (tmp_path / "disturbed", undisturbed)), strict=True):
        for name in found:  # of the second epoch the resumed run saw the rest only
            if found["step"] == 20 or not name.startswith("train/"):
                assert found[name] == expected[name], name


def test_a_run_with_workers_is_the_same_to_the_bit_and_leaves_none_behind(
    digits_dir, teacher_dir, tmp_path
):
    config = _config(digits_dir)
    config.data.workers = 1
    train.run(config, tmp_path / "run", progress=False)
    assert not multiprocessing.active_children()
    assert _timeless(tmp_path / "run") == _timeless(teacher_dir)


def test_a_streamed_run_tests_on_the_whole_test_split_and_learns(teacher_dir):
    last = _timeless(teacher_dir)[-1]
    assert last["test/accuracy"] > 0.3  # of ten classes, after forty steps
    assert last["test/accuracy"] * 360 == pytest.approx(round(last["test/accuracy"] * 360))


def test_a_streamed_split_that_is_too_small_is_refused(digits_dir, tmp_path):
    config = _config(digits_dir)
    config.data.batch_size = 2000
    with pytest.raises(ConfigError, match=r"data\.batch_size=2000: larger than its split of 1293"):
        train.run(config, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_a_teacher_from_the_other_pipeline_is_refused(digits_dir, teacher_dir):
    # It holds other examples out: the student's are among those that it learned.
    config = _config(digits_dir)
    config.role.name = "frozen"
    config.teacher.workdir = str(teacher_dir)
    config.data.pipeline = "resident"
    with pytest.raises(CheckpointError, match=r"data\.pipeline='stream', this run has 'resident'"):
        assemble(config)
