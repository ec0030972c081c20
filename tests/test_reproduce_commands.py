"""The commands of docs/reproduction.md, shorter and in folders of the test's own."""

from __future__ import annotations

import csv
import json
import pathlib
import re
import shlex

import pytest

from experiments.reproduction import declared
from tests.conftest import ROOT
from tgeo_jax import ledger

pytestmark = pytest.mark.xdist_group("reproduce")  # one process trains the table for all
DOCUMENT = (ROOT / "docs" / "reproduction.md").read_text()


def _commands(text: str = DOCUMENT) -> list[list[str]]:
    blocks = "".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL))
    lines = blocks.replace("\\\n", " ").splitlines()
    return [shlex.split(line)[1:] for line in lines if line.startswith("python ")]


def _with(flag: str) -> list[list[str]]:
    return [arguments for arguments in _commands() if flag in arguments]


@pytest.fixture(scope="module")
def of_relations(command, tmp_path_factory):
    """A table of four runs: its folder, the command, and what it printed."""
    same = next(c for c in _commands() if "--table=digits_relations" in c and "--plan" not in c)
    workdir = tmp_path_factory.mktemp("tables")
    short = [
        *same, f"--workdir={workdir}", "--methods=kd,tgeo", "--seeds=2", "--set=train.epochs=1",
    ]  # fmt: skip
    return workdir, short, command(*short).stdout


def test_without_a_table_all_are_listed(command):
    (listing,) = (arguments for arguments in _commands() if len(arguments) == 2)
    lines = command(*listing).stdout.splitlines()
    assert [line.split()[0] for line in lines] == declared.names(ROOT / declared.FOLDER)


def test_the_readmes_command_is_that_of_the_document():
    of_readme = _commands((ROOT / "README.md").read_text())
    assert next(c for c in of_readme if "experiments.reproduce" in c) in _commands()


def test_the_document_names_every_table():
    for name in declared.names(ROOT / declared.FOLDER):
        assert f"`{name}`" in DOCUMENT, name


def test_a_table_is_trained_printed_and_written(of_relations):
    workdir, _, said = of_relations
    page = (workdir / "digits_relations.md").read_text()
    assert page in said
    rows = list(csv.DictReader((workdir / "digits_relations.csv").open()))
    result = json.loads((workdir / "noisy" / "tgeo" / "result.json").read_text())
    (own,) = (row for row in rows if (row["row"], row["which"]) == ("tgeo", "last"))
    assert float(own["mean"]) == pytest.approx(result["test_accuracy"]["last"]["mean"])
    assert own["seeds"] == "0 1"
    assert "tabular" in (workdir / "digits_relations.tex").read_text()
    assert (workdir / "report" / "index.html").exists()
    assert "teachers/noisy: done" in said


def test_the_same_command_again_trains_nothing(command, of_relations):
    workdir, arguments, _ = of_relations
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("result.json")}
    said = command(*arguments).stdout
    assert len(before) == 3
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("result.json")} == before
    assert "begins" not in said
    assert (workdir / "digits_relations.md").read_text() in said


def test_finished_runs_are_entered_into_a_ledger_once(command, of_relations):
    workdir, arguments, _ = of_relations
    path = workdir / "ledger.jsonl"
    first = command(*arguments, f"--record={path}", check=False)
    if first.returncode:  # changed code, or no checkout: the ledger wants to know the commit
        assert "error: commit=" in first.stderr
        return
    again = command(*arguments, f"--record={path}")
    assert all(
        f"{name}: added to {path}" in first.stdout for name in ("teachers/noisy", "noisy/kd")
    )
    assert "added" not in again.stdout
    assert [record["method"] for record in ledger.read(path)] == ["plain", "kd", "tgeo"]


def test_a_plan_trains_nothing_and_knows_what_is_done(command, of_relations):
    workdir, arguments, _ = of_relations
    said = command(*arguments, "--plan", "--methods=kd,sg_tg,tgeo").stdout
    assert "4 runs, 3 done, 1 to do, about " in said
    assert re.search(r"noisy/sg_tg +to do +0 % ", said)
    assert not (workdir / "noisy" / "sg_tg").exists()
    shown = next(line for line in said.splitlines() if "sg_tg --config" in line)
    assert "--config.ratio.tgeo.relations=sg_tg" in shlex.split(shown)


def test_the_plan_of_a_large_table_says_what_is_missing(command, tmp_path):
    (arguments,) = _with("--price=3")
    local = [each.replace("gs://bucket", str(tmp_path)) for each in arguments]
    said = command(*local).stdout
    assert "4 runs, 0 done, 0 to do, 4 cannot run here (see above)." in said
    assert "experiments.prepare --dataset=cifar100" in said


def test_a_run_that_fails_is_told_and_the_others_are_in_the_table(command, tmp_path):
    broken = tmp_path / "noisy" / "kd"
    arguments = (
        "-m", "experiments.reproduce", "--table=digits", "--methods=plain,kd", "--pairs=noisy",
        "--seeds=1", "--set=train.epochs=1", f"--workdir={tmp_path}",
    )  # fmt: skip
    broken.parent.mkdir(parents=True)
    broken.write_text("a file where the run's folder should be")
    done = command(*arguments, check=False)
    assert done.returncode == 2, done.stderr
    assert "1 runs are missing in the table:\n  noisy/kd: " in done.stderr
    page = (tmp_path / "digits.md").read_text()
    assert re.search(r"\| plain \| 1 \| \d", page)
    assert re.search(r"\| kd \[1\] \| –", page)  # noqa: RUF001


def test_slurms_and_kubernetes_commands_write_what_they_say(command, digits_dir, tmp_path):
    root = pathlib.Path(digits_dir).parent  # of both folders
    assert tmp_path.is_relative_to(root.parent)
    written = []
    for arguments in [*_with("--backend=slurm"), *_with("--backend=kubernetes")]:
        local = [each.replace("gs://bucket/tensorflow_datasets", digits_dir) for each in arguments]
        local = [each for each in local if not each.startswith("--workdir=")]
        local.append(f"--workdir={tmp_path}")
        if "--backend=kubernetes" in local:
            local.append(f"--claim=runs:{root.parent}")
        said = command(*local).stdout
        script = pathlib.Path(said.split()[-1])
        assert script.is_relative_to(tmp_path)
        written.append(script.name)
    assert written == ["submit.sh", "apply.sh", "apply.sh"]
    found = json.loads((tmp_path / "kubernetes" / "1-students.json").read_text())
    assert len(found["items"]) == 2 * 14 - 2 - 4  # without what needs no teacher, plain once
    array = (tmp_path / "slurm" / "students.txt").read_text().splitlines()
    assert len(array) == len(found["items"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--table=digit",), "--table=digit: no such table; did you mean 'digits"),
        (("--table=digits", "--set=train.epochz=1"), "did you mean 'train.epochs'?"),
        (("--table=digits", "--set=train.epochs"), "--set=train.epochs: must be FIELD=VALUE"),
        (("--table=digits", "--pairs=best"), "--pairs=best: table 'digits' has no such column"),
        (("digits",), "unexpected argument 'digits'; name a table by --table="),
    ],
)
def test_bad_input_is_one_message(command, tmp_path, arguments, message):
    done = command(
        "-m", "experiments.reproduce", *arguments, f"--workdir={tmp_path}", check=False
    )  # fmt: skip
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
