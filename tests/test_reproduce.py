# ruff: noqa: RUF001 (the page's own signs: a dash for no figure)
"""Tables: what is declared, the runs that come of it, and what they say."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import statistics
import sys

import numpy as np
import PIL.Image
import pytest
import scipy.stats
from absl import flags
from ml_collections import config_flags

from experiments.reproduction import declared, figures, outcomes, output, plan, runs
from tests.conftest import ROOT
from tgeo_jax import config as configs
from tgeo_jax import device_kinds
from tgeo_jax.data import splits
from tgeo_jax.errors import ConfigError

DIGITS = [name for name in declared.names(ROOT / declared.FOLDER) if name.startswith("digits")]
SMALL = """
title = "Small"
config = "configs/digits/{row}.py"
rows = ["plain", "kd", "tgeo"]
columns = ["noisy", "good"]
seeds = 2
ours = ["tgeo"]
[teacher.noisy]
config = "configs/digits/teacher.py"
[teacher.good]
config = "configs/digits/good_teacher.py"
set = { "student.mlp.hidden" = [16, 16] }
[row.tgeo]
label = "learned"
set = { "ratio.tgeo.relations" = "intra" }
[[published]]
row = "kd"
column = "good"
value = 70.5
epoch = "last"
source = "a paper"
"""


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch, digits_dir):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("TFDS_DATA_DIR", digits_dir)


def _table(tmp_path, text=SMALL):
    tmp_path.mkdir(exist_ok=True)
    path = tmp_path / "small.toml"
    path.write_text(text)
    return declared.load(str(path))


@pytest.fixture
def of_digits(digits_dir):
    """TFDS finds the digits wherever TFDS_DATA_DIR pointed when it was imported."""
    return {"data.dir": digits_dir}


def _parsed(command, monkeypatch):
    """The configuration that experiments.main takes from a run's command."""
    values = flags.FlagValues()
    config = config_flags.DEFINE_config_file("config", flag_values=values)
    flags.DEFINE_string("workdir", "", "", flag_values=values)
    monkeypatch.setattr(sys, "argv", command[2:])  # which ml_collections looks into
    values(command[2:])
    return config.value


@pytest.mark.parametrize("name", declared.names(ROOT / declared.FOLDER))
def test_every_table_is_of_configurations_that_can_run(name, tmp_path, monkeypatch):
    table = declared.load(name)
    found, cells = runs.of_table(table, tmp_path)
    assert len(cells) == len(table.rows) * len(table.columns)
    for cell in cells:
        for run in cell.runs:
            configs.check(found[run].config)
    for row, column, _ in table.published:
        names = {"teacher", *(row.name for row in table.rows)}
        if row in names:  # published files also know methods that we do not have
            assert column in {column.name for column in table.columns}, (row, column)
    of_main = [run for run in found.values() if run.source]
    for run in (of_main[0], of_main[-1]):
        given = _parsed(run.command, monkeypatch).to_dict()
        assert json.dumps(given, sort_keys=True) == json.dumps(run.config.to_dict(), sort_keys=True)
    for run in found.values():
        assert not run.needs or list(found).index(run.needs) < list(found).index(run.name)


@pytest.mark.parametrize("name", DIGITS)
def test_digits_need_nothing_beforehand(name, tmp_path, of_digits):
    found, _ = runs.of_table(declared.load(name), tmp_path, of_digits)
    assert {run.missing for run in found.values()} == {""}


def test_a_students_teacher_is_the_one_that_is_declared(tmp_path):
    found, _ = runs.of_table(_table(tmp_path), tmp_path)
    assert found["teachers/good"].config.student.mlp.hidden == (16, 16)
    student = found["good/tgeo"]
    assert student.needs == "teachers/good"
    assert student.config.teacher.mlp.hidden == (16, 16)
    assert student.config.teacher.workdir == str(tmp_path / "teachers" / "good")
    assert student.config.ratio.tgeo.relations == "intra"
    assert found["noisy/kd"].config.teacher.mlp.hidden == (256, 256)
    assert found["noisy/plain"].needs == ""


def test_what_is_the_same_under_every_teacher_is_trained_once(tmp_path):
    found, cells = runs.of_table(_table(tmp_path), tmp_path)
    assert [run for run in found if run.endswith("plain")] == ["noisy/plain"]
    of_plain = {cell.column.name: cell.runs for cell in cells if cell.row.name == "plain"}
    assert of_plain == {"noisy": ("noisy/plain",), "good": ("noisy/plain",)}
    assert len(found) == 2 + 1 + 2 * 2


def test_seeds_may_be_runs_of_their_own(tmp_path):
    table = dataclasses.replace(_table(tmp_path), packed=False)
    found, cells = runs.of_table(table, tmp_path)
    assert cells[1].runs == ("noisy/kd/seed_0", "noisy/kd/seed_1")
    assert [(found[run].config.seed, found[run].config.seeds) for run in cells[1].runs] == [
        (0, 1), (1, 1),
    ]  # fmt: skip


def test_a_stream_trains_each_seed_alone(tmp_path):
    found, _ = runs.of_table(declared.load("imagenet"), tmp_path)
    assert {run.config.seeds for run in found.values()} == {1}


def test_settings_reach_teachers_too(tmp_path):
    found, _ = runs.of_table(_table(tmp_path), tmp_path, {"train.epochs": 3})
    assert {run.config.train.epochs for run in found.values()} == {3}


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (
            'rows = ["plain", "kd", "tgeo"]',
            "rows = 3",
            r"small\.toml: rows=3: must be of type list",
        ),
        ("seeds = 2", 'seeds = "2"', r"small\.toml: seeds='2': must be of type int"),
        ("seeds = 2", "seeds = 0", r"seeds=0: must be positive"),
        ("seeds = 2", "sedes = 2", r"small\.toml: sedes: no such key; did you mean 'seeds'\?"),
        ('title = "Small"', "", r"title: missing"),
        ('title = "Small"', "title = ", r"small\.toml: not TOML"),
        ("[row.tgeo]", "[row.tgoe]", r"row\.tgoe: not in rows; did you mean 'tgeo'\?"),
        ('ours = ["tgeo"]', 'ours = ["dkd"]', r"ours: 'dkd': not in rows"),
        ('"noisy", "good"', '"noisy", "noisy"', r"columns=.*: must be several different names"),
        ('"noisy", "good"', '"noisy/x"', r"columns: 'noisy/x': must be a word"),
        ('label = "learned"', 'of = "dml"', r"row\.tgeo: of='dml': not in rows"),
        ('config = "configs/digits/teacher.py"', "", r"needs either config .* or workdir"),
        ('source = "a paper"', "", r"published: source: missing"),
    ],
)
def test_a_wrong_file_is_told(tmp_path, before, after, message):
    assert before in SMALL
    with pytest.raises(ConfigError, match=message):
        _table(tmp_path, SMALL.replace(before, after, 1))


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("{row}.py", "{row}.txt", r"noisy/plain: config='configs/digits/plain\.txt': no such file"),
        ('"intra"', '"inner"', r"noisy/tgeo: ratio\.tgeo\.relations='inner': "),
        ("ratio.tgeo.relations", "ratio.tgeo.relation", r"noisy/tgeo: .* did you mean"),
        ('"intra"', "3", r"noisy/tgeo: ratio\.tgeo\.relations=3"),
        ("[teacher.noisy]", "[teacher.loud]", r"noisy/kd: teacher: no section"),
    ],
)
def test_a_cell_that_cannot_run_is_told_before_any_runs(tmp_path, before, after, message):
    assert before in SMALL
    with pytest.raises(ConfigError, match=message):
        runs.of_table(_table(tmp_path, SMALL.replace(before, after, 1)), tmp_path)


def test_a_table_can_be_restricted(tmp_path):
    table = _table(tmp_path).restricted(["tgeo", "plain"], ["good"], 3)
    assert [row.name for row in table.rows] == ["tgeo", "plain"]
    assert ([column.name for column in table.columns], table.seeds) == (["good"], 3)
    with pytest.raises(ConfigError, match=r"--methods=tgoe: .* row; did you mean 'tgeo'\?"):
        table.restricted(["tgoe"], [], None)
    with pytest.raises(ConfigError, match=r"--pairs=bad: table 'small' has no such column"):
        table.restricted([], ["bad"], None)
    with pytest.raises(ConfigError, match=r"--table=digit: no such table; did you mean 'digits'"):
        declared.load("digit")


def test_another_configuration_in_a_folder_is_refused(tmp_path):
    found, _ = runs.of_table(_table(tmp_path), tmp_path)
    _finish(found["noisy/kd"], (0.5, 0.6))
    assert found["noisy/kd"].status() == (runs.DONE, 1.0)
    others, _ = runs.of_table(_table(tmp_path), tmp_path, {"train.epochs": 7})
    with pytest.raises(ConfigError, match=r"train\.epochs: 40 -> 7"):
        others["noisy/kd"].status()


def test_finished_runs_can_be_moved_but_not_begun_ones(tmp_path):
    table = _table(tmp_path)
    found, _ = runs.of_table(table, tmp_path / "here")
    _finish(found["good/kd"], (0.5, 0.6))
    (tmp_path / "here").rename(tmp_path / "there")
    moved, _ = runs.of_table(table, tmp_path / "there")
    assert moved["good/kd"].status() == (runs.DONE, 1.0)
    (tmp_path / "there" / "good" / "kd" / "result.json").unlink()
    with pytest.raises(ConfigError, match=r"teacher\.workdir: .*here.* -> .*there"):
        moved["good/kd"].status()


def test_data_that_is_not_there_is_a_missing_run_with_the_way_to_get_it(tmp_path):
    found, cells = runs.of_table(declared.load("cifar100_relations"), tmp_path,
                                 {"data.dir": str(tmp_path)})  # fmt: skip
    student = found[cells[-1].runs[0]]
    assert student.status() == (runs.MISSING, 0.0)
    assert "experiments.prepare --dataset=cifar100" in found[student.needs].missing
    assert found[student.needs].missing in student.missing


def _finish(run, last, best=None, seconds=10.0, **further):
    """What training would have left behind."""
    run.workdir.mkdir(parents=True, exist_ok=True)
    (run.workdir / "config.json").write_text(configs.to_json(run.config))
    per_seed = [
        {
            "seed": run.config.seed + index,
            "last": {"test/accuracy": a, **{k: v[index] for k, v in further.items()}},
            "best_by_validation": {"test/accuracy": b},
        }
        for index, (a, b) in enumerate(zip(last, best or last, strict=True))
    ]
    result = {
        "per_seed": per_seed,
        "seconds": seconds,
        "device": "1 x Device",
        "versions": {"jax": "0.10.2"},
        "commit": "abc",
        "test_accuracy": {
            "last": {"mean": statistics.fmean(last), "std": None},
            "best_by_validation": {"mean": statistics.fmean(best or last), "std": None},
        },
    }
    (run.workdir / "result.json").write_text(json.dumps(result))


KD, PLAIN, OURS = (0.70, 0.72), (0.60, 0.66), (0.74, 0.75)


@pytest.fixture
def finished(tmp_path):
    table = _table(tmp_path)
    found, cells = runs.of_table(table, tmp_path)
    _finish(found["teachers/good"], (0.9,))
    _finish(found["good/kd"], KD, (0.71, 0.73))
    _finish(found["noisy/plain"], PLAIN)
    _finish(found["good/tgeo"], OURS, seconds=20.4)
    failed = {"noisy/kd": "it broke"}
    read = {(c.row.name, c.column.name): outcomes.of_cell(table, c, found, failed) for c in cells}
    teachers = {"good": found["teachers/good"].folder.result()}
    return output.Finished(table, read, teachers, "About the runs.")


def test_the_table_says_what_statistics_say(finished):
    page = output.markdown(finished)
    rows = {
        line.split(" | ")[0].strip("| "): [cell.strip(" |") for cell in line.split(" | ")[1:]]
        for line in page.partition("## good")[2].splitlines()
        if line.startswith("| ")
    }
    p = scipy.stats.ttest_rel(OURS, KD).pvalue
    difference = 100 * (statistics.fmean(OURS) - statistics.fmean(KD))
    assert rows["learned"] == [
        "2", f"74.50 ± {100 * statistics.stdev(OURS):.2f}",
        f"74.50 ± {100 * statistics.stdev(OURS):.2f}",
        f"{difference:+.2f} (p = {p:.2f})", "–", "–", "20",
    ]  # fmt: skip
    assert rows["kd"][1:6] == ["71.00 ± 1.41", "72.00 ± 1.41", "best other", "70.50 [3]", "+0.50"]
    assert rows["plain"][3].startswith("-8.00 (p = ")
    assert "The teacher's test accuracy: 90.00." in page
    assert "3. Published; epoch: last; source: a paper." in page


def test_every_missing_cell_has_its_reason(finished):
    page = output.markdown(finished)
    above = page.partition("## good")[0]
    assert "| kd [1] | – | – | – | – | – |" in above
    assert "| learned [2] | – |" in above
    assert "1. it broke" in page
    assert "2. to do, 0 % trained" in page


def test_a_part_of_the_seeds_is_shown_as_a_part(tmp_path):
    table = dataclasses.replace(_table(tmp_path), packed=False)
    found, cells = runs.of_table(table, tmp_path)
    _finish(found["noisy/kd/seed_1"], (0.5,))
    read = outcomes.of_cell(table, cells[1], found, {})
    assert (read.seeds, read.missing) == ((1,), "1 of 2 seeds: to do, 0 % trained")
    for cell in cells:  # paired by seed, not by place
        if cell.row.name == "plain":
            for seed, value in ((0, 0.9), (1, 0.4)):
                if found[f"noisy/plain/seed_{seed}"].folder.result() is None:
                    _finish(found[f"noisy/plain/seed_{seed}"], (value,))
    plain = outcomes.of_cell(table, cells[0], found, {})
    difference, p = outcomes.paired(read, plain, "last")
    assert difference == pytest.approx(0.1)
    assert p != p


def test_csv_holds_the_same_as_shares(finished):
    rows = list(csv.DictReader(io.StringIO(output.comma_separated(finished))))
    assert len(rows) == 2 * 3 * 2
    (own,) = (
        row for row in rows
        if (row["row"], row["column"], row["which"]) == ("tgeo", "good", "last")
    )  # fmt: skip
    assert float(own["mean"]) == pytest.approx(statistics.fmean(OURS))
    assert float(own["p"]) == pytest.approx(scipy.stats.ttest_rel(OURS, KD).pvalue)
    assert (own["best_other"], own["seeds"], own["published"]) == ("kd", "0 1", "")
    (paper,) = (row for row in rows if row["published"])
    assert (paper["row"], paper["published"], paper["published_epoch"]) == ("kd", "70.5", "last")


def test_latex_is_whole(finished):
    text = output.latex(finished)
    assert text.count("{") - text.count(r"\{") == text.count("}") - text.count(r"\}")
    body = text.partition(r"\midrule")[2].partition(r"\bottomrule")[0].strip().splitlines()
    assert {line.count(" & ") for line in body} == {2}
    assert all(line.endswith(r"\\") for line in body)
    assert r"\textbf{74.50 $\pm$ 0.71} (74.50)" in text
    assert r"to do, 0 \% trained" in text


def test_figures_come_from_results_logs_and_samples(tmp_path):
    text = SMALL.replace(
        "seeds = 2", 'seeds = 2\nfigures = ["test/auc", "train/ratio_right_large_edge", "gap"]'
    )
    table = _table(tmp_path, text)
    found, cells = runs.of_table(table, tmp_path)
    run = found["good/tgeo"]
    _finish(run, (0.75, 0.5), **{"test/auc": (0.25, 0.75)})
    records = [
        {"step": step, "seed": seed, "epoch": float(step), "train/accuracy": 0.875,
         "test/accuracy": (0.75, 0.5)[seed], "train/ratio_right_large_edge": 0.1 * step + seed}
        for step in (1, 2) for seed in (0, 1)
    ]  # fmt: skip
    run.folder.metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
    read = outcomes.of_cell(table, cells[-1], found, {})
    assert read.values["test/auc", "last"] == (0.25, 0.75)
    assert ("test/auc", "best_by_validation") not in read.values
    assert read.values["gap", "last"] == (0.125, 0.375)
    ratio = "train/ratio_right_large_edge"
    assert read.mean(ratio, "first") == pytest.approx(0.6)
    assert read.mean(ratio, "last") == pytest.approx(0.7)
    assert read.std(ratio, "last") == pytest.approx(statistics.stdev((0.2, 1.2)))


def test_figures_of_a_chain_are_those_of_its_last_generation(tmp_path):
    text = SMALL.replace('"kd", "tgeo"', '"kd", "trikd"').replace('["tgeo"]', '["trikd"]')
    text = text.replace("row.tgeo", "row.trikd").replace(
        "seeds = 2", 'seeds = 2\nfigures = ["gap"]'
    )
    table = _table(tmp_path, text.replace('set = { "ratio.tgeo.relations" = "intra" }', ""))
    found, cells = runs.of_table(table, tmp_path)
    run = found["noisy/trikd"]
    assert run.status() == (runs.WAITING, 0.0)
    for number, trained in ((0, 0.5), (1, 0.75), (2, 1.0)):
        folder = run.folder.generation(number)
        folder.path.mkdir(parents=True)
        records = [
            {"step": 9, "seed": seed, "epoch": 40.0, "train/accuracy": trained,
             "test/accuracy": 0.5} for seed in (0, 1)
        ]  # fmt: skip
        folder.metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
        assert run.status() == (runs.BEGUN, pytest.approx((number + 1) / 3))
    _finish(run, (0.5, 0.5))
    read = outcomes.of_cell(table, next(c for c in cells if run.name in c.runs), found, {})
    assert read.values["gap", "last"] == (0.5, 0.5)


def test_a_plan_tells_costs_from_what_was_measured(tmp_path):
    found, _ = runs.of_table(_table(tmp_path), tmp_path)
    unknown = plan.told(plan.of_runs(found), commands=False)
    assert "7 runs, 0 done, 7 to do, cost unknown" in unknown
    _finish(found["teachers/noisy"], (0.9,), seconds=2.0)
    planned = {each.run.name: each for each in plan.of_runs(found)}
    teacher = planned["teachers/noisy"]
    products = 2 * (64 * 256 + 256 * 256 + 256 * 10)
    assert teacher.flops == pytest.approx(3 * products * 0.9 * 1437 * 60, rel=0.03)
    student = planned["noisy/kd"]
    assert student.seconds == pytest.approx(2.0 * student.flops / teacher.flops)
    assert teacher.seconds == 2.0
    kind = device_kinds.named("H100")[0]
    _, *others = (each for each in plan.of_runs(found, kind))
    assert others[0].seconds is not None
    told = plan.told(list(planned.values()), price=3.0)
    assert "7 runs, 1 done, 6 to do, about " in told
    assert " at 3 an hour." in told
    assert "python -m experiments.main --config=configs/digits/kd.py" in told


def test_a_learned_ratio_costs_eight_forward_passes(tmp_path):
    found, _ = runs.of_table(_table(tmp_path), tmp_path)
    by_name = {each.run.name: each.flops for each in plan.of_runs(found)}
    teacher = by_name["noisy/kd"] - by_name["noisy/plain"]
    passes = (by_name["noisy/tgeo"] - teacher) / by_name["noisy/plain"]
    assert passes == pytest.approx(8 / 3)


def test_published_figures_of_a_dataset_stand_beside_its_table():
    table = declared.load("cifar100")
    found = table.published["kd", "resnet56-resnet20", "test/accuracy"]
    assert (found.value, found.epoch) == (70.66, "last")
    assert dataclasses.astuple(
        table.published["dist", "resnet56-resnet20", "test/accuracy"]
    )[:2] == (71.75, 0.3)  # fmt: skip


def _pictures(tmp_path, text, ratio_SxN=None):
    table = _table(tmp_path, text)
    found, cells = runs.of_table(table, tmp_path, {})
    for cell in cells:
        for name in cell.runs:
            if found[name].folder.result() is None:
                _finish(found[name], (0.5, 0.6))
            if ratio_SxN is not None:
                np.savez(found[name].folder.samples, ratio=ratio_SxN)
    read = {(c.row.name, c.column.name): outcomes.of_cell(table, c, found, {}) for c in cells}
    finished = output.Finished(table, read, {}, "")
    return read, dict(figures.drawn(finished, cells, found))


def test_outliers_have_ratios_of_their_own_and_a_picture(tmp_path):
    text = SMALL.replace(
        "seeds = 2",
        'seeds = 2\nfigures = ["samples/outlier_ratio", "samples/other_ratio"]\n'
        'set = { "data.outliers" = 0.25 }',
    )
    ratio_SxN = np.full((2, 8), (0.5,))
    ratio_SxN[:, splits.outliers(8, 0.25, 0)] = np.array([[0.1, 0.3], [0.2, 0.4]])
    ratio_SxN[0, np.setdiff1d(np.arange(8), splits.outliers(8, 0.25, 0))[0]] = 0.8
    read, pictures = _pictures(tmp_path, text, ratio_SxN)
    found = read["tgeo", "good"]
    assert found.values["samples/outlier_ratio", "last"] == pytest.approx((0.2, 0.3))
    assert found.values["samples/other_ratio", "last"] == pytest.approx((0.55, 0.5))
    assert {"accuracy", "outliers-good-tgeo"} <= set(pictures)
    for picture in pictures.values():
        assert PIL.Image.open(io.BytesIO(picture)).size[0] > 300
    _, pictures = _pictures(tmp_path / "constant", text, np.full((2, 8), 0.5))
    assert set(pictures) == {"accuracy"}  # a constant ratio is no distribution


def test_a_table_of_many_columns_is_a_picture_of_lines(tmp_path):
    text = SMALL.replace('"noisy", "good"', '"noisy", "good", "noisy-x"')
    _, pictures = _pictures(tmp_path, text)
    assert set(pictures) == {"accuracy"}
    assert PIL.Image.open(io.BytesIO(pictures["accuracy"])).size[0] > 300
