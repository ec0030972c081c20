"""What is fitted on a table's training rows, against scikit-learn and arithmetic by hand."""

import dataclasses
import math

import numpy as np
import pytest
from sklearn.preprocessing import OrdinalEncoder

from tests import tiny_tables
from tests.tiny_tables import prepared
from tgeo_jax.data import clicks, fitting, normalisation, sources, tables
from tgeo_jax.data.layouts import MISSING

NUMERIC = dataclasses.replace(
    tables.LAYOUTS["power_attack_binary"], columns=("a", "b", "c"), symbolic=()
)
TWO_COUNTS = dataclasses.replace(clicks.CRITEO, columns=("x", "y", "z"), buckets=2)
PLAIN = dataclasses.replace(clicks.FRAPPE, columns=("x", "y"))


def test_what_is_not_finite_becomes_minimum_median_and_maximum_of_finite_training_values():
    train = np.array([[1, 5, np.inf], [2, np.inf, np.nan], [9, 7, -np.inf], [4, -np.inf, np.inf]])
    fitted = fitting.fit(NUMERIC, {}, train)
    other = np.array(
        [[np.nan, np.nan, np.nan], [np.inf, np.inf, np.inf], [-np.inf] * 3, [50, 3, 8]]
    )
    np.testing.assert_array_equal(
        fitted.encode(other),
        # a: 1, 2, 4, 9; b: 5, 7; c has no finite value to learn from.
        np.float32([[3, 6, 0], [9, 7, 0], [1, 5, 0], [50, 3, 8]]),
    )
    assert fitted.encode(other).dtype == np.float32


def test_a_constant_feature_has_range_one():
    assert normalisation.minimum_and_range(np.float32([[3, 1], [3, 4]])) == ((3.0, 1.0), (1.0, 3.0))


def test_ids_are_scikit_learns_ordinal_codes_plus_one_and_zero_for_the_unknown():
    random = np.random.RandomState(0)
    train, test = random.randint(-50, 50, (300, 2)), random.randint(-80, 80, (200, 2))
    encoder = OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=-1).fit(train)
    fitted = fitting.fit(PLAIN, {}, train)
    np.testing.assert_array_equal(fitted.encode(train), encoder.transform(train) + 1)
    np.testing.assert_array_equal(fitted.encode(test), encoder.transform(test) + 1)
    assert (fitted.encode(test) == 0).any()
    assert fitted.vocabulary == tuple(len(values) + 1 for values in encoder.categories_)


def test_values_that_too_few_training_rows_have_share_id_zero():
    train = np.array([[5, 1], [5, 1], [5, 2], [7, 3], [9, 3], [9, 4]])
    fitted = fitting.fit(PLAIN, {}, train, min_count=2)
    assert fitted.vocabulary == (3, 3)
    assert fitted.encode(train).tolist() == [[1, 1], [1, 1], [1, 0], [0, 2], [2, 2], [2, 0]]
    nothing = fitting.fit(PLAIN, {}, train, min_count=100)
    assert nothing.vocabulary == (1, 1)
    assert not nothing.encode(train).any()


@pytest.mark.parametrize("value", [-3, 0, 1, 2, 3, 4, 5, 20, 999, 10**6, MISSING])
def test_counts_become_buckets_by_the_formula(value):
    expected = 2 + math.floor(math.log(value) ** 2) if value > 2 else value
    assert fitting.buckets(np.array([[value, value]]), 1).tolist() == [[expected, value]]


def test_an_empty_count_is_a_value_of_its_own():
    train = np.array([[MISSING, 0, 0], [0, 0, 0], [3, 0, 0], [4, 0, 0]])
    fitted = fitting.fit(TWO_COUNTS, {}, train)
    assert fitted.encode(train)[:, 0].tolist() == [1, 2, 3, 3]  # 3 and 4: 2 + floor(ln^2) = 3
    assert fitted.vocabulary == (4, 2, 2)


# Nothing outside of the training rows is looked at.


@pytest.mark.parametrize("name", ["nsl_kdd", "power_attack_3class", "movielens", "criteo"])
@pytest.mark.parametrize("untouched", ["validation", "test"])
def test_other_rows_do_not_change_what_is_fitted(name, untouched, tmp_path, monkeypatch):
    prepared(name, tmp_path)
    directory = str(tmp_path / "tfds")
    before = sources.load(name, directory, validation_fraction=0.3)
    read = sources.read

    def strange(dataset, split):
        found = read(dataset, split)
        if untouched == "test" and split == "train":
            return found
        rows = slice(None) if untouched == "test" else before.validation.ids
        if untouched == "validation" and split != "train":
            return found
        images = found.images.copy()
        images[rows] = 0 if name == "nsl_kdd" else 10**6
        return dataclasses.replace(found, images=images)

    monkeypatch.setattr(sources, "read", strange)
    after = sources.load(name, directory, validation_fraction=0.3)
    assert (after.mean, after.std) == (before.mean, before.std)
    assert after.vocabulary == before.vocabulary
    assert after.feature_names == before.feature_names
    np.testing.assert_array_equal(after.train.images, before.train.images)
    changed = getattr(after, untouched).images != getattr(before, untouched).images
    assert changed.any()


# The two parts, and oversampling.


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tables")
    for name, source in (
        ("frappe", tiny_tables.frappe(folder / "frappe", rows=300)),
        ("nsl_kdd", tiny_tables.nsl_kdd(folder / "nsl_kdd")),
    ):
        tables.prepare(name, source, str(folder))
    return lambda name, **options: sources.load(name, str(folder), **options)


def test_teacher_and_student_share_no_row_but_all_that_is_fitted_and_held_out(load):
    whole, teacher, student = (
        load("frappe", part=part, teacher_fraction=0.7) for part in ("all", "teacher", "student")
    )
    assert set(teacher.train.ids) | set(student.train.ids) == set(whole.train.ids)
    assert not set(teacher.train.ids) & set(student.train.ids)
    assert len(teacher.train) == round(0.7 * len(whole.train))
    for data in (teacher, student):
        assert data.vocabulary == whole.vocabulary
        np.testing.assert_array_equal(data.validation.ids, whole.validation.ids)
        np.testing.assert_array_equal(data.validation.images, whole.validation.images)
        assert data.train.labels.mean() == pytest.approx(whole.train.labels.mean(), abs=0.01)


def test_another_share_of_the_teachers_is_another_student(load):
    sizes = [len(load("frappe", part="student", teacher_fraction=f).train) for f in (0.5, 0.9)]
    assert sizes == [135, 27]


def test_oversampling_repeats_training_rows_only_and_after_label_noise(load):
    options = {"label_noise": 0.3, "fraction": 0.5}
    plain, more = load("frappe", **options), load("frappe", **options, oversample=True)
    counts = np.bincount(plain.train.labels)
    assert np.bincount(more.train.labels).tolist() == [counts.max()] * 2
    assert set(more.train.ids) == set(plain.train.ids)
    label_of = dict(zip(plain.train.ids, plain.train.labels, strict=True))
    row_of = dict(zip(plain.train.ids, plain.train.images, strict=True))
    for row, label, index in zip(more.train.images, more.train.labels, more.train.ids, strict=True):
        assert label == label_of[index]
        np.testing.assert_array_equal(row, row_of[index])
    for name in ("validation", "test"):
        np.testing.assert_array_equal(getattr(more, name).ids, getattr(plain, name).ids)
    again = load("frappe", **options, oversample=True)
    np.testing.assert_array_equal(again.train.ids, more.train.ids)
    other = load("frappe", **options, oversample=True, split_seed=1)
    assert other.train.ids.tolist() != more.train.ids.tolist()


def test_a_long_tail_and_a_scaling_of_ones_own_work_as_for_images(load):
    data = load("nsl_kdd", imbalance=4.0)
    assert np.bincount(data.train.labels).tolist() == [36, 25, 18, 12, 9]  # 36 * 4**(-k/4)
    count = len(data.feature_names)
    own = load("nsl_kdd", mean=(0.5,) * count, std=(2.0,) * count)
    assert (own.mean, own.std) == ((0.5,) * count, (2.0,) * count)
