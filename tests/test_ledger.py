# ruff: noqa: RUF001 (the page's own signs: a dash for no figure, a cross between the axes)
import json
import statistics

import pytest

from tests.conftest import ROOT
from tgeo_jax import config, ledger, results_table
from tgeo_jax.errors import DataError
from tgeo_jax.workdir import Workdir

COMMIT = "0123456789abcdef0123456789abcdef01234567"
COUNTS = {"train": 45000, "validation": 5000, "test": 10000}
PUBLISHED = json.loads((ROOT / "results" / "published.json").read_text())
STANDARD = {
    "data.name": "cifar100", "data.batch_size": 64, "data.crop_padding": 4, "data.flip": True,
    "optimizer.learning_rate": 0.05, "optimizer.schedule": "step",
    "optimizer.drop_epochs": (150, 180, 210), "train.epochs": 240,
    "data.mean": (0.5071, 0.4867, 0.4408), "data.std": (0.2675, 0.2565, 0.2761),
}  # fmt: skip


def settings(**fields):
    """A configuration as plain data: of CIFAR-100's standard recipe, but for these fields."""
    found = config.default()
    given = {name.replace("__", "."): value for name, value in fields.items()}
    found.update_from_flattened_dict({**STANDARD, **given})
    return json.loads(config.to_json(found))


def result(last=(0.70, 0.72, 0.71), best=(0.71, 0.72, 0.73), *, seed=0, **fields):
    """What training writes: the last epoch is 240, step 2400, the best one 200, step 2000."""
    per_seed = [
        {
            "seed": seed + index,
            "last": {"step": 2400, "epoch": 240.0, "test/accuracy": of_last},
            "best_by_validation": {"step": 2000, "epoch": 200.0, "test/accuracy": of_best},
        }
        for index, (of_last, of_best) in enumerate(zip(last, best, strict=True))
    ]
    return {
        "steps": 2400, "epochs": 240, "per_seed": per_seed, "seconds": 500.0,
        "epoch_seconds": [9.0, 2.0, 3.0, 2.5], "finished": "2001-09-09T01:46:40Z",
        "teacher": {"test_accuracy": 0.7234, "fingerprint": "cd" * 32, "converted": []},
        "device": "1 x Device", "versions": {"jax": "0.10.2"}, "commit": COMMIT,
        "dataset": {**COUNTS, "name": "cifar100", "digest": "ab" * 32}, **fields,
    }  # fmt: skip


def finished(path, given, found):
    """A workdir as a finished run leaves it, as far as the ledger looks."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(given))
    (path / "result.json").write_text(json.dumps(found))
    with (path / "metrics.jsonl").open("w") as file:
        for seed in found["per_seed"]:
            for which in ("best_by_validation", "last"):
                file.write(json.dumps({"seed": seed["seed"], **seed[which]}) + "\n")
    return Workdir(path)


def record(path, *, found=None, **fields):
    given = settings(**fields)
    found = found or result(seed=given["seed"])
    if given["role"]["name"] == "alone":
        found["teacher"] = None
    return ledger.entry(finished(path, given, found))


KD = {"student__name": "resnet20", "teacher__name": "resnet56", "seeds": 3}
PLAIN = {"student__name": "resnet20", "role__name": "alone", "seeds": 3}


def test_an_entry_holds_what_the_files_say(tmp_path):
    folder = finished(tmp_path, settings(**KD), result())
    found = ledger.entry(folder)
    assert found["date"] == "2001-09-09T01:46:40Z"
    assert (found["pair"], found["method"]) == ("resnet56-resnet20", "kd")
    assert (found["teacher"], found["student"]) == ("resnet56", "resnet20")
    assert found["axes"] == {"loss": "kl", "ratio": "constant", "role": "frozen"}
    assert found["seeds"] == [0, 1, 2]
    assert found["per_seed"][1]["last"]["test/accuracy"] == 0.72
    assert found["per_seed"][1]["best_by_validation"]["epoch"] == 200.0
    assert found["selection"] == {"fraction": 0.1, "count": 5000}
    assert found["teacher_test_accuracy"] == 0.7234
    assert found["median_epoch_seconds"] == 2.75  # of 2, 2.5, 3, 9: the slow first one is no matter
    assert (found["seconds"], found["commit"]) == (500.0, COMMIT)
    assert set(found) == set(ledger.FIELDS)
    assert json.loads(json.dumps(found)) == found


def test_mean_and_deviation_are_those_of_the_sample(tmp_path):
    found = record(tmp_path, **KD)["test_accuracy"]
    assert found["last"] == pytest.approx({"mean": 0.71, "std": 0.01})  # sqrt(2 * 0.01**2 / 2)
    assert found["best_by_validation"]["std"] == statistics.stdev([0.71, 0.72, 0.73])


def test_a_network_trained_alone_has_neither_teacher_nor_soft_loss(tmp_path):
    found = record(tmp_path, **PLAIN)
    assert (found["pair"], found["method"], found["teacher"]) == ("resnet20", "plain", None)
    assert found["axes"] == {"loss": None, "ratio": None, "role": "alone"}
    assert found["teacher_test_accuracy"] is None


def test_the_recipe_is_the_configuration_without_this_machines_folders(tmp_path):
    folders = {
        "data__dir": "/disk/tfds",
        "teacher__workdir": "/disk/runs/resnet56/",
        "role__several__workdirs": ("/disk/a", "b/c"),
        "role__trikd__anchor": "/disk/runs/anchor",
    }
    recipe = record(tmp_path, **KD, **folders)["recipe"]
    assert "disk" not in json.dumps(recipe)
    assert recipe["teacher"]["workdir"] == "resnet56"
    assert recipe["role"]["several"]["workdirs"] == ["a", "c"]
    assert recipe["role"]["trikd"]["anchor"] == "anchor"
    expected = settings(**KD)
    assert recipe["loss"] == expected["loss"]
    assert recipe.keys() == expected.keys()


NAMES = {
    "kl tgeo alone": "plain", "kl constant frozen": "kd", "kl constant cached": "kd",
    "kl tgeo cached": "tgeo", "kl wls frozen": "wls", "dkd weighted frozen": "dkd",
    "dist constant frozen": "dist", "logit_std weighted frozen": "logit_std",
    "cmkd weighted frozen": "cmkd", "kl weighted dml": "dml", "kl weighted trikd": "trikd",
    # What has no name of its own must not stand in another method's row.
    "kl weighted frozen": "kl × weighted × frozen", "dkd tgeo frozen": "dkd × tgeo × frozen",
    "kl tgeo dml": "kl × tgeo × dml", "kl constant several": "kl × constant × several",
    "kl+cmkd weighted frozen": "kl+cmkd × weighted × frozen",
}  # fmt: skip


@pytest.mark.parametrize(("axes", "name"), NAMES.items())
def test_the_method_is_named_from_the_three_axes(axes, name):
    loss, ratio, role = axes.split()
    given = settings(loss__name=loss, ratio__name=ratio, role__name=role)
    assert ledger.method(given) == name
    assert ledger.method(settings(loss__weights=(2.0,))) == "kl × constant × frozen"


def test_several_teachers_are_named_by_the_networks_in_their_folders(tmp_path):
    for name, network in (("a", "resnet56"), ("b", "wrn_40_2")):
        finished(tmp_path / name, settings(student__name=network), result())
    folders = (str(tmp_path / "a"), str(tmp_path / "b"))
    several = {**KD, "role__name": "several", "role__several__workdirs": folders}
    assert record(tmp_path / "run", **several)["pair"] == "resnet56+wrn_40_2-resnet20"
    (tmp_path / "b" / "config.json").unlink()
    with pytest.raises(DataError, match=r"b/config\.json: .*role\.several\.workdirs.*restore"):
        record(tmp_path / "run", **several)


def test_of_a_chain_the_log_is_that_of_its_last_generation(tmp_path):
    fields = {**KD, "role__name": "trikd", "ratio__name": "weighted"}
    whole = finished(tmp_path, settings(**fields), result())
    (tmp_path / "metrics.jsonl").unlink()
    finished(tmp_path / "generation_0", settings(**fields), result((0, 0, 0), (0, 0, 0)))
    finished(tmp_path / "generation_1", settings(**fields), result())
    assert ledger.entry(whole)["method"] == "trikd"


def test_a_folder_without_a_finished_run_of_this_version_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"config\.json: no such file: no run there"):
        ledger.entry(Workdir(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(settings()))
    with pytest.raises(DataError, match=r"result\.json: .* has not finished.* it resumes"):
        ledger.entry(Workdir(tmp_path))
    old = result()
    del old["commit"], old["epoch_seconds"]
    folder = finished(tmp_path, settings(**KD), old)
    with pytest.raises(DataError, match=r"lacks commit, epoch_seconds: .* train it with this vers"):
        ledger.entry(folder)


@pytest.mark.parametrize("which", ["last", "best_by_validation"])
def test_a_result_that_its_log_does_not_tell_of_is_refused(tmp_path, which):
    found = result()
    folder = finished(tmp_path, settings(**KD), found)
    found["per_seed"][2][which]["test/accuracy"] = 0.99
    (tmp_path / "result.json").write_text(json.dumps(found))
    with pytest.raises(DataError, match=r"metrics\.jsonl: test/accuracy of seed 2 .* says 0\.99"):
        ledger.entry(folder)
    (tmp_path / "metrics.jsonl").unlink()
    with pytest.raises(DataError, match=r"test/accuracy of seed 0 at step 2400 is None"):
        ledger.entry(folder)


def test_a_ledger_gives_back_what_was_added_in_order(tmp_path):
    path = tmp_path / "new" / "cifar100.jsonl"
    both = [record(tmp_path / "kd", **KD), record(tmp_path / "plain", **PLAIN)]
    for each in both:
        ledger.add(path, each)
    assert ledger.read(path) == both
    assert len(path.read_text().splitlines()) == 2


def test_code_that_is_in_no_commit_is_refused(tmp_path):
    path = tmp_path / "cifar100.jsonl"
    dirty = record(tmp_path / "run", found=result(commit=f"{COMMIT}-dirty"), **KD)
    with pytest.raises(DataError, match=r"-dirty': no commit holds the code .*--allow_dirty"):
        ledger.add(path, dirty)
    for allow_dirty in (False, True):  # nothing can be said of it, so nothing allows it
        with pytest.raises(DataError, match=r"commit='unknown': no commit holds"):
            ledger.add(path, {**dirty, "commit": "unknown"}, allow_dirty=allow_dirty)
    assert not path.exists()
    resumed = {**dirty, "commit": f"{COMMIT}+{COMMIT[::-1]}"}  # by two states of the code
    with pytest.raises(DataError, match=r"\+.*': no commit holds the code"):
        ledger.add(path, resumed)
    ledger.add(path, dirty, allow_dirty=True)
    assert ledger.read(path) == [dirty]


def test_another_teacher_under_the_same_name_is_another_run(tmp_path):
    path, run = tmp_path / "cifar100.jsonl", record(tmp_path / "kd", **KD)
    ledger.add(path, run)
    ledger.add(path, {**run, "teacher_fingerprint": "ef" * 32})
    assert len(ledger.read(path)) == 2


def test_a_converted_teacher_and_how_a_ratio_was_trained_are_in_the_note(tmp_path):
    converted = [{"file": "c.pth", "sha256": "9" * 64}]
    about = {"test_accuracy": 0.7, "fingerprint": "f", "converted": converted}
    run = record(tmp_path, found=result(teacher=about), **KD, ratio__name="tgeo", meta__every=4)
    page = results_table.render([run], PUBLISHED)
    assert "teacher converted from c.pth (99999999), which may have seen the selection" in page
    assert 'meta(every=4, optimizer="adamw 0.001")' in page


def test_a_converted_network_is_not_a_run(tmp_path):
    finished(tmp_path, {"student": {"name": "resnet8"}, "converted": {}}, result())
    with pytest.raises(DataError, match=r"a converted network, not a run; nothing to add"):
        ledger.entry(Workdir(tmp_path))


def test_the_same_run_is_not_added_twice(tmp_path):
    path = tmp_path / "cifar100.jsonl"
    ledger.add(path, record(tmp_path / "plain", **PLAIN))
    once = record(tmp_path / "kd", **KD)
    ledger.add(path, once)
    again = record(tmp_path / "copy", **KD, data__dir="/elsewhere")
    with pytest.raises(DataError, match=r"line 2: .*kd, resnet56-resnet20.*is there already"):
        ledger.add(path, again)
    for other in ({"commit": COMMIT[::-1]}, {"device": "2 x Device"}):
        ledger.add(path, {**again, **other})
    ledger.add(path, record(tmp_path / "seeds", **KD, seed=3))
    assert len(ledger.read(path)) == 5


@pytest.mark.parametrize(
    ("line", "said"), [("{torn", "not JSON"), ("3", "lacks date, pair"), ("{}", "lacks date, pair")]
)
def test_a_damaged_line_is_named_with_its_file_and_number(tmp_path, line, said):
    path, run = tmp_path / "cifar100.jsonl", record(tmp_path / "kd", **KD)
    ledger.add(path, run)
    damaged = path.read_text() + line + "\n"
    path.write_text(damaged)
    with pytest.raises(DataError, match=rf"cifar100\.jsonl, line 2: {said}"):
        ledger.add(path, {**run, "device": "another"})
    assert path.read_text() == damaged


SMALL = {
    "cifar100": {
        "recipe": {"train.epochs": 240, "data.batch_size": 64, "data.fraction": 1.0},
        "groups": [{"name": "Small", "pairs": ["resnet56-resnet20", "vgg13-vgg8"]}],
        "rows": [
            {"label": "KD", "method": "kd", "epoch": "last", "source": "a paper", "remark": "",
             "top1": {"resnet56-resnet20": 70.66, "vgg13-vgg8": 72.98}, "std": {"vgg13-vgg8": 0.2}},
            {"label": "CRD", "method": None, "epoch": "unknown", "source": "not recorded",
             "remark": "By heart.", "top1": {"vgg13-vgg8": 73.94}},
        ],
    }
}  # fmt: skip
PAGE = """\
Test accuracy in percent. Ours: mean ± sample standard deviation over the seeds after the
last epoch / mean at the epoch that validation chose, and the AUC there of two classes
(number of seeds) [note].

## cifar100

### Small

Our runs by the standard recipe: train.epochs=240, data.batch_size=64, data.fraction=1.0.

| method | resnet56-resnet20 | vgg13-vgg8 |
| --- | --- | --- |
| teacher | 71.00 ± 1.00 / 72.00 (3 seeds) [1] | – |
| kd | 71.00 ± 1.00 / 72.00 (3 seeds) [2]<br>60.00 / 61.00 (1 seed) [3] | – |
| published: KD (epoch: last) [4] | 70.66 | 72.98 ± 0.20 |
| published: CRD (epoch: unknown) [5] | – | 73.94 |

### Other runs

Not to be compared with published rows.

| method | pair | accuracy | epochs | batch size | data fraction | \
other differences from the standard recipe | seeds | device | commit |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
| kd | resnet56-resnet20 | 71.00 ± 1.00 / 72.00 (3 seeds) [2] | 8 | 64 | 1.0 | – | 0, 1, 2 | \
1 x Device | 0123456 |

## Notes

The ledger holds each run's whole configuration.

1. Selection on 5000 examples (10 % of the training split), trained on 45000, tested on 10000; \
data abababab; seeds 0, 1, 2; 1 x Device; commit 0123456; float32.
2. Selection on 5000 examples (10 % of the training split), trained on 45000, tested on 10000; \
data abababab; seeds 0, 1, 2; 1 x Device; commit 0123456; float32; teacher's test accuracy 72.34; \
kl(temperature=4.0); constant(alpha=0.9, warmup_epochs=0); frozen.
3. Selection on 5000 examples (10 % of the training split), trained on 45000, tested on 10000; \
data abababab; seeds 7; 1 x Device; commit 0123456-dirty; float32; teacher's test accuracy 72.34; \
kl(temperature=4.0); constant(alpha=0.9, warmup_epochs=0); frozen.
4. Published; source: a paper.
5. Published; source: not recorded. By heart.
"""


def test_the_page_is_this_one(tmp_path):
    single = result((0.6,), (0.61,), seed=7, commit=f"{COMMIT}-dirty")
    records = [
        record(tmp_path / "kd", **KD),
        record(tmp_path / "one", found=single, **{**KD, "seeds": 1, "seed": 7}),
        record(tmp_path / "teacher", **{**PLAIN, "student__name": "resnet56"}),
        record(tmp_path / "short", **KD, train__epochs=8),
    ]
    assert results_table.render(records, SMALL) == PAGE


def test_of_two_classes_the_area_at_the_chosen_epoch_is_shown(tmp_path):
    run = record(tmp_path, **KD)
    for seed, area in zip(run["per_seed"], (0.81, 0.82, 0.83), strict=True):
        seed["best_by_validation"]["test/auc"] = area
    page = results_table.render([run], {})
    assert "71.00 ± 1.00 / 72.00, AUC 0.8200 ± 0.0100 (3 seeds) [1]" in page


def test_a_student_trained_alone_stands_in_the_column_of_each_of_its_pairs(tmp_path):
    page = results_table.render([record(tmp_path, **{**PLAIN, "student__name": "vgg8"})], PUBLISHED)
    found = [line for line in page.splitlines() if line.startswith("| plain |")]
    assert found == ["| plain | – | – | – | – | – | 71.00 ± 1.00 / 72.00 (3 seeds) [2] |"] * 2


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"train__epochs": 100}, "| 100 | 64 | 1.0 | – |"),
        ({"data__batch_size": 512}, "| 240 | 512 | 1.0 | – |"),
        ({"data__fraction": 0.1}, "| 240 | 64 | 0.1 | – |"),
        ({"data__label_noise": 0.2}, "| 240 | 64 | 1.0 | data.label_noise=0.2 |"),
        ({"data__outliers": 0.1}, "| 240 | 64 | 1.0 | data.outliers=0.1 |"),
        ({"optimizer__learning_rate": 0.1}, "| 240 | 64 | 1.0 | optimizer.learning_rate=0.1 |"),
    ],
)
def test_a_run_of_another_recipe_stands_beside_nothing_published(tmp_path, fields, told):
    page = results_table.render([record(tmp_path, **{**KD, **fields})], PUBLISHED)
    assert page.count("None of our runs here is by the standard recipe yet") == 2  # both groups
    beside_published, others = page.split("### Other runs")
    assert "| published: KD" in beside_published
    ours = {line for line in beside_published.splitlines() if line.startswith("| kd |")}
    assert ours == {"| kd |" + " – |" * 6}
    assert told in others


def test_a_field_that_came_later_is_no_difference(tmp_path):
    run = record(tmp_path, **KD)
    del run["recipe"]["data"]["fraction"], run["recipe"]["precision"]
    assert "### Other runs" not in results_table.render([run], PUBLISHED)


def test_light_students_have_a_learning_rate_of_their_own(tmp_path):
    light = {**KD, "teacher__name": "resnet32x4", "student__name": "ShuffleV1"}
    for rate, comparable in ((0.01, True), (0.05, False)):
        run = record(tmp_path / str(rate), **light, optimizer__learning_rate=rate)
        assert ("### Other runs" in results_table.render([run], PUBLISHED)) != comparable


def test_what_has_no_published_pair_or_dataset_is_listed_all_the_same(tmp_path):
    found = result(dataset={**COUNTS, "name": "digits", "digest": "cd" * 32})
    runs = [
        record(tmp_path / "digits", found=found, **{**KD, "student__name": "cnn"}),
        record(tmp_path / "pair", **{**KD, "student__name": "resnet14"}),
    ]
    page = results_table.render(runs, PUBLISHED)
    assert [line for line in page.splitlines() if line.startswith("#")] == [
        "## digits", "### Other runs", "## cifar100",
        *[f"### {group['name']}" for group in PUBLISHED["cifar100"]["groups"]],
        "### Other runs", "## Notes",
    ]  # fmt: skip
    assert "| kd | resnet56-cnn | 71.00 ± 1.00 / 72.00 (3 seeds) [1] | 240 |" in page
    assert "| kd | resnet56-resnet14 | 71.00 ± 1.00 / 72.00 (3 seeds) [" in page


def test_published_figures_are_those_of_their_tables():
    for label, pair, figure in (
        ("teacher", "ResNet50-vgg8", 79.34), ("student", "vgg13-MobileNetV2", 64.60),
        ("KD", "resnet56-resnet20", 70.66), ("CRD", "wrn_40_2-ShuffleV1", 76.05),
        ("DKD", "resnet32x4-ShuffleV2", 77.07), ("DKD", "ResNet50-vgg8", None),
        ("DIST", "wrn_40_2-wrn_40_1", 74.43), ("WLS-KD", "resnet32x4-resnet8x4", 76.05),
        ("KD + logit standardisation", "resnet32x4-ShuffleV1", None),
        ("KD + logit standardisation", "ResNet50-MobileNetV2", 69.02),
        ("TGeo-KD", "resnet32x4-ShuffleV1", 76.83),
        ("KD", "resnet34-resnet18", 71.03), ("DIST", "resnet50-mobilenetv1", 73.24),
    ):  # fmt: skip
        imagenet = pair in ("resnet34-resnet18", "resnet50-mobilenetv1")
        rows = PUBLISHED["imagenet2012" if imagenet else "cifar100"]["rows"]
        found = next(row["top1"] for row in rows if row["label"] == label)
        assert found.get(pair) == figure, (label, pair)


def test_published_rows_say_which_epoch_they_report_and_name_known_methods_and_pairs():
    epochs = {}
    for dataset, about in PUBLISHED.items():
        pairs = {pair for group in about["groups"] for pair in group["pairs"]}
        for row in about["rows"]:
            assert row["method"] in (None, *ledger.METHODS)
            assert set(row.get("std", {})) <= set(row["top1"]) <= pairs
            assert row["source"]
            epochs[dataset, row["label"]] = row["epoch"]
    known = {key: epoch for key, epoch in epochs.items() if epoch != "unknown"}
    assert known == {("cifar100", "KD"): "last", ("cifar100", "DKD"): "best on test"}
    assert sum(len(row["top1"]) for row in PUBLISHED["cifar100"]["rows"]) == 12 * 4 + 11 + 6 + 3 + 9


def test_the_command_adds_and_renders_and_tells_mistakes_in_one_line(command, tmp_path):
    finished(tmp_path / "kd", settings(**KD), result())
    path, page = tmp_path / "cifar100.jsonl", tmp_path / "README.md"
    add = ("-m", "experiments.results", "add", str(tmp_path / "kd"), f"--ledger={path}")
    assert "kd, resnet56-resnet20, added to" in command(*add).stdout
    again = command(*add, check=False)
    wrong = command("-m", "experiments.results", "rendre", check=False)
    assert again.returncode == wrong.returncode == 2
    assert again.stderr.count("\n") == wrong.stderr.count("\n") == 1
    assert "is there already" in again.stderr
    assert "rendre: no such command; did you mean 'render'?" in wrong.stderr
    render = ("-m", "experiments.results", "render", f"--ledger={path}", f"--output={page}")
    shown = command(*render)
    assert shown.stdout == page.read_text() == results_table.render(ledger.read(path), PUBLISHED)
    assert "| kd | 71.00 ± 1.00 / 72.00 (3 seeds) [2] |" in shown.stdout


def test_the_committed_page_is_what_the_ledgers_say(command):
    """What is committed beside them must not have been typed in, nor be out of date."""
    done = command("-m", "experiments.results", "render")
    assert done.stdout == (ROOT / "results" / "README.md").read_text()
