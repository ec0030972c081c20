import io
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import tensorflow_datasets as tfds
from PIL import Image
from sklearn.datasets import load_digits

from tgeo_jax.data import resident, sources, splits, views
from tgeo_jax.errors import ConfigError, DataError
from tgeo_jax.randomness import Purpose

UNEVEN = np.repeat([0, 1, 2], [100, 50, 30])  # labels whose tenth is 10, 5 and 3


# Splits.


def test_a_stratified_split_keeps_the_share_of_every_class():
    kept, held_out = splits.stratified(UNEVEN, 0.1, seed=0, num_classes=3)
    assert np.bincount(UNEVEN[held_out]).tolist() == [10, 5, 3]
    assert np.bincount(UNEVEN[kept]).tolist() == [90, 45, 27]


def test_the_parts_of_a_split_are_disjoint_and_complete():
    parts = splits.stratified(UNEVEN, 0.1, seed=0, num_classes=3)
    assert sorted(np.concatenate(parts)) == list(range(180))


def test_a_split_is_sorted():
    for part in splits.stratified(UNEVEN[::-1], 0.1, seed=0, num_classes=3):
        assert part.tolist() == sorted(part)


def test_a_split_is_fixed_by_its_seed():
    first, second, other = (splits.stratified(UNEVEN, 0.1, seed, 3)[1] for seed in (4, 4, 5))
    assert first.tolist() == second.tolist()
    assert first.tolist() != other.tolist()


@pytest.mark.parametrize(
    ("counts", "fraction", "missing"),
    [
        ([50, 50, 3], 0.1, r"class 2 has no example in the held-out split"),
        ([3, 50, 50], 0.1, r"class 0 has no example in the held-out split"),
        ([10, 10, 0], 0.2, r"class 2 has no example in the training split"),
        ([3, 50, 50], 0.9, r"class 0 has no example in the training split"),
        # scikit-learn refuses a single example itself.
        ([20, 20, 1], 0.1, r"2"),
    ],
)
def test_a_class_too_small_to_split_is_named(counts, fraction, missing):
    labels = np.repeat(range(3), counts)
    with pytest.raises(DataError, match=rf"^data\.validation_fraction={fraction}: .*{missing}"):
        splits.stratified(labels, fraction, seed=0, num_classes=3)


def test_a_split_with_fewer_examples_than_classes_is_a_data_error():
    with pytest.raises(DataError, match=r"^data\.validation_fraction=0\.1: .*4 examples"):
        splits.stratified(np.array([0, 0, 1, 1]), 0.1, seed=0, num_classes=2)


@pytest.mark.parametrize(("noise", "replaced"), [(0.0, 0), (0.1, 18), (0.333, 60), (0.9, 162)])
def test_corruption_replaces_exactly_its_share_by_another_class(noise, replaced):
    found = splits.corrupt_labels(UNEVEN, noise, seed=0, num_classes=3)
    assert (found != UNEVEN).sum() == replaced
    assert set(found.tolist()) <= {0, 1, 2}


def test_corruption_takes_every_other_class_alike():
    labels = np.full(4000, 2, np.int32)
    counts = np.bincount(splits.corrupt_labels(labels, 0.75, seed=0, num_classes=4))
    assert counts[2] == 1000
    # 3,000 to three classes: 1,000 each, standard deviation 26.
    np.testing.assert_allclose(counts[[0, 1, 3]], 1000, atol=100)


def test_corruption_is_fixed_by_its_seed():
    first, second, other = (splits.corrupt_labels(UNEVEN, 0.3, seed, 3) for seed in (4, 4, 5))
    assert first.tolist() == second.tolist()
    assert first.tolist() != other.tolist()


def test_corruption_leaves_its_input_alone():
    labels = np.zeros(20, np.int32)
    assert splits.corrupt_labels(labels, 0.5, seed=0, num_classes=2).dtype == np.int32
    assert labels.sum() == 0


# Batch order: 10 examples in batches of 3 make epochs of 3 steps that leave one example out.


def order(seed=0, first_step=0, num_steps=21, purpose=Purpose.TRAIN_ORDER, sizes=(3, 10)):
    """Batches of some steps, [num_steps, B]; the defaults are the first 7 epochs."""
    return np.asarray(_order(seed, first_step, num_steps, *sizes, purpose))


_order = jax.jit(resident.batch_indices, static_argnums=(2, 3, 4, 5))


def test_every_epoch_is_a_permutation_prefix():
    for epoch in order().reshape(7, 9).tolist():
        assert len(set(epoch)) == 9
        assert set(epoch) <= set(range(10))


def test_epochs_differ_and_leave_out_different_examples():
    epochs = order().reshape(7, 9).tolist()
    assert len({tuple(epoch) for epoch in epochs}) == 7
    assert len({45 - sum(epoch) for epoch in epochs}) > 1  # 0 + 1 + ... + 9 = 45


@pytest.mark.parametrize("first_step", [1, 2, 3, 4, 5, 6, 11])
def test_a_restart_sees_the_batches_of_an_undisturbed_run(first_step):
    undisturbed = order()[first_step:]
    np.testing.assert_array_equal(order(first_step=first_step)[: len(undisturbed)], undisturbed)


def test_single_steps_see_the_batches_of_a_long_call():
    single = [order(first_step=step, num_steps=1)[0] for step in range(7)]
    np.testing.assert_array_equal(single, order()[:7])


def test_the_order_depends_on_the_seed():
    assert order(seed=1).tolist() != order().tolist()


def test_training_and_validation_have_orders_of_their_own():
    assert order(purpose=Purpose.VALIDATION_ORDER).tolist() != order().tolist()


def test_a_batch_may_be_the_whole_split():
    rows = order(num_steps=2, sizes=(4, 4)).tolist()
    assert [sorted(row) for row in rows] == [[0, 1, 2, 3]] * 2


def test_a_batch_larger_than_its_split_is_refused():
    with pytest.raises(ValueError, match="batch_size=5: must be in 1"):
        order(num_steps=1, sizes=(5, 4))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 16, 17, 100, 1000, 45_000])
def test_positions_are_permuted_onto_each_other(count):
    found = jax.jit(resident.permuted, static_argnums=2)(
        jax.random.key(3), jnp.arange(count), count
    )
    np.testing.assert_array_equal(np.sort(found), np.arange(count))


def test_every_number_comes_to_every_place_equally_often():
    count, draws = 12, 6000
    keys = jax.random.split(jax.random.key(0), draws)
    one = lambda key: resident.permuted(key, jnp.arange(count), count)  # noqa: E731
    found = np.asarray(jax.jit(jax.vmap(one))(keys))
    places = np.stack([(found == value).sum(0) for value in range(count)])
    expected = draws / count
    # Pearson's statistic for a table with fixed margins: (count - 1)^2 degrees of freedom.
    statistic = ((places - expected) ** 2 / expected).sum()
    freedom = (count - 1) ** 2
    assert abs(statistic - freedom) < 4 * np.sqrt(2 * freedom)
    # And neighbours are as unlike as in a random order: a successor follows once in `count`.
    follows = (np.diff(found, axis=1) == 1).mean() * count
    assert follows == pytest.approx(1, abs=0.03)


# Views.


def test_normalise_by_hand():
    pixels = np.uint8([[0, 51], [102, 255]])  # 0, .2, .4 and 1
    images = np.stack([pixels, pixels], axis=-1)[None]
    found = views.normalise((0.2, 0.5), (0.4, 0.5))(images)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found[0, :, :, 0], [[-0.5, 0], [0.5, 2]], atol=1e-6)
    np.testing.assert_allclose(found[0, :, :, 1], [[-1, -0.6], [-0.2, 1]], atol=1e-6)


def training_view(clean_view=lambda images: images, *, crop_padding=0, flip=False):
    view = views.augment(clean_view, crop_padding=crop_padding, flip=flip)
    return jax.jit(lambda key, images: view(jax.random.split(key, len(images)), images))


IMAGE = np.arange(1, 33, dtype=np.uint8).reshape(4, 4, 2)  # no two pixels alike, none zero


@pytest.mark.parametrize("padding", [1, 2])
def test_a_crop_is_one_of_the_shifts_and_every_shift_occurs(padding):
    padded = np.pad(IMAGE, [(padding, padding), (padding, padding), (0, 0)])
    corners = range(2 * padding + 1)
    shifts = {padded[i : i + 4, j : j + 4].tobytes() for i in corners for j in corners}
    view = training_view(crop_padding=padding)
    found = np.asarray(view(jax.random.key(0), np.stack([IMAGE] * 400)))
    assert {image.tobytes() for image in found} == shifts


def test_a_flip_mirrors_left_and_right_of_about_half_of_the_images():
    view = training_view(flip=True)
    found = np.asarray(view(jax.random.key(0), np.stack([IMAGE] * 400)))
    mirror = np.stack([IMAGE[:, 3 - column] for column in range(4)], axis=1)
    flipped = [image.tobytes() == mirror.tobytes() for image in found]
    kept = [image.tobytes() == IMAGE.tobytes() for image in found]
    assert sum(flipped) + sum(kept) == 400
    assert 150 < sum(flipped) < 250  # 200, standard deviation 10


def test_the_same_key_gives_the_same_view():
    view = training_view(crop_padding=2, flip=True)
    images = np.stack([IMAGE] * 20)
    first, second, other = (np.asarray(view(jax.random.key(k), images)) for k in (3, 3, 4))
    assert first.tobytes() == second.tobytes()
    assert first.tobytes() != other.tobytes()


def test_a_view_depends_on_its_own_key_alone():
    view = views.augment(lambda images: images, crop_padding=2, flip=True)
    keys, images = jax.random.split(jax.random.key(0), 30), np.stack([IMAGE] * 30)
    whole = np.asarray(jax.jit(view)(keys, images))
    assert len({image.tobytes() for image in whole}) > 10
    # In another order and in other company every image is cut as before.
    rows = np.array([21, 3, 3, 8])
    np.testing.assert_array_equal(jax.jit(view)(keys[rows], images[:4]), whole[rows])


def test_padding_is_black_before_normalisation():
    white = np.full((50, 4, 4, 1), 255, np.uint8)
    clean = views.normalise((0.25,), (0.5,))
    view = training_view(clean, crop_padding=1)
    # White becomes (1 - .25) / .5, black (0 - .25) / .5.
    found = np.unique(np.round(view(jax.random.key(0), white), 5))
    assert found.tolist() == [-0.5, 1.5]


def test_without_augmentation_the_view_is_the_clean_one():
    clean = views.normalise((0.25, 0.25), (0.5, 0.5))
    view = training_view(clean)
    found = view(jax.random.key(0), IMAGE[None])
    np.testing.assert_array_equal(found, jax.jit(clean)(IMAGE[None]))


# Sources.


@pytest.fixture(scope="module")
def records(digits_dir):
    """Every record as stored, by split: {id: (pixels, label)}."""
    builder = sources.builder("digits", digits_dir)
    found = {}
    for split in ("train", "test"):
        source = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
        stored = [source[index] for index in range(len(source))]
        found[split] = {
            r["id"].decode(): (np.asarray(Image.open(io.BytesIO(r["image"]))), r["label"])
            for r in stored
        }
    return found


def number(name):
    return int(name.removeprefix("digits_"))


@pytest.mark.parametrize(("split", "examples"), [("train", 1437), ("test", 360)])
def test_digits_has_its_documented_size(records, split, examples):
    assert len(records[split]) == examples


def test_digits_train_and_test_share_no_example_and_miss_none(records):
    ids = [number(name) for split in records.values() for name in split]
    assert sorted(ids) == list(range(1797))


def test_digits_test_split_has_a_fifth_of_every_class(records):
    everything = np.bincount(load_digits().target)
    found = np.bincount([label for _, label in records["test"].values()])
    assert np.abs(found - everything / 5).max() < 1


@pytest.mark.parametrize("split", ["train", "test"])
def test_digits_pixels_and_labels_are_those_of_scikit_learn(records, split):
    digits = load_digits()
    for name in sorted(records[split])[::60]:
        pixels, label = records[split][name]
        np.testing.assert_array_equal(pixels, digits.images[number(name)] * 15)
        assert label == digits.target[number(name)]


def test_loaded_examples_are_in_the_order_of_their_ids(digits_dir, records):
    test = sources.load("digits", digits_dir).test
    expected = [records["test"][name] for name in sorted(records["test"])]
    np.testing.assert_array_equal(test.images[..., 0], [pixels for pixels, _ in expected])
    assert test.labels.tolist() == [label for _, label in expected]


def test_a_loaded_dataset_has_the_documented_shapes_and_types(digits_dir):
    dataset = sources.load("digits", digits_dir, validation_fraction=0.1)
    # 143.7 of 1,437 examples are held out, rounded up.
    for split, size in ((dataset.train, 1293), (dataset.validation, 144), (dataset.test, 360)):
        assert len(split) == size
        assert split.images.shape == (size, 8, 8, 1)
        assert (split.images.dtype, split.labels.dtype) == (np.uint8, np.int32)
    assert dataset.num_classes == 10


def test_validation_examples_are_not_among_the_training_examples(digits_dir, records):
    dataset = sources.load("digits", digits_dir)
    both = np.concatenate([dataset.train.images, dataset.validation.images])[..., 0]
    stored = [pixels.tobytes() for pixels, _ in records["train"].values()]
    # As multisets, since two people may have drawn the same pixels.
    assert sorted(image.tobytes() for image in both) == sorted(stored)


def test_mean_and_std_are_those_of_the_training_pixels_only(digits_dir):
    dataset = sources.load("digits", digits_dir, validation_fraction=0.5)
    grey = dataset.train.images.astype(np.float64).ravel() / 255
    assert dataset.mean == pytest.approx([grey.sum() / len(grey)])
    assert dataset.std == pytest.approx([((grey - grey.mean()) ** 2).mean() ** 0.5])


def test_label_noise_touches_training_labels_only(digits_dir):
    clean = sources.load("digits", digits_dir)
    noisy = sources.load("digits", digits_dir, label_noise=0.2)
    assert (noisy.train.labels != clean.train.labels).sum() == 259  # .2 * 1293 = 258.6
    np.testing.assert_array_equal(noisy.train.images, clean.train.images)
    np.testing.assert_array_equal(noisy.validation.labels, clean.validation.labels)
    np.testing.assert_array_equal(noisy.test.labels, clean.test.labels)


def test_outliers_are_noise_among_training_images_only(digits_dir):
    clean = sources.load("digits", digits_dir)
    noisy = sources.load("digits", digits_dir, outliers=0.1)
    chosen = splits.outliers(len(clean.train), 0.1, 0)
    assert len(chosen) == 129  # .1 * 1293 = 129.3
    others = np.setdiff1d(np.arange(len(clean.train)), chosen)
    np.testing.assert_array_equal(noisy.train.images[others], clean.train.images[others])
    np.testing.assert_array_equal(noisy.train.labels, clean.train.labels)
    for name in ("validation", "test"):
        np.testing.assert_array_equal(getattr(noisy, name).images, getattr(clean, name).images)
    noise, pixels = noisy.train.images[chosen].astype(float), clean.train.images
    assert not (noisy.train.images[chosen] == pixels[chosen]).all((1, 2, 3)).any()
    # The mean of a Gaussian with the pixels' mean and deviation, clipped to their range.
    mean, std = pixels.mean(), pixels.std()
    low, high = ((edge - mean) / std for edge in (0, pixels.max()))
    normal = scipy.stats.norm
    expected = mean * (normal.cdf(high) - normal.cdf(low))
    expected += std * (normal.pdf(low) - normal.pdf(high)) + pixels.max() * normal.sf(high)
    assert noise.mean() == pytest.approx(expected, rel=0.03)
    again = sources.load("digits", digits_dir, outliers=0.1)
    np.testing.assert_array_equal(again.train.images, noisy.train.images)


def test_split_seed_chooses_which_examples_are_held_out(digits_dir):
    first, second = (sources.load("digits", digits_dir, split_seed=seed) for seed in (0, 1))
    assert first.validation.images.tobytes() != second.validation.images.tobytes()
    assert first.test.images.tobytes() == second.test.images.tobytes()


def test_preparing_again_leaves_the_files_alone(digits_dir):
    folder = sources.prepare("digits", digits_dir)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert len(before) > 1
    assert sources.prepare("digits", digits_dir) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_an_unprepared_dataset_names_the_command_that_prepares_it(tmp_path):
    said = f"python -m experiments.prepare --dataset=digits --data_dir={tmp_path}"
    with pytest.raises(DataError, match=re.escape(said)):
        sources.load("digits", str(tmp_path))


def test_an_unknown_dataset_is_answered_with_the_nearest_name():
    with pytest.raises(ConfigError, match=r"^data\.name='digit': unknown dataset.*'digits'"):
        sources.load("digit")


def test_take_selects_examples_in_the_given_order():
    images = np.arange(4, dtype=np.uint8).reshape(4, 1, 1, 1)
    split = sources.Split(images, np.int32([5, 6, 7, 8]), np.int32([20, 21, 22, 23]))
    found = split.take(np.array([3, 0]))
    assert (found.images.ravel().tolist(), found.labels.tolist()) == ([3, 0], [8, 5])
    assert found.ids.tolist() == [23, 20]


@pytest.mark.parametrize("options", [{}, {"split_seed": 1}, {"validation_fraction": 0.4}])
def test_ids_name_the_same_pictures_whatever_is_held_out(digits_dir, records, options):
    dataset = sources.load("digits", digits_dir, label_noise=0.1, **options)
    in_order = [records["train"][name][0] for name in sorted(records["train"])]
    for split in (dataset.train, dataset.validation):
        np.testing.assert_array_equal(split.images[..., 0], [in_order[i] for i in split.ids])
    both = np.concatenate([dataset.train.ids, dataset.validation.ids])
    assert sorted(both) == list(range(1437))
