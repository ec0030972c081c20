"""The report says what the run's files say."""

from __future__ import annotations

import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from tgeo_jax import report
from tgeo_jax.workdir import Workdir


@pytest.fixture
def finished(tmp_path) -> Workdir:
    """The files of a small run with a learned ratio: 2 seeds, 3 epochs, 20 samples."""
    folder = Workdir(tmp_path / "run")
    folder.path.mkdir()
    (folder.path / "config.json").write_text(json.dumps({"ratio": {"name": "tgeo"}}))
    records = [
        {
            "step": epoch * 10,
            "epoch": epoch,
            "seed": seed,
            "test/accuracy": 0.5 + 0.1 * epoch + 0.02 * seed,
            "train/ratio_right_large_edge": 0.6,
            "train/ratio_wrong_large_edge": 0.3,
        }
        for epoch in (1, 2, 3)
        for seed in (0, 1)
    ]
    folder.metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
    accuracy = {"mean": 0.81, "std": 0.0141}
    folder.write_result(
        {
            "steps": 30,
            "per_seed": [{"seed": 0}, {"seed": 1}],
            "test_accuracy": {"last": accuracy, "best_by_validation": accuracy},
            "teacher": {"train_accuracy": 0.6, "test_accuracy": 0.7},
            "seconds": 1.6,
            "device": "1 x cpu",
            "versions": {"tgeo_jax": "0", "jax": "0"},
        }
    )
    ratio = np.linspace(0, 1, 20)
    np.savez(
        folder.samples,
        ratio=np.stack([ratio, ratio]),
        teacher_class=np.arange(20)[None] % 10,
        teacher_right=np.arange(20)[None] % 2 == 0,
        label=np.zeros(20, int),
        lowest=np.arange(16),
        highest=np.arange(19, 3, -1),
        lowest_images=np.zeros((16, 8, 8, 1), np.uint8),
        highest_images=np.full((16, 8, 8, 1), 255, np.uint8),
    )
    return folder


def test_report_is_one_file_with_all_figures_inside(finished):
    index = report.write({"tgeo": finished}, finished.report)
    page = index.read_text()
    images = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(images) == 4
    for data in images:
        width, height = Image.open(io.BytesIO(base64.b64decode(data))).size
        assert min(width, height) > 200
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "81.00 ± 1.41" in page
    names = {path.name for path in (finished.report / "figures").iterdir()}
    assert names == {
        "accuracy.png", "situations_tgeo.png", "histogram_tgeo.png", "samples_tgeo.png",
    }  # fmt: skip


def test_a_constant_ratio_has_no_story_to_tell(finished):
    arrays = dict(np.load(finished.samples))
    np.savez(finished.samples, **{**arrays, "ratio": np.full((2, 20), 0.9)})
    report.write({"kd": finished}, finished.report)
    assert [p.name for p in (finished.report / "figures").iterdir()] == ["accuracy.png"]


def _bars(figure) -> list[int]:
    """Height of every bar of a stacked histogram, by its first set and then its second."""
    (axes,) = figure.axes
    return [[round(bar.get_height()) for bar in bars] for bars in axes.containers]


def test_the_histogram_counts_a_frozen_teacher_for_every_seed(finished):
    right, wrong = _bars(report._histogram(np.load(finished.samples)))
    assert (sum(right), sum(wrong)) == (20, 20)  # right on every second of 20 samples, 2 seeds


def test_the_histogram_asks_each_seeds_own_teacher(finished):
    arrays = dict(np.load(finished.samples))
    # One half of the samples at .1, the other at .9; the second seed's teacher is always wrong.
    arrays["ratio"] = np.tile(np.repeat([0.11, 0.91], 10), (2, 1))
    arrays["teacher_right"] = np.array([[True] * 10 + [False] * 10, [False] * 20])
    right, wrong = _bars(report._histogram(arrays))
    assert {i: n for i, n in enumerate(right) if n} == {4: 10}  # bins are .025 wide
    assert {i: n for i, n in enumerate(wrong) if n} == {4: 10, 36: 20}


def test_the_pictures_tell_what_the_first_seeds_teacher_says(finished):
    arrays = dict(np.load(finished.samples))
    arrays["teacher_class"] = np.stack([np.full(20, 7), np.full(20, 3)])
    arrays["ratio"] = np.stack([np.linspace(0, 1, 20), np.zeros(20)])
    titles = [axes.get_title() for axes in report._extremes(arrays).axes]
    assert len(titles) == 32
    assert all(title.startswith("0, says 7\n") for title in titles)
    assert titles[1].endswith("0.05")  # 1 / 19


def test_the_page_is_headed_by_its_title_or_its_runs(finished):
    titled = report.write({"tgeo": finished}, finished.report, title="Whom to trust").read_text()
    assert "<h1>Whom to trust</h1>" in titled
    assert "<h1>tgeo</h1>" in report.write({"tgeo": finished}, finished.report).read_text()


def test_names_are_escaped(finished):
    page = report.write({"<script>": finished}, finished.report).read_text()
    assert "<script>" not in page


def test_a_run_that_has_not_finished_is_refused(finished):
    (finished.path / "result.json").unlink()
    with pytest.raises(ValueError, match="not finished"):
        report.write({"tgeo": finished}, finished.report)


def test_accuracy_lines_are_means_over_seeds(finished):
    axes = report._accuracy({"tgeo": finished}).axes[0]
    epochs, means = axes.lines[0].get_data()
    np.testing.assert_array_equal(epochs, [1, 2, 3])
    np.testing.assert_allclose(means, [61, 71, 81])


def _measured(**others) -> dict:
    """A result of two seeds whose epoch was chosen by AUC."""
    figures = {
        "validation/auc": {"mean": 0.99, "std": 0.0},
        "test/accuracy": {"mean": 0.81, "std": 0.0141},
        "test/auc": {"mean": 0.91237, "std": 0.00125},
        "test/cross_entropy": {"mean": 0.4, "std": None},
        "test_hard/accuracy": {"mean": 0.6, "std": 0.1},
    }
    best = figures | {"test/auc": {"mean": 0.92, "std": 0.003}}
    accuracy = figures["test/accuracy"]
    return {
        "per_seed": [{"seed": 0}, {"seed": 1}], "seconds": 1.6, "select_by": "auc",
        "test_accuracy": {"last": accuracy, "best_by_validation": accuracy},
        "figures": {"last": figures, "best_by_validation": best}, **others,
    }  # fmt: skip


def test_the_figure_that_chose_the_epoch_stands_beside_the_accuracy():
    lines = report.text_table({"kd": _measured()}).splitlines()
    heads, cells = (re.split(" {2,}", line) for line in lines)
    assert heads[2:] == [
        "test accuracy, last", "best by validation", "test AUC, last", "test AUC, best", "seconds"
    ]  # fmt: skip
    assert cells[2:] == ["81.00 ± 1.41"] * 2 + ["0.9124 ± 0.0013", "0.9200 ± 0.0030", "2"]


def test_a_run_that_measured_no_such_figure_says_so_with_a_dash(finished):
    results = {"kd": _measured(), "old": finished.result()}
    assert report.text_table(results).splitlines()[2].split()[-3:] == [report.NONE] * 2 + ["2"]


def test_what_else_was_measured_is_a_table_of_its_own():
    rows = [line.split() for line in report.figures_table({"kd": _measured()}).splitlines()]
    assert rows[1:] == [
        ["kd", "AUC", "0.9124", "±", "0.0013", "0.9200", "±", "0.0030"],
        ["kd", "log-loss", "0.4000", "0.4000"],
        ["kd", "test_hard", "accuracy", "0.6000", "±", "0.1000", "0.6000", "±", "0.1000"],
    ]


def test_results_of_older_versions_have_no_further_table(finished):
    assert report.figures_table({"old": finished.result()}) == ""


def test_a_confusion_matrix_shows_shares_of_each_class_over_all_seeds(finished):
    counts = [[[2, 2], [0, 1]], [[2, 0], [1, 0]]]  # of two seeds: [[4, 2], [1, 1]]
    result = {**finished.result(), "confusion": {"last": {"test": counts}}}
    finished.write_result(result)
    report.write({"tgeo": finished}, finished.report)
    assert (finished.report / "figures" / "confusion_test_tgeo.png").exists()
    (total,) = report._confusions(finished).values()
    (axes,) = report._confusion(total).axes
    np.testing.assert_allclose(axes.images[0].get_array(), [[400 / 6, 200 / 6], [50, 50]])
    assert [text.get_text() for text in axes.texts] == ["67", "33", "50", "50"]


def test_a_confusion_matrix_of_many_classes_is_not_drawn(finished):
    counts = np.ones((1, 21, 21), int).tolist()
    finished.write_result({**finished.result(), "confusion": {"last": {"test": counts}}})
    assert report._confusions(finished) == {}
