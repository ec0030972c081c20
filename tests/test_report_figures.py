"""What the figures of a report draw."""

from __future__ import annotations

import numpy as np
import pytest

from tests import finished_runs
from tgeo_jax.reporting import figures, style


@pytest.fixture
def records(tmp_path):
    return figures.records_of(finished_runs.write(tmp_path / "run", accuracy=(0.7, 0.74)))


def _arrays(**changes):
    right = np.arange(20)[None] % 2 == 0
    return {"ratio": np.tile(np.linspace(0, 1, 20), (2, 1)), "teacher_right": right, **changes}


def _bars(figure) -> list[list[int]]:
    """Height of every bar of a stacked histogram, by its first set and then its second."""
    (axes,) = figure.axes
    return [[round(bar.get_height()) for bar in bars] for bars in axes.containers]


def test_the_histogram_counts_a_frozen_teacher_for_every_seed():
    right, wrong = _bars(figures.histogram(_arrays()))
    assert (sum(right), sum(wrong)) == (20, 20)  # right on every second of 20 samples, 2 seeds


def test_the_histogram_asks_each_seeds_own_teacher():
    # One half of the samples at .1, the other at .9; the second seed's teacher is always wrong.
    right, wrong = _bars(
        figures.histogram(
            _arrays(
                ratio=np.tile(np.repeat([0.11, 0.91], 10), (2, 1)),
                teacher_right=np.array([[True] * 10 + [False] * 10, [False] * 20]),
            )
        )
    )
    assert {i: n for i, n in enumerate(right) if n} == {4: 10}  # bins are .025 wide
    assert {i: n for i, n in enumerate(wrong) if n} == {4: 10, 36: 20}


def test_accuracy_lines_are_means_over_seeds_in_bands_of_one_deviation(records):
    axes = figures.curves({"tgeo": records}, "test/accuracy", "%", scale=100).axes[0]
    epochs, means = axes.lines[0].get_data()
    np.testing.assert_array_equal(epochs, [1, 2, 3])
    np.testing.assert_allclose(means, [52, 62, 72])
    band = axes.collections[0].get_paths()[0].vertices
    np.testing.assert_allclose([band[:, 1].min(), band[:, 1].max()], [52 - 8**0.5, 72 + 8**0.5])


def test_24_runs_have_curves_that_differ():
    assert len({style.line(index) for index in range(24)}) == 24


def test_the_shades_over_epochs_are_the_logged_histograms(records):
    shares, ends = figures.histograms(records)
    np.testing.assert_array_equal(ends, [1, 2, 3])
    for epoch, share in enumerate(shares, 1):
        assert np.flatnonzero(share).tolist() == [25 - 5 * epoch, 25 + 5 * epoch]
        assert share.max() == 0.5
    (axes,) = figures.over_epochs(records).axes
    alphas = axes.images[0].get_array()[..., 3]
    height, width = alphas.shape
    assert axes.images[0].get_extent() == [0, 3, 0, 1]
    for epoch in (1, 2, 3):  # in the middle of each epoch's column
        column = alphas[:, int((epoch - 0.5) / 3 * width)]
        assert np.flatnonzero(column).tolist() == [25 - 5 * epoch, 25 + 5 * epoch]
    assert height == 50


def test_epochs_that_an_older_version_trained_stay_blank(records):
    for record in records[:2]:
        del record["train/ratio_histogram"]
    shares, ends = figures.histograms(records)
    np.testing.assert_array_equal(ends, [1, 2, 3])
    np.testing.assert_array_equal(shares.sum(axis=1), [0, 1, 1])


def test_a_confusion_matrix_shows_shares_of_each_class_over_all_seeds():
    counts = [[[2, 2], [0, 1]], [[2, 0], [1, 0]]]  # of two seeds: [[4, 2], [1, 1]]
    (drawn,) = figures.confusions("tgeo", {"confusion": {"last": {"test": counts}}})
    assert drawn.name == "confusion_test_tgeo"
    (axes,) = drawn.figure.axes
    shades = axes.images[0].get_array()[..., 3]
    np.testing.assert_allclose(shades / shades[1, 0], [[4 / 3, 2 / 3], [1, 1]])
    assert [text.get_text() for text in axes.texts] == ["67", "33", "50", "50"]


def test_a_confusion_matrix_of_many_classes_is_not_drawn():
    counts = np.ones((1, 21, 21), int).tolist()
    assert list(figures.confusions("x", {"confusion": {"last": {"test": counts}}})) == []
