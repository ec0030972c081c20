"""Streams: the order, its shards and its restarts; crops; images that cannot be decoded."""

from __future__ import annotations

import io
import multiprocessing
import os
import re
import resource
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from scipy import stats
from sklearn.datasets import load_sample_image

from tests import pictures
from tests.conftest import ROOT
from tgeo_jax.data import crops, streaming
from tgeo_jax.errors import ConfigError, DataError

TRAIN, SIZE = 30, 8  # images of the training split; pixels of a side
DAMAGED = ("train_4.JPEG", "train_11.JPEG")


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> str:
    """A TFDS folder with the stand-in for ImageNet."""
    folder = str(tmp_path_factory.mktemp("photos"))
    pictures.prepare_imagenet(folder, TRAIN, 11)
    return folder


@pytest.fixture(scope="module")
def damaged(tmp_path_factory) -> str:
    """The same, where two training images are cut off."""
    folder = str(tmp_path_factory.mktemp("damaged"))
    pictures.prepare_imagenet(folder, TRAIN, 11, corrupt=DAMAGED)
    return folder


def stream(folder, split="train", count=TRAIN, **options):
    records = streaming.Records("imagenet2012", folder, split, np.arange(count))
    return streaming.Stream(records, SIZE, **options)


def read(reader, steps, batch_size=4, *, seed=0, first_step=0, crop=True, **options):
    """Images [steps * B, S, S, C] and labels of some steps."""
    batches = reader.batches(seed, first_step, batch_size, crop=crop, **options)
    found = [next(batches) for _ in range(steps)]
    batches.close()
    images, labels = (np.concatenate(part) for part in zip(*found, strict=True))
    return images, labels


def swept(reader, batch_size=4):
    return [np.concatenate(part) for part in zip(*reader.sweep(batch_size), strict=True)]


def order(reader, steps, batch_size=5, **options):
    """Which examples come, by their pixels; the defaults give epochs of 6 steps."""
    known = {image.tobytes(): index for index, image in enumerate(swept(reader)[0][: len(reader)])}
    assert len(known) == len(reader)
    return [
        known[image.tobytes()]
        for image in read(reader, steps, batch_size, crop=False, **options)[0]
    ]


# The order.


def test_every_epoch_is_a_permutation_of_its_own(photos):
    epochs = np.reshape(order(stream(photos), 18), (3, TRAIN)).tolist()
    assert [sorted(epoch) for epoch in epochs] == [list(range(TRAIN))] * 3
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert list(range(TRAIN)) not in epochs


def test_the_order_depends_on_the_seed_and_not_on_the_batch_size(photos):
    first, same, other = (
        order(stream(photos), 30 // size, size, seed=seed)
        for size, seed in ((5, 7), (3, 7), (5, 8))
    )
    assert first == same != other


def test_batches_go_on_over_the_end_of_an_epoch(photos):
    whole = order(stream(photos), 12)
    assert order(stream(photos), 8, 7) == whole[:56]  # the fifth batch is of two epochs


@pytest.mark.parametrize("first_step", [1, 7, 8, 20])
def test_a_restart_sees_the_crops_of_an_undisturbed_run(photos, first_step):
    undisturbed = read(stream(photos), 24)[0]
    again = read(stream(photos), 24 - first_step, first_step=first_step)[0]
    np.testing.assert_array_equal(again, undisturbed[4 * first_step :])


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_give_the_crops_of_threads(photos, workers):
    expected = read(stream(photos), 9, first_step=5)
    found = read(stream(photos, workers=workers), 9, first_step=5)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not multiprocessing.active_children()


def test_the_shards_of_processes_joined_are_the_global_batches(photos):
    whole = read(stream(photos), 10, 6, first_step=2)
    for count in (2, 3):
        parts = [
            read(stream(photos), 10, 6 // count, first_step=2, shard=(index, count))
            for index in range(count)
        ]
        for name, expected in enumerate(whole):
            steps = [part[name].reshape(10, 6 // count, *expected.shape[1:]) for part in parts]
            joined = np.concatenate(steps, axis=1).reshape(expected.shape)
            np.testing.assert_array_equal(joined, expected)


def test_every_visit_to_an_image_crops_it_anew(photos):
    images, _ = read(stream(photos, count=1), 12, 1)
    assert len({image.tobytes() for image in images}) > 9
    other, _ = read(stream(photos, count=1), 12, 1, seed=1)
    assert images.tobytes() != other.tobytes()


# Sweeps.


@pytest.mark.parametrize("batch_size", [1, 4, 11, 50])
def test_a_sweep_sees_every_example_once_in_order_and_flags_padding(photos, batch_size):
    reader = stream(photos, "validation", 11)
    images, labels, real = swept(reader, batch_size)
    assert len(images) == len(labels) == len(real) == -(-11 // batch_size) * batch_size
    assert real.tolist() == [True] * 11 + [False] * (len(real) - 11)
    assert not images[11:].any()
    names = [reader.records.called(index).partition(".")[0] for index in range(11)]
    numbers = [int(name.removeprefix("validation_")) for name in names]
    assert sorted(numbers) == list(range(11))
    assert labels[:11].tolist() == [pictures.label(number) for number in numbers]
    for image, number in zip(images, numbers, strict=False):
        jpeg = pictures.encoded(pictures.picture("validation", number))
        np.testing.assert_array_equal(image, crops.square(jpeg, SIZE, 3, None))


def test_streamed_images_have_the_documented_types(photos):
    images, labels = read(stream(photos), 1)
    assert (images.shape, images.dtype) == ((4, SIZE, SIZE, 3), np.uint8)
    assert (labels.shape, labels.dtype) == ((4,), np.int32)


# Crops.


def test_random_boxes_have_the_published_distribution():
    side, random = 5000, np.random.default_rng(0)
    boxes = np.array([crops.random_box((side, side), random) for _ in range(4000)])
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] <= side).all()
    wide, high = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    share, ratio = wide * high / side**2, wide / high
    assert share.min() >= 0.0799
    assert abs(np.log(ratio)).max() <= np.log(4 / 3) + 1e-3
    # Up to 3/4 of the area every allowed shape fits, so nothing was drawn again.
    fits = share < 0.75
    assert stats.kstest(share[fits], "uniform", (0.08, 0.67)).pvalue > 0.01
    log_range = (np.log(3 / 4), 2 * np.log(4 / 3))
    assert stats.kstest(np.log(ratio[fits]), "uniform", log_range).pvalue > 0.01
    for start, length in ((boxes[:, 0], wide), (boxes[:, 1], high)):
        placed = (start + 0.5) / (side - length + 1)
        assert stats.kstest(placed[fits], "uniform").pvalue > 0.01


@pytest.mark.parametrize(
    ("size", "box"),
    [
        ((1000, 10), (493, 0, 506, 10)),  # as wide as 4:3 allows
        ((10, 1000), (0, 493, 10, 506)),
        ((1, 1), (0, 0, 1, 1)),
    ],
)
def test_where_no_random_box_fits_it_is_the_largest_centred_one(size, box):
    assert {crops.random_box(size, np.random.default_rng(n)) for n in range(5)} == {box}


@pytest.mark.parametrize("size", [(500, 400), (400, 500), (640, 427), (333, 250), (300, 300)])
def test_the_centre_is_that_of_resizing_to_256_and_cropping_224(size):
    photo = Image.fromarray(load_sample_image("china.jpg")).resize(size)
    png = io.BytesIO()
    photo.save(png, "PNG")
    found = crops.square(png.getvalue(), 224, 3, None)
    short = min(size)
    resized = photo.resize([256 * side // short for side in size], Image.Resampling.BILINEAR)
    left, upper = (round((side - 224) / 2) for side in resized.size)
    expected = np.asarray(resized.crop((left, upper, left + 224, upper + 224)))
    assert np.abs(found.astype(int) - expected).max() <= 2


@pytest.mark.parametrize("number", [0, pictures.CMYK, 3])
def test_grey_and_cmyk_images_become_rgb(number):
    made = pictures.picture("train", number)
    assert made.mode == {0: "L", pictures.CMYK: "CMYK", 3: "RGB"}[number]
    found = crops.square(pictures.encoded(made), 16, 3, None)
    if made.mode == "L":
        assert (found == found[..., :1]).all()
    expected = made.convert("RGB").resize((16, 16), 2, crops.centre_box(made.size, 16))
    assert np.abs(found.astype(int) - np.asarray(expected)).mean() < 6  # what JPEG loses


def test_a_grey_dataset_has_one_channel():
    found = crops.square(pictures.encoded(pictures.picture("train", 3)), 16, 1, None)
    assert found.shape == (16, 16, 1)


# Images that cannot be decoded.


def test_a_corrupt_image_is_replaced_by_the_next_counted_once_and_named_in_the_log(damaged, caplog):
    reader = stream(damaged)
    images, _ = read(reader, 18, 5, crop=False)
    assert images.reshape(len(images), -1).any(1).all()  # none is blank
    assert [name.partition(" ")[0] for name in sorted(reader.corrupt)] == sorted(DAMAGED)
    for name in reader.corrupt:
        assert re.fullmatch(r"train_\d+\.JPEG \(imagenet2012 train\[\d+\]\)", name)
        assert sum(name in record.getMessage() for record in caplog.records) == 1
    swept(reader)
    assert len(reader.corrupt) == 2
    corrupt = [int(re.search(r"\[(\d+)\]", name)[1]) for name in reader.corrupt]
    clean = swept(reader)[0]
    following = [(index + 1) % TRAIN for index in corrupt]
    assert not set(following) & set(corrupt)
    epoch = [image.tobytes() for image in images[:TRAIN]]
    for index in following:
        assert epoch.count(clean[index].tobytes()) == 2


@pytest.mark.parametrize(("count", "batch_size"), [(2, 4), (2, 8), (4, 8), (4, 16)])
def test_processes_sweep_their_rows_of_every_batch(photos, count, batch_size):
    """11 examples: of the last batch some processes get a part, and some nothing."""
    reader = stream(photos, "validation", 11)
    rows = batch_size // count
    shards = [list(reader.sweep(batch_size, (index, count))) for index in range(count)]
    together = [
        np.concatenate([np.concatenate([shard[step][part] for shard in shards]) for step in steps])
        for part in range(3)
        for steps in [range(len(shards[0]))]
    ]
    assert {len(shard) for shard in shards} == {-(-11 // batch_size)}
    assert {len(labels) for shard in shards for _, labels, _ in shard} == {rows}
    for found, expected in zip(together, swept(reader, batch_size), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_in_a_sweep_a_corrupt_image_is_blank_and_not_counted(damaged):
    reader = stream(damaged)
    images, _, real = swept(reader, 7)
    missing = np.flatnonzero(~real[:TRAIN])
    assert [reader.records.called(index).partition(" ")[0] in DAMAGED for index in missing] == [
        True,
        True,
    ]
    assert not images[missing].any()
    assert len(reader.corrupt) == 2


@pytest.mark.parametrize("reading", ["batches", "sweep"])
def test_more_corrupt_images_than_allowed_stop_with_their_names(damaged, reading):
    reader = stream(damaged, max_corrupt=1)
    with pytest.raises(DataError, match=r"data\.max_corrupt=1: 2 images") as raised:
        read(reader, 6, 5) if reading == "batches" else swept(reader)
    assert all(name in str(raised.value) for name in DAMAGED)


def test_workers_name_corrupt_images_and_end_with_the_error(damaged):
    with pytest.raises(DataError, match=r"data\.max_corrupt=0: 1 images"):
        read(stream(damaged, max_corrupt=0, workers=1), 6, 5)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_dataset_of_corrupt_images_alone_is_an_error(tmp_path, workers):
    names = [pictures.file_name("train", number) for number in range(3)]
    pictures.prepare_imagenet(str(tmp_path), 3, 1, corrupt=names)
    reader = stream(str(tmp_path), count=3, workers=workers, max_corrupt=100)
    with pytest.raises(DataError, match=r"64 images from train_\d\.JPEG .*cannot be decoded"):
        read(reader, 1)


# Files and processes.


def test_a_dataset_of_more_files_than_may_be_open_is_read_all_the_same(tmp_path):
    pictures.prepare_imagenet(str(tmp_path), 60, 60, files=60)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowered = len(os.listdir("/proc/self/fd")) + 30
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowered, limits[1]))
    try:
        assert swept(stream(str(tmp_path), count=60))[2].all()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_workers_need_no_flags_and_no_device_and_end_when_their_parent_is_killed(photos, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import multiprocessing, os, signal, sys\n"
        "import numpy as np\n"
        "from tgeo_jax.data import streaming\n"
        "if __name__ == '__main__':\n"
        "    records = streaming.Records('imagenet2012', sys.argv[1], 'train', np.arange(9))\n"
        "    batches = streaming.Stream(records, 8, workers=1).batches(0, 0, 2, crop=True)\n"
        "    next(batches)\n"
        "    print(*(child.pid for child in multiprocessing.active_children()), flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    # With a platform that does not exist, whatever starts JAX fails.
    environment = {**os.environ, "JAX_PLATFORMS": "nowhere", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(script), photos],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    (worker,) = (int(word) for word in done.stdout.split())
    deadline = time.monotonic() + 60
    while os.path.exists(f"/proc/{worker}"):
        assert time.monotonic() < deadline, f"worker {worker} outlives its parent"
        time.sleep(0.1)


# Datasets.


def load(folder, **options):
    return streaming.load("imagenet2012", folder, image_size=SIZE, **options)


def test_the_splits_are_disjoint_complete_and_fixed_by_their_seed(photos):
    first, same, other = (load(photos, split_seed=seed) for seed in (0, 0, 1))
    parts = [split.records.positions for split in (first.train, first.validation)]
    assert [len(part) for part in parts] == [27, 3]
    assert sorted(np.concatenate(parts)) == list(range(TRAIN))
    assert (len(first.test), first.test.records.split) == (11, "validation")
    held_out = [found.validation.records.positions.tolist() for found in (first, same, other)]
    assert held_out[0] == held_out[1] != held_out[2]
    assert (first.num_classes, first.example.shape) == (1000, (1, SIZE, SIZE, 3))


def test_a_fraction_keeps_part_of_the_training_images_and_holds_out_the_same(photos):
    whole, part = load(photos), load(photos, fraction=0.5)
    assert len(part.train) == 14  # 13.5, rounded to even
    assert set(part.train.records.positions) < set(whole.train.records.positions)
    np.testing.assert_array_equal(
        part.validation.records.positions, whole.validation.records.positions
    )


def test_the_digest_changes_with_what_is_in_which_split(photos):
    changes = ({}, {"split_seed": 1}, {"fraction": 0.5}, {"validation_fraction": 0.2})
    found = [load(photos, **options).digest() for options in changes]
    assert len(set(found)) == 4
    assert load(photos).digest() == found[0]
    assert streaming.load("imagenet2012", photos, image_size=9).digest() not in found


def test_a_stream_finds_its_files_from_another_folder(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(os.path.dirname(photos))
    dataset = load(os.path.basename(photos))
    monkeypatch.setenv("TFDS_DATA_DIR", photos)
    monkeypatch.chdir(tmp_path)
    assert len(swept(dataset.test)[0]) == 12


def test_all_corrupt_images_of_a_dataset_are_known(damaged):
    dataset = load(damaged)
    assert dataset.corrupt == ()
    for split in (dataset.train, dataset.validation, dataset.test):
        swept(split)
    assert len(dataset.corrupt) == 2


def test_what_cannot_be_streamed_is_refused(photos, digits_dir, tmp_path):
    with pytest.raises(ConfigError, match=r"^data\.mean=\(\): .*each channel, 1"):
        streaming.load("digits", digits_dir, image_size=8)
    with pytest.raises(ConfigError, match=r"^data\.std=\(1, 2\): .*each channel, 3"):
        load(photos, std=(1, 2))
    with pytest.raises(ConfigError, match="did you mean 'imagenet2012'"):
        streaming.load("imagenet", photos, image_size=8)
    with pytest.raises(DataError, match=r"not prepared in .*\n.*--dataset=imagenet2012"):
        load(str(tmp_path))
    pictures.prepare_imagenet(str(tmp_path), 5, 0)
    with pytest.raises(DataError, match="holds no validation split"):
        load(str(tmp_path))
