"""Every documented command runs as written, but for a shorter time and with smaller networks."""

from __future__ import annotations

import importlib
import json
import pathlib
import pkgutil
import re
import shlex

import jax
import numpy as np
import pytest

import tgeo_jax
from configs.ctr import clicks
from experiments import commandline, compare
from tests import pictures, tiny_cifar, tiny_faces, tiny_tables
from tests.conftest import ROOT
from tgeo_jax import models, origins
from tgeo_jax.data import sources, tables
from tgeo_jax.errors import ConfigError

README = (ROOT / "README.md").read_text()
SHORT = ["--config.train.epochs=1"]
# In place of the networks of the published experiments, whose compilation takes a minute each.
_SMALL_NET = "resnet8"
_SMALLER = [
    *SHORT,
    f"--config.student.name={_SMALL_NET}",
    f"--config.teacher.name={_SMALL_NET}",
]
_SMALL_CIFAR = [
    *_SMALLER,
    "--config.data.validation_fraction=0.25",
    "--config.data.batch_size=100",
    "--config.data.eval_batch_size=100",
    "--config.meta.batch_size=10",
]
_SMALL_FACES = [
    option
    for which in ("student", "teacher")
    for option in (
        f"--config.{which}.name=iresnet",
        f"--config.{which}.iresnet.widths=(2,4)",
        f"--config.{which}.iresnet.depths=(1,)",
        f"--config.{which}.iresnet.embedding=4",
        f"--config.{which}.iresnet.stem_strides=4",
    )
]
_SMALL_TABLE = [
    *SHORT,
    "--config.data.validation_fraction=0.25",
    "--config.data.batch_size=50",
    "--config.meta.batch_size=10",
]
SHORT_FOR = {
    "digits": SHORT,
    "orl_faces": [*SHORT, *_SMALL_FACES],
    "face_folder": [
        *SHORT,
        *_SMALL_FACES,
        "--config.data.validation_fraction=0.2",
        "--config.data.batch_size=5",
        "--config.data.eval_batch_size=10",
    ],
    "cifar10": [*_SMALL_CIFAR, "--config.data.batch_size=10"],
    "cifar100": _SMALL_CIFAR,
    "imagenet2012": [
        *_SMALLER,
        "--config.data.image_size=32",
        "--config.data.workers=0",
        "--config.data.validation_fraction=0.25",
        "--config.data.batch_size=10",
        "--config.data.eval_batch_size=10",
        "--config.meta.batch_size=4",
    ],
    **dict.fromkeys(tables.LAYOUTS, _SMALL_TABLE),
    # The students' part of a few clicks.
    **{name: [*_SMALL_TABLE, "--config.data.batch_size=10"] for name in clicks.DATASETS},
}


MODULES = [module.name for module in pkgutil.walk_packages(tgeo_jax.__path__, "tgeo_jax.")]
COMMANDS = [path.stem for path in sorted((ROOT / "experiments").glob("[!_]*.py"))]


@pytest.fixture(scope="session")
def trained(command, tmp_path_factory):
    """A folder with both of the digits' teachers, trained for a moment."""
    folder = tmp_path_factory.mktemp("trained")
    for name in ("teacher", "good_teacher"):
        command(
            "-m", "experiments.main", f"--config=configs/digits/{name}.py",
            f"--workdir={folder / name}", *SHORT,
        )  # fmt: skip
    return folder


@pytest.mark.parametrize("name", MODULES)
def test_every_module_imports(name):
    importlib.import_module(name)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_imports(command, name):
    command("-c", f"import experiments.{name}")  # on its own: each defines its own flags


def _blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def _commands(text: str) -> list[list[str]]:
    """The `python ...` commands of all sh blocks, without the word python."""
    lines = "".join(_blocks("sh", text)).replace("\\\n", " ").splitlines()
    return [shlex.split(line)[1:] for line in lines if line.startswith("python ")]


def _of_digits(commands: list[list[str]]) -> list[list[str]]:
    """Of README's commands those on the digits; the rest is on CIFAR-100."""
    names = [arguments[1].removeprefix("experiments.") for arguments in commands]
    *names, last = names
    assert names == ["prepare", "main", "main", "compare", "prepare", "main", "main", "results"]
    assert last == "reproduce"  # test_reproduce_commands.py runs it
    return commands[:4]


@pytest.fixture(scope="session")
def tiny_sets(digits_dir):
    """Stand-ins for sets that cannot be had here, beside the digits; gives CIFAR-100's source."""
    for name in ("cifar10", "cifar100"):
        tiny_cifar.prepare(name, digits_dir)
    tiny_faces.prepare(digits_dir)
    pictures.prepare_imagenet(digits_dir, train=40, validation=8)
    for name in tables.LAYOUTS:
        source = tiny_tables.write(name, pathlib.Path(digits_dir) / f"{name}_source")
        tables.prepare(name, source, digits_dir)
    return f"{digits_dir}/cifar100_source"


@pytest.fixture(scope="session")
def untrained(tmp_path_factory):
    """A folder with teachers that know nothing, as if they had been converted."""
    folder = tmp_path_factory.mktemp("untrained")
    for classes in (10, 100, 1000):
        name = f"{_SMALL_NET}-{classes}"
        module = models.build(_SMALL_NET, classes)
        variables = jax.jit(module.init)(jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))
        mean, std = sources.CIFAR100_NORMALISATION
        if classes == 1000:
            mean, std = sources.IMAGENET_NORMALISATION
        file = folder / f"{name}.pth"
        file.write_bytes(b"")
        origins.save_converted(
            folder / name, _SMALL_NET, variables, source=file, mean=mean, std=std
        )
    return folder


def test_readmes_python_runs_and_prints_what_it_says(capsys):
    (block,) = _blocks("python")
    exec(compile(block, "README.md", "exec"), {})
    assert capsys.readouterr().out == "(8,) (3,)\n"


@pytest.mark.xdist_group("demo")
def test_readmes_commands_run_in_their_order(command, tmp_path):
    for arguments in _of_digits(_commands(README))[:-1]:
        arguments = [a.replace("runs/digits", str(tmp_path)) for a in arguments]
        if "experiments.main" in arguments:
            arguments += [*SHORT, f"--config.teacher.workdir={tmp_path / 'teacher'}"]
        command(*arguments)
    assert (tmp_path / "tgeo" / "report" / "index.html").exists()
    together = _commands((ROOT / "docs" / "report.md").read_text())[0]
    done = command(*(a.replace("runs/digits", str(tmp_path)) for a in together))
    page = (tmp_path / "report" / "index.html").read_text()
    assert "<h1>tgeo · teacher</h1>" in page
    assert f"Report: {tmp_path / 'report' / 'index.html'}\n" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "error: no WORKDIR: name the folder of one or more finished runs"),
        (["runs/nowhere"], "error: WORKDIR=runs/nowhere: no run there, nor below"),
    ],
)
def test_a_report_of_nothing_is_one_message_without_a_traceback(command, arguments, message):
    done = command("-m", "experiments.report", *arguments, check=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.xdist_group("demo")
def test_the_comparison_prints_a_row_for_every_method_and_knows_when_it_is_done(command, tmp_path):
    compare = _of_digits(_commands(README))[-1]
    arguments = [a.replace("runs", str(tmp_path)) for a in compare]
    arguments += ["--epochs=1", "--seeds=2", "--methods=plain,kd,tgeo"]
    first, again = command(*arguments), command(*arguments)
    table = (tmp_path / "comparison" / "noisy" / "table.md").read_text()
    assert re.findall(r"^\| (\w+) ", table, re.MULTILINE) == ["method", "plain", "kd", "tgeo"]
    assert table in first.stdout
    assert first.stdout == again.stdout


def test_the_comparison_needs_something_to_compare_with(command):
    done = command("-m", "experiments.compare", "--methods=plain,tgoe", check=False)
    assert done.returncode == 2
    assert "--methods=tgoe: no such method; did you mean 'tgeo'?" in done.stderr
    done = command("-m", "experiments.compare", "--methods=plain,tgeo", check=False)
    assert "--methods=plain,tgeo: add kd, to compare with" in done.stderr


@pytest.mark.xdist_group("demo")
def test_the_commands_that_combine_the_axes_run(command, trained):
    commands = _commands((ROOT / "configs" / "README.md").read_text())
    assert len(commands) == 7
    for arguments in commands[:-1]:  # the last is README's comparison
        chosen = [a.replace("runs/digits", str(trained)) for a in arguments]
        done = command(*chosen, *SHORT, f"--config.teacher.workdir={trained / 'teacher'}")
        assert "Report: " in done.stdout


def test_the_documented_profile_is_written(command, tmp_path):
    commands = _commands((ROOT / "docs" / "performance.md").read_text())
    assert [c[1] for c in commands] == ["benchmarks"] * 2 + ["experiments.main"]
    arguments = [a.replace("runs/digits", str(tmp_path)) for a in commands[-1]]
    command(*arguments, "--config.train.steps_per_dispatch=10")
    assert list((tmp_path / "trace").rglob("*.xplane.pb"))


def test_the_benchmark_runs(command):
    done = command("-m", "benchmarks.soft_rank", "--largest=10", "--repeats=1")
    assert re.search(r"^ +10 +16 ", done.stdout, re.MULTILINE)


def test_the_benchmark_of_the_inputs_runs(command):
    done = command(
        "-m", "benchmarks.inputs", "--dataset=digits", "--image_size=8", "--batch_size=8",
        "--batches=2", "--repeats=1", "--workers=1",
    )  # fmt: skip
    rows = re.findall(r"^(resident|stream): .* +[\d,]+  \(", done.stdout, re.MULTILINE)
    assert rows == ["resident"] * 3 + ["stream"] * 2


def test_the_benchmark_of_streamed_rows_runs_and_computes_hours(command, tmp_path):
    tiny_tables.prepared("criteo", tmp_path)
    done = command(
        "-m", "benchmarks.inputs", "--dataset=criteo", f"--data_dir={tmp_path / 'tfds'}",
        "--batch_size=8", "--batches=2", "--repeats=1", "--workers=1",
    )  # fmt: skip
    rates = re.findall(r"^(\w+: .*?)  +([\d,]+)  \(", done.stdout, re.MULTILINE)
    names = ["stream: threads", "sweep: threads", "stream: 1 worker processes"]
    assert [name for name, _ in rates] == names
    for name, rate in rates:
        hours = float(re.search(rf"^{name}: ([\d.]+) hours for 45,840,617 ", done.stdout, re.M)[1])
        assert hours == pytest.approx(45_840_617 / int(rate.replace(",", "")) / 3600, 0.01, 0.006)


DOCUMENTS = [ROOT / "README.md", ROOT / "configs" / "README.md", *(ROOT / "docs").rglob("*.md")]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_what_a_document_links_to_exists(path):
    for link in re.findall(r"\]\(([^)#\s]+)", path.read_text()):
        assert link.startswith("https://") or (path.parent / link).exists(), link


def test_every_method_has_a_page_that_names_its_parts():
    pages = {path.stem: path.read_text() for path in (ROOT / "docs" / "methods").glob("*.md")}
    for method in compare.METHODS:
        if method == "plain":
            continue
        for part in ("**Formula.**", "**Where from.**", "**Switches.**", "**Cost.**", "**When.**"):
            assert part in pages[method], (method, part)
    for method in ("trikd", "cmkd"):
        assert "Our reconstruction" in pages[method]


def test_make_runs_what_the_readme_promises():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`?make (\w+)", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    assert "-m experiments.demo --workdir=runs/demo" in makefile


@pytest.mark.xdist_group("demo")
def test_demo_prints_the_table_writes_the_report_and_knows_when_it_is_done(command, tmp_path):
    arguments = ("-m", "experiments.demo", f"--workdir={tmp_path}", "--epochs=2")
    first = command(*arguments)
    for name in ("plain student", "constant ratio", "TGeo-KD"):
        assert re.search(rf"^{name} +3 +\d+\.\d\d ± \d+\.\d\d ", first.stdout, re.MULTILINE)
        assert name.replace(" ", "_") + ":" in first.stderr  # its progress bar
    page = (tmp_path / "report" / "index.html").read_text()
    assert page.count('<figure class="chart') == 7  # three of them the confusions of each run
    assert page.count('<figure class="triangle"') == 32
    # The documented page of the runs in a folder: the same ones and their teacher.
    of_folder = _commands((ROOT / "docs" / "report.md").read_text())[1]
    done = command(*(a.replace("runs/comparison/noisy", str(tmp_path)) for a in of_folder))
    assert f"Report: {tmp_path / 'report' / 'index.html'}\n" in done.stdout
    page = (tmp_path / "report" / "index.html").read_text()
    assert "<h1>Methods on digits, noisy teacher</h1>" in page
    for name in ("TGeo-KD", "constant_ratio", "plain_student", "teacher"):
        assert f"<td>{name}</td>" in page
    again = command(*arguments)
    assert "is finished; nothing to train" in again.stdout
    assert (
        first.stdout.split("Report")[0].split("\n\n")[-2:]
        == (again.stdout.split("Report")[0].split("\n\n")[-2:])
    )


@pytest.mark.xdist_group("demo")
def test_readmes_commands_on_cifar100_run_in_their_order(command, tiny_sets, tmp_path):
    prepare, teacher, student, add = _commands(README)[4:8]
    # Its digests are those of the real set, which the stand-in's are not.
    said = command(*prepare[:-1], f"--source={tiny_sets}").stdout
    assert "train: 400 images" in said
    for arguments in (teacher, student):
        arguments = [a.replace("runs/cifar100", str(tmp_path)) for a in arguments]
        if arguments[2].endswith("tgeo"):
            arguments.append(f"--config.teacher.workdir={tmp_path / 'teachers' / 'resnet56'}")
        assert "Report: " in command(*arguments, *SHORT_FOR["cifar100"]).stdout
    arguments = [a.replace("runs/cifar100", str(tmp_path)) for a in add]
    ledger = tmp_path / "ledger.jsonl"
    done = command(*arguments, f"--ledger={ledger}", "--allow_dirty", check=False)
    if done.returncode:  # not a checkout: the ledger wants to know the commit
        assert "commit" in done.stderr
    else:
        assert len(ledger.read_text().splitlines()) == 1


@pytest.mark.xdist_group("demo")
@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs").glob("*/*.py")), ids=lambda p: f"{p.parent.stem}/{p.stem}"
)
def test_each_config_runs_by_the_command_in_its_docstring(
    command, trained, untrained, tiny_sets, tmp_path_factory, path
):
    if path.stem == "__init__":
        return
    relative = path.relative_to(ROOT)
    docstring = importlib.import_module(".".join(relative.with_suffix("").parts)).__doc__ or ""
    line = re.search(r"^Command: python (.*)$", docstring.replace("\\\n", ""), re.MULTILINE)
    assert line, f"{relative} names no command"
    workdirs = tmp_path_factory.mktemp("configs")
    arguments = [a.replace("runs", str(workdirs), 1) for a in shlex.split(line.group(1))]
    config = importlib.import_module(".".join(relative.with_suffix("").parts)).get_config()
    short = SHORT_FOR[config.data.name]
    if path.stem == "longtail":
        short = [*short, "--config.data.imbalance=2.0"]
    if config.teacher.workdir and config.role.name != "alone":
        classes = {"cifar10": 10, "cifar100": 100, "imagenet2012": 1000}
        teacher = trained / "teacher"
        if config.data.name in classes:
            teacher = untrained / f"{_SMALL_NET}-{classes[config.data.name]}"
        if config.data.name in tables.LAYOUTS:
            teacher = workdirs / "teacher"
            told = origins.how_to_get(config, "teacher.workdir", str(teacher))
            command(*shlex.split(told.splitlines()[1])[1:], *short)
        short = [*short, f"--config.teacher.workdir={teacher}"]
    done = command(*arguments, *short)
    assert "Report: " in done.stdout


@pytest.mark.xdist_group("demo")
def test_the_documented_commands_on_faces_run_in_their_order(command, tiny_sets, tmp_path):
    commands = _commands((ROOT / "docs" / "faces.md").read_text())
    names = [arguments[1].removeprefix("experiments.") for arguments in commands]
    assert names == ["prepare", *["main"] * 5, "prepare"]
    teacher, *_, tgeo = commands[1:-1]
    assert "people: 30 trained on, 10 others" in command(*commands[0]).stdout  # is there already
    for arguments in (teacher, tgeo):
        arguments = [a.replace("runs/faces", str(tmp_path)) for a in arguments]
        if arguments[2].endswith("tgeo"):
            arguments.append(f"--config.teacher.workdir={tmp_path / 'teacher'}")
        done = command(*arguments, *SHORT_FOR["orl_faces"])
        assert "verification accuracy" in done.stdout
    assert (tmp_path / "tgeo" / "report" / "figures" / "roc.png").exists()


def test_the_documented_commands_on_tables_run_in_their_order(command, tiny_sets, tmp_path):
    commands = _commands((ROOT / "docs" / "data.md").read_text())
    order = ["experiments.prepare"] + ["experiments.main"] * 2
    assert [arguments[1] for arguments in commands] == order * 2
    commands = commands[:3]  # the others stream Criteo
    source = str(pathlib.Path(tiny_sets).parent / "nsl_kdd_source")
    for arguments in commands:
        arguments = [a.replace("runs/nsl_kdd", str(tmp_path)) for a in arguments]
        if arguments[1] == "experiments.prepare":
            told = command(*(a.replace("NSL-KDD", source) for a in arguments)).stdout
            assert "u2r 40" in told
            continue
        if arguments[2].endswith("tgeo"):
            arguments.append(f"--config.teacher.workdir={tmp_path / 'teacher'}")
        assert "Report: " in command(*arguments, *SHORT_FOR["nsl_kdd"]).stdout


def test_the_documented_commands_of_encoders_run_in_their_order(command, tiny_sets, tmp_path):
    commands = _commands((ROOT / "docs" / "tables.md").read_text())
    of_encoders = "--config=configs/attack/nsl_kdd.py:row_encoder,"
    assert [c[2] for c in commands] == [of_encoders + method for method in ("teacher", "tgeo")]
    smaller = {"layers": 2, "width": 4, "heads": 1}
    options = [f"--config.teacher.row_encoder.{field}={value}" for field, value in smaller.items()]
    for arguments, layers in zip(commands, (2, 1), strict=True):
        arguments = [a.replace("runs/nsl_kdd", str(tmp_path)) for a in arguments]
        own = {**smaller, "layers": layers}
        options += [f"--config.student.row_encoder.{field}={value}" for field, value in own.items()]
        if layers == 1:
            options.append(f"--config.teacher.workdir={tmp_path / 'row_encoder' / 'teacher'}")
        assert "Report: " in command(*arguments, *SHORT_FOR["nsl_kdd"], *options).stdout
    result = json.loads((tmp_path / "row_encoder" / "tgeo" / "result.json").read_text())
    assert result["steps"] == 3
    assert result["teacher"]["test_accuracy"] >= 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--config=configs/digits/tgeo.py", "--config.ratio.tgeo.relation=full"],
            "ratio.tgeo.relation: no such field; did you mean 'ratio.tgeo.relations'?",
        ),
        (
            ["--config=configs/digits/tgeo.py", "--config.loss.kl.temperature=hot"],
            "--config.loss.kl.temperature=hot",
        ),
        (
            ["--config=configs/digits/plain.py", "--config.data.validation_fraction=2.0"],
            "data.validation_fraction=2.0: must lie strictly in (0, 1)",
        ),
        (["--config=configs/digits/nothing.py"], "configs/digits/nothing.py: no such file"),
        (
            ["--config=configs/cifar100/pair.py:resnet56-resnet2,tgeo"],
            "error: student 'resnet2': unknown network; did you mean",
        ),
    ],
)
def test_bad_input_is_one_message_without_a_traceback(command, tmp_path, arguments, message):
    done = command(
        "-m", "experiments.main", f"--workdir={tmp_path / 'run'}", *arguments, check=False
    )
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_config_file_that_returns_something_else_is_refused(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def get_config():\n    return {}\n")
    with pytest.raises(ConfigError, match=r"get_config\(\) returned dict, not a ConfigDict"):
        commandline.checked({}, str(path))


def test_an_unknown_dataset_is_named_with_the_nearest(command):
    done = command("-m", "experiments.prepare", "--dataset=digit", check=False)
    assert done.returncode == 2
    assert "did you mean 'digits'?" in done.stderr
