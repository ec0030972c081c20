"""The report says what the run's files say."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from tests import finished_runs
from tgeo_jax import report
from tgeo_jax.reporting import page
from tgeo_jax.workdir import Workdir


@pytest.fixture
def finished(tmp_path) -> Workdir:
    folder = finished_runs.write(tmp_path / "run")
    finished_runs.write_samples(folder)
    return folder


def _svgs(text: str) -> list[str]:
    return re.findall(r"<svg.*?</svg>", text, re.DOTALL)


def test_report_is_one_file_with_all_figures_inside(finished):
    index = report.write({"tgeo": finished}, finished.report)
    text = index.read_text()
    names = {path.name for path in (finished.report / "figures").iterdir()}
    assert names == {
        "accuracy.png", "situations_tgeo.png", "epochs_tgeo.png", "histogram_tgeo.png"
    }  # fmt: skip
    for name in names:
        assert min(Image.open(finished.report / "figures" / name).size) > 200
    drawn = _svgs(text)
    assert len(drawn) == 4 + 32  # a triangle for each of the extremes
    for one in drawn:
        assert ElementTree.fromstring(one).attrib["aria-label"]
        assert "#000000" not in one  # it would not be seen on a dark page
    assert text.count('<img src="data:image/png;base64,') == 32
    assert not re.search(r"""(src|href)=["'](?!data:|#)|url\((?!#)|@import""", text)
    assert "82.00 ± 1.41" in text


def test_what_figures_refer_to_inside_is_different_in_each(finished):
    text = report.write({"a": finished, "b": finished}, finished.report).read_text()
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', text))
    assert used <= set(ids)


def test_runs_whose_names_make_the_same_file_name_keep_their_figures(finished):
    report.write({"a/b": finished, "a b": finished}, finished.report)
    names = {path.stem for path in (finished.report / "figures").glob("histogram_*")}
    assert names == {"histogram_a_b", "histogram_a_b_1"}


def test_a_constant_ratio_has_no_story_to_tell(finished):
    arrays = dict(np.load(finished.samples))
    np.savez(finished.samples, **{**arrays, "ratio": np.full((2, finished_runs.COUNT), 0.9)})
    text = report.write({"kd": finished}, finished.report).read_text()
    assert [p.name for p in (finished.report / "figures").iterdir()] == ["accuracy.png"]
    assert len(_svgs(text)) == 1


def test_the_figure_that_chose_the_epoch_has_curves_too(finished):
    records = [{"step": e, "epoch": float(e), "seed": 0, "test/auc": 0.9} for e in (1, 2)]
    finished_runs.write_records(finished, records)
    finished.write_result({**finished.result(), "select_by": "auc"})
    text = report.write({"tgeo": finished}, finished.report).read_text()
    assert "<h3>Test AUC</h3>" in text
    assert (finished.report / "figures" / "auc.png").exists()


def test_samples_of_older_versions_show_what_they_kept(finished):
    finished_runs.write_samples(finished, old=True)
    text = report.write({"tgeo": finished}, finished.report).read_text()
    assert text.count('<img src="data:image/png;base64,') == 32
    assert len(_svgs(text)) == 4
    assert "Choose one" not in text


def test_rows_of_a_table_have_features_and_no_picture(finished):
    finished_runs.write_samples(finished, rows=True)
    text = report.write({"tgeo": finished}, finished.report).read_text()
    assert "<img" not in text
    assert len(_svgs(text)) == 4 + 32
    assert "<b>row 0</b>" in text


def test_runs_of_versions_before_the_histogram_have_the_quantiles(finished):
    before = {name: 0.5 for name in ("train/ratio_q05", "train/ratio_q50", "train/ratio_q95")}
    records = [{"step": e, "epoch": float(e), "seed": 0, **before} for e in (1, 2)]
    assert "the stronger the shade" in report.write({"tgeo": finished}, finished.report).read_text()
    finished_runs.write_records(finished, records)
    text = report.write({"tgeo": finished}, finished.report).read_text()
    assert "Lines: the median" in text
    assert "the stronger the shade" not in text


def test_the_page_is_headed_by_its_title_or_its_runs(finished):
    titled = report.write({"tgeo": finished}, finished.report, title="Whom to trust").read_text()
    assert "<h1>Whom to trust</h1>" in titled
    assert "<h1>tgeo</h1>" in report.write({"tgeo": finished}, finished.report).read_text()


def test_names_are_escaped(finished):
    name = "<script>alert(1)</script>\"'"
    text = report.write({name: finished}, finished.report).read_text()
    assert "<script>alert" not in text
    assert "<h1>&lt;script&gt;alert(1)&lt;/script&gt;&#34;&#39;</h1>" in text
    # In the middle of a figure too.
    assert all(ElementTree.fromstring(one) is not None for one in _svgs(text))


def test_a_run_that_has_not_finished_is_refused(finished):
    (finished.path / "result.json").unlink()
    with pytest.raises(ValueError, match="not finished"):
        report.write({"tgeo": finished}, finished.report)


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
    text = report.write({"old": finished}, finished.report).read_text()
    assert "What else was measured" not in text


@pytest.mark.parametrize(
    ("config", "relations", "said"),
    [
        ({"ratio": {"name": "tgeo", "tgeo": {"relations": "sg_tg"}}}, "sg_tg", "fusion network"),
        ({"ratio": {"name": "wls"}}, "full", "wls does not look at these features"),
    ],
)
def test_features_are_those_that_the_ratio_saw(config, relations, said):
    found, text = page._seen(config)
    assert found == relations
    assert said in text
