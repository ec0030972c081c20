"""What is kept of the training examples: subsets, long tails, and what they do to a dataset."""

from __future__ import annotations

import numpy as np
import pytest

from tgeo_jax.data import sources, splits
from tgeo_jax.errors import ConfigError, DataError

UNEVEN = np.tile(np.repeat([0, 1, 2], [10, 5, 3]), 10)  # 100, 50 and 30, mixed


def sizes(labels, kept) -> list[int]:
    return np.bincount(labels[kept]).tolist()


# Subsets.


@pytest.mark.parametrize(
    ("fraction", "expected"),
    [
        (0.1, [10, 5, 3]),
        (0.5, [50, 25, 15]),
        (1.0, [100, 50, 30]),
        # 33, 16.5 and 9.9: the sums 33, 49.5 and 59.4 become 33, 50 and 59.
        (0.33, [33, 17, 9]),
        # The sums 99.9, 149.85 and 179.82 are rounded up: nothing is left out.
        (0.999, [100, 50, 30]),
        # The sums 99, 148.5 and 178.2: fewer are left out than there are classes.
        (0.99, [99, 49, 30]),
    ],
)
def test_a_subset_has_the_same_share_of_every_class(fraction, expected):
    assert sizes(UNEVEN, splits.subset(UNEVEN, fraction, seed=0, num_classes=3)) == expected


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.25, 0.5])
def test_a_subset_of_cifar_100_has_exactly_its_share(fraction):
    labels = np.repeat(np.arange(100), 450)
    found = sizes(labels, splits.subset(labels, fraction, seed=0, num_classes=100))
    assert sum(found) == fraction * 45_000
    # 5 % of 450 are 22.5: half of the classes keep 22, half 23.
    assert np.abs(np.array(found) - 450 * fraction).max() <= 0.5


def test_a_larger_subset_of_the_same_seed_holds_the_smaller_one():
    small, large = (set(splits.subset(UNEVEN, f, 0, 3).tolist()) for f in (0.2, 0.5))
    assert small < large


def test_a_class_that_a_subset_would_lose_is_named():
    labels = np.repeat([0, 1, 2], [50, 50, 4])
    with pytest.raises(DataError, match=r"^data\.fraction=0\.1: class 2 would have no training"):
        splits.subset(labels, 0.1, seed=0, num_classes=3)


def test_a_class_without_examples_is_named():
    with pytest.raises(DataError, match=r"^data\.fraction=0\.5: class 1 "):
        splits.subset(np.repeat([0, 2], 10), 0.5, seed=0, num_classes=3)


# Long tails.


@pytest.mark.parametrize(
    ("classes", "each", "factor", "expected"),
    [
        # CIFAR-10-LT as published: 5000 * 100^(-k / 9), rounded down.
        (10, 5000, 100, [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]),
        (10, 5000, 10, [5000, 3871, 2997, 2320, 1796, 1391, 1077, 834, 645, 500]),
        (3, 100, 4, [100, 50, 25]),
        (3, 100, 1, [100, 100, 100]),
        (2, 49, 49, [49, 1]),  # 49 * (1 / 49) is less than 1 in floating point
        (3, 10, 2.5, [10, 6, 4]),  # 10 / 2.5^.5 = 6.32
    ],
)
def test_class_sizes_of_a_long_tail(classes, each, factor, expected):
    labels = np.tile(np.arange(classes), each)
    assert sizes(labels, splits.long_tailed(labels, factor, 0, classes)) == expected


def test_cifar_100_lt_has_its_published_size():
    labels = np.repeat(np.arange(100), 500)
    found = sizes(labels, splits.long_tailed(labels, 100, seed=0, num_classes=100))
    assert sum(found) == 10_847
    assert (found[0], found[-1]) == (500, 5)
    assert found == sorted(found, reverse=True)


def test_a_long_tail_starts_from_the_smallest_class():
    # 100, 50 and 30: 30, 30 / 3^.5 = 17.3, and 10.
    assert sizes(UNEVEN, splits.long_tailed(UNEVEN, 3, seed=0, num_classes=3)) == [30, 17, 10]


def test_a_milder_long_tail_of_the_same_seed_holds_the_heavier_one():
    heavy, mild = (set(splits.long_tailed(UNEVEN, f, 0, 3).tolist()) for f in (10, 2))
    assert heavy < mild


def test_a_tail_that_would_have_no_example_says_how_heavy_it_may_be():
    labels = np.repeat([0, 1], 20)
    assert sizes(labels, splits.long_tailed(labels, 20, 0, 2)) == [20, 1]
    with pytest.raises(DataError, match=r"^data\.imbalance=21: of 20 examples .* 20 or less$"):
        splits.long_tailed(labels, 21, seed=0, num_classes=2)


# Both.

CHOICES = [
    lambda seed: splits.subset(UNEVEN, 0.3, seed, 3),
    lambda seed: splits.long_tailed(UNEVEN, 5, seed, 3),
]


@pytest.mark.parametrize("choose", CHOICES, ids=["subset", "long_tailed"])
def test_what_is_kept_is_fixed_by_the_seed_sorted_and_without_repetition(choose):
    first, second, other = (choose(seed).tolist() for seed in (4, 4, 5))
    assert first == second != other
    assert first == sorted(set(first))
    assert set(first) <= set(range(180))


@pytest.mark.parametrize("choose", CHOICES, ids=["subset", "long_tailed"])
def test_every_example_of_a_class_is_as_likely_to_be_kept(choose):
    counts = np.bincount(np.concatenate([choose(seed) for seed in range(400)]), minlength=180)
    for label in range(3):
        own = counts[label == UNEVEN]
        share = own.mean() / 400
        deviation = (400 * share * (1 - share)) ** 0.5
        assert np.abs(own - own.mean()).max() < 4.5 * deviation


@pytest.mark.parametrize("counts", [[5, 5, 5], [5, 4, 5], [1, 0, 0]])
def test_a_held_out_split_may_be_uneven_by_one(counts):
    splits.check_balanced(np.repeat([0, 1, 2], counts), 0.1, 3)


@pytest.mark.parametrize("counts", [[5, 3, 4], [2, 2, 0]])
def test_an_uneven_held_out_split_is_refused(counts):
    low, high = min(counts), max(counts)
    said = rf"^data\.validation_fraction=0\.1: .* {low} to {high} examples .* data\.imbalance"
    with pytest.raises(DataError, match=said):
        splits.check_balanced(np.repeat([0, 1, 2], counts), 0.1, 3)


# Of the digits: 1,437 training examples, of which 144 are held out.


@pytest.fixture(scope="module")
def load(digits_dir):
    return lambda **options: sources.load("digits", digits_dir, **options)


@pytest.fixture(scope="module")
def whole(load):
    return load()


def counts(split) -> np.ndarray:
    return np.bincount(split.labels, minlength=10)


REDUCED = [
    {"fraction": 0.1},
    {"fraction": 0.5, "split_seed": 3},
    {"imbalance": 20.0},
    {"fraction": 0.5, "imbalance": 5.0, "label_noise": 0.2},
]


@pytest.mark.parametrize("options", REDUCED)
def test_validation_and_test_are_those_of_the_whole_dataset(load, options):
    reduced, whole = load(**options), load(split_seed=options.get("split_seed", 0))
    for name in ("validation", "test"):
        own, expected = getattr(reduced, name), getattr(whole, name)
        np.testing.assert_array_equal(own.images, expected.images)
        np.testing.assert_array_equal(own.labels, expected.labels)
        np.testing.assert_array_equal(own.ids, expected.ids)


@pytest.mark.parametrize("options", REDUCED)
def test_ids_name_the_same_pictures_whatever_is_kept(load, options):
    reduced, whole = load(**options), load(split_seed=options.get("split_seed", 0))
    assert set(reduced.train.ids) < set(whole.train.ids)
    assert not set(reduced.train.ids) & set(reduced.validation.ids)
    at = np.searchsorted(whole.train.ids, reduced.train.ids)
    np.testing.assert_array_equal(reduced.train.images, whole.train.images[at])
    same = (reduced.train.labels == whole.train.labels[at]).mean()
    assert same == pytest.approx(1 - options.get("label_noise", 0), abs=0.005)


def test_a_fraction_of_the_digits_is_that_share_of_every_class(load, whole):
    kept = load(fraction=0.1).train
    assert len(kept) == 129  # of 1,293
    assert np.abs(counts(kept) - 0.1 * counts(whole.train)).max() < 1


def test_long_tailed_digits_have_the_sizes_of_their_smallest_class(load, whole):
    smallest = counts(whole.train).min()
    kept = counts(load(imbalance=20.0).train)
    assert kept.tolist() == [int(smallest * 20 ** (-k / 9)) for k in range(10)]


def test_a_fraction_of_a_long_tail_is_taken_first(load, whole):
    smallest = counts(load(fraction=0.5).train).min()
    assert smallest < counts(whole.train).min()
    kept = counts(load(fraction=0.5, imbalance=5.0).train)
    assert (kept[0], kept[-1]) == (smallest, smallest // 5)


def test_long_tailed_digits_need_a_balanced_validation_split(load):
    with pytest.raises(DataError, match=r"^data\.validation_fraction=0\.5: .*balanced"):
        load(validation_fraction=0.5, imbalance=2.0)
    load(validation_fraction=0.5)  # without a long tail it may be uneven


def test_mean_and_std_are_those_of_all_that_is_not_held_out(load, whole):
    dataset = load(fraction=0.1, imbalance=3.0)  # as for a teacher that learns from all of it
    grey = whole.train.images.astype(np.float64).ravel() / 255
    assert dataset.mean == pytest.approx([grey.mean()])
    assert dataset.std == pytest.approx([grey.std()])


def test_a_given_normalisation_is_taken_as_it_is_and_what_is_missing_computed(load, whole):
    both = load(mean=(0.25,), std=(0.5,))
    assert (both.mean, both.std) == ((0.25,), (0.5,))
    assert (load(mean=(0.25,)).mean, load(mean=(0.25,)).std) == ((0.25,), whole.std)
    assert (load(std=(0.5,)).mean, load(std=(0.5,)).std) == (whole.mean, (0.5,))


@pytest.mark.parametrize("field", ["mean", "std"])
def test_a_normalisation_for_other_channels_is_a_config_error(load, field):
    with pytest.raises(
        ConfigError, match=rf"^data\.{field}=\(0\.1, 0\.2, 0\.3\): .* each channel, 1,"
    ):
        load(**{field: (0.1, 0.2, 0.3)})


def test_too_small_a_fraction_of_the_digits_is_a_data_error(load):
    with pytest.raises(DataError, match=r"^data\.fraction=0\.001: class \d "):
        load(fraction=0.001)


def test_too_long_a_tail_of_the_digits_is_a_data_error(load):
    with pytest.raises(DataError, match=r"^data\.imbalance=500: "):
        load(imbalance=500.0)


def test_what_is_kept_is_part_of_the_digest(load, whole):
    digests = {load(**options).digest() for options in REDUCED} | {whole.digest()}
    assert len(digests) == len(REDUCED) + 1
