"""Configurations of random values: each is refused by name or can be trained, nothing in between.

And what nothing here may do: unpickle, evaluate or hand to a shell what comes from outside.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import io
import json
import pathlib
import sys
import types
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import numpy as np
import pytest
from absl import flags
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict, config_flags

from experiments import commandline
from tests.conftest import ROOT
from tgeo_jax import checkpoint, distill, generations, losses, models, optimizers, ratios, roles
from tgeo_jax import config as configs
from tgeo_jax.assemble import Run, assemble
from tgeo_jax.errors import TgeoError
from tgeo_jax.state import Batch, Teacher

# The same examples every time: what fails here fails for everybody.
QUICK = settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
DIGITS = (
    "plain", "teacher", "kd", "tgeo", "cmkd", "dkd", "dist", "logit_std", "annealed", "ada", "wls",
    "rw", "bikd", "dml", "trikd",
)  # fmt: skip
NAN, INF = float("nan"), float("inf")
EXTREMES = (
    0, 1, -1, 2, 3, 7, 10**9, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63, -(2**63), 10**400,
    0.0, -0.0, 0.5, 1.0, -1.0, 1e-7, 5e-324, 1e-40, 3e38, 1e39, 1.7e308, NAN, INF, -INF,
    True, False, None, "", "x", ".", "..", "../../../../etc/passwd", "/dev/null", "a\0b", "ü",
    "\ud800", "x" * 5000, "nan", "kl+dkd", "+", "resnet8", "mlp", "cnn", "tgeo", "several",
    "cached", "stream", "step", "cosine", "prequential", "bfloat16", "full+angles",
    (), (0,), (1,), (-1,), (1, 2), (2, 1), (3.5,), (NAN,), (INF, 1), (True,), ("a",), ("a", "b"),
    ("..", "\0"), (2**31 - 1,) * 2, (10**400,), (1,) * 5000, [1], [], {}, {"a": 1}, b"x", 1j,
)  # fmt: skip
VALUES = st.one_of(
    st.sampled_from(EXTREMES),
    st.integers(),
    st.integers(0, 300),
    st.floats(),
    st.floats(0, 1),
    st.text(max_size=8),
    st.lists(st.one_of(st.integers(), st.floats(), st.text(max_size=3)), max_size=4).map(tuple),
)


def _paths(section: dict, prefix: str = "") -> list[str]:
    """Every field and section, dotted."""
    found = []
    for name, value in section.items():
        found.append(f"{prefix}{name}")
        if isinstance(value, dict):
            found += _paths(value, f"{prefix}{name}.")
    return found


DEFAULT = configs.default().to_dict()
PATHS = _paths(DEFAULT)
SECTIONS = {path.rpartition(".")[0] for path in PATHS}


@pytest.fixture(scope="module")
def teacher(digits_dir, tmp_path_factory) -> str:
    """A teacher that knows nothing, as if configs/digits/teacher.py had trained it."""
    folder = tmp_path_factory.mktemp("fuzz") / "teacher"
    chosen = _digits("teacher", digits_dir, "")
    module = models.build("mlp", 10, **configs.options_of(chosen.student))
    variables = jax.jit(module.init)(jax.random.key(0), np.zeros((1, 8, 8, 1), np.float32))
    checkpoint.save_network(folder / "checkpoints", {"batch_stats": {}, **variables})
    (folder / "config.json").write_text(configs.to_json(chosen))
    (folder / "result.json").write_text("{}")
    return str(folder)


def _digits(name: str, digits_dir: str, teacher: str) -> ConfigDict:
    config = importlib.import_module(f"configs.digits.{name}").get_config()
    config.data.dir, config.teacher.workdir = digits_dir, teacher
    if config.student.name == "cnn":  # convolutions take longer to trace
        config.student.name = "mlp"
    return config


def _changed(config: ConfigDict, changes: dict[str, object]) -> ConfigDict:
    """With some fields set, whatever their type; a section may be gone before its field is."""
    plain = config.to_dict()
    for path, value in changes.items():
        *sections, field = path.split(".")
        with contextlib.suppress(KeyError, TypeError):
            functools.reduce(lambda section, name: section[name], sections, plain)[field] = value
    return ConfigDict(plain)


def _assembled(config: ConfigDict) -> Run:
    configs.check(config)
    return assemble(config, anchor_comes_later=generations.is_chain(config))


def _found(check: Callable[[], Any], changes: dict[str, object]) -> Any:
    """What a check returns, or None if it refuses and names a changed field or one of its section.

    Any other error than the package's own passes through, and fails the test.
    """
    try:
        return check()
    except TgeoError as error:
        said = str(error)
    assert any(path.split(".")[0] in said for path in changes), (changes, said)
    assert len(said) < 5000
    return None


NAMES = (
    *(*losses.SOFT_LOSSES, *ratios.RATIOS, *roles.ROLES, *optimizers.OPTIMIZERS, *distill.ORDERS),
    *("step", "cosine", "last", "best", "stream", "resident", "mlp", "cnn", "resnet8", "vgg8"),
    *("digits", "cifar10", "imagenet2012", "kl+dkd", "kl+cmkd+dist", "edges", "full+angles"),
    *("mixed", "reverse", "each", "frozen", "trained", "/nowhere", "runs/x", "bfloat16"),
)
KINS = {
    bool: st.booleans(),
    int: st.integers(0, 40),
    float: st.one_of(st.floats(0, 1), st.floats(0, 50), st.integers(0, 50)),
    str: st.sampled_from(NAMES),
    tuple: st.one_of(
        st.lists(st.integers(1, 50), max_size=3).map(lambda found: tuple(sorted(found))),
        st.lists(st.floats(0, 3), max_size=3).map(tuple),
    ),
}


def _kin(path: str) -> st.SearchStrategy:
    """A value of a field's kind, which may well be right."""
    default: Any = functools.reduce(lambda found, name: found[name], path.split("."), DEFAULT)
    return st.tuples(st.just(path), KINS.get(type(default), VALUES))


def _changes(paths: list[str], *values: Callable[[str], st.SearchStrategy], most: int) -> Any:
    change = st.sampled_from(paths).flatmap(lambda path: st.one_of([of(path) for of in values]))
    pairs = st.lists(change, min_size=1, max_size=most, unique_by=lambda pair: pair[0])
    return pairs.map(dict)


ANY = _changes(PATHS, _kin, lambda path: st.tuples(st.just(path), VALUES), most=3)
PLAUSIBLE = _changes([path for path in PATHS if path not in SECTIONS], _kin, most=2)


@pytest.mark.parametrize("name", DIGITS)
def test_the_configurations_that_are_changed_can_be_trained(name, digits_dir, teacher):
    assert _assembled(_digits(name, digits_dir, teacher)).method.total_steps > 0


@settings(QUICK, max_examples=400)
@given(st.sampled_from(DIGITS), ANY)
def test_a_configuration_is_right_or_refused_by_name(name, changes):
    chosen = _changed(_digits(name, "/nowhere", "/nowhere"), changes)
    if _found(lambda: configs.check(chosen) or True, changes):
        configs.check(ConfigDict(json.loads(configs.to_json(chosen))))


@settings(QUICK, max_examples=120)
@given(st.sampled_from(DIGITS), PLAUSIBLE)
def test_a_run_is_assembled_or_refused_by_name(digits_dir, teacher, name, changes):
    chosen = _changed(_digits(name, digits_dir, teacher), changes)
    run = _found(lambda: _assembled(chosen), changes)
    assert run is None or 0 < run.method.total_steps < 2**31


def _numbers(section: dict, prefix: str = "") -> list[str]:
    found = []
    for name, value in section.items():
        if isinstance(value, dict):
            found += _numbers(value, f"{prefix}{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found.append(f"{prefix}{name}")
    return found


NUMBERS = st.dictionaries(
    st.sampled_from(_numbers(DEFAULT)),
    st.one_of(
        st.sampled_from([v for v in EXTREMES if isinstance(v, int | float)]),
        st.integers(0, 300),
        st.integers(0, 2**31 - 1),
        st.floats(0, 1),
        st.floats(0, 1e38),
    ),
    min_size=1,
    max_size=2,
)


@settings(QUICK, max_examples=40)
@given(st.sampled_from(("plain", "kd", "tgeo", "rw", "dml")), NUMBERS)
def test_what_is_assembled_can_be_traced(digits_dir, teacher, name, changes):
    chosen = _changed(_digits(name, digits_dir, teacher), changes)
    run = _found(lambda: _assembled(chosen), changes)
    if run is None:
        return
    method, example = run.method, run.dataset.example
    variables = None if run.teacher is None else run.teacher.variables
    means = np.zeros((10, 10), np.float32)

    def of_one_step(seed: jax.Array) -> object:
        state = distill.init_state(method, seed, example, trained_teacher=variables)
        batches = [
            Batch(np.repeat(example, size, 0), np.zeros(size, np.int32))
            for size in (run.config.data.batch_size, min(run.config.meta.batch_size, 144))
        ]
        first = batches[0]._replace(ids_B=np.arange(len(batches[0].labels_B)))
        return distill.train_step(method, Teacher(variables, means))(state, first, batches[1])

    jax.eval_shape(of_one_step, np.uint32(0))


# The command line.

TEXTS = st.one_of(
    st.sampled_from(
        [
            "", "0", "-1", "1e400", "nan", "inf", "9" * 5000, "(", ")", "(1,", "1,2", "[1", "()",
            "None", "True", "true", "'", '"', "\\", "0x10", "1_0", "--", "=", "\ud800", "ü",
            "(" * 300, "-" * 3000 + "1", "[" * 3000, "('a',)", "{1: 2}", "{1, 2}", "b'x'", "1j",
            "__import__('os').abort()", "exit()", "$(exit)", "`exit`", "; exit", "../../x", "a.b",
        ]
    ),
    st.text(st.characters(exclude_characters="\0"), max_size=12),
    st.integers().map(str),
    st.floats().map(str),
)  # fmt: skip


def _of_command_line(*arguments: str) -> ConfigDict | None:
    """What the command makes of its arguments; None where it ends with a message."""
    values, said, argv = flags.FlagValues(), io.StringIO(), ["main", *arguments]
    own = types.SimpleNamespace(FLAGS=values, Error=flags.Error)
    with (
        mock.patch.object(commandline, "flags", own),
        mock.patch.object(sys, "argv", argv),  # config_flags looks there
        contextlib.redirect_stderr(said),
    ):
        try:
            holder = config_flags.DEFINE_config_dict(
                "config", configs.default(), flag_values=values
            )
        except config_flags.config_flags.FlagOrderError:
            return None  # of a file, as the commands have it, that comes with the parsing
        ended = False
        try:
            commandline._parse(argv)
        except SystemExit:
            ended = True
    assert ended == said.getvalue().startswith("error: "), said.getvalue()
    return None if ended else holder.value


def test_a_section_after_its_field_is_refused():
    assert _of_command_line("--config.ratio.wls.beta=1", "--config.ratio.wls={}") is None


def test_the_command_line_is_read_as_the_commands_do():
    found = _of_command_line("--config.train.epochs=3", "--config.loss.weights=(1.0,2)")
    assert (found.train.epochs, found.loss.weights) == (3, (1.0, 2))
    assert _of_command_line("--config.train.epochs=three") is None


@settings(QUICK, max_examples=200)
@given(st.dictionaries(st.sampled_from(PATHS), TEXTS, min_size=1, max_size=2))
@example({"data": "{1: 2}"})
def test_arguments_are_parsed_or_refused(changes):
    chosen = _of_command_line(*(f"--config.{path}={text}" for path, text in changes.items()))
    if chosen is None:
        return
    with contextlib.suppress(TgeoError):
        configs.check(chosen)


# What is nowhere to be found.

_CALLS = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "pickle.load"),
    *("pickle.loads", "pickle.Unpickler", "marshal.load", "marshal.loads", "shelve.open"),
    *("yaml.load", "joblib.load", "dill.load", "dill.loads", "cloudpickle.load"),
    *("cloudpickle.loads", "pandas.read_pickle", "subprocess.getoutput"),
    *("subprocess.getstatusoutput", "tempfile.mktemp"),
}
_ARGUMENTS = {"shell": False, "allow_pickle": False}  # these and no other value
SOURCES = sorted(
    path for folder in ("tgeo_jax", "experiments") for path in (ROOT / folder).rglob("*.py")
)


def _dangers(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            module = getattr(node, "module", None)
            known = {name.partition(".")[0] for name in ([module] if module else names)}
            found += sorted(known & {"pickle", "marshal", "shelve", "dill", "joblib"})
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given_arguments = {each.arg: each.value for each in node.keywords}
        if name in _CALLS:
            found.append(name)
        if name == "torch.load":
            value = given_arguments.get("weights_only")
            if not (isinstance(value, ast.Constant) and value.value is True):
                found.append("torch.load without weights_only=True")
        for argument, only in _ARGUMENTS.items():
            value = given_arguments.get(argument)
            if value is not None and not (isinstance(value, ast.Constant) and value.value is only):
                found.append(f"{argument}={ast.unparse(value)}")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_is_unpickled_evaluated_or_given_to_a_shell(path: pathlib.Path):
    assert _dangers(path.read_text()) == []


@pytest.mark.parametrize(
    ("source", "danger"),
    [
        ("import pickle", "pickle"),
        ("from pickle import loads", "pickle"),
        ("np.load(path, allow_pickle=True)", "allow_pickle=True"),
        ("np.load(path, allow_pickle=flag)", "allow_pickle=flag"),
        ("torch.load(path)", "torch.load without weights_only=True"),
        ("torch.load(path, weights_only=False)", "torch.load without weights_only=True"),
        ("os.system(name)", "os.system"),
        ("subprocess.run(name, shell=True)", "shell=True"),
        ("eval(text)", "eval"),
        ("exec(text)", "exec"),
    ],
)
def test_what_would_be_found(source, danger):
    assert _dangers(source) == [danger]


def test_what_is_harmless():
    assert _dangers("torch.load(p, weights_only=True); model.eval(); np.load(p)") == []


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/b", "..\\x", "x" * 300])
def test_the_name_of_stored_logits_leads_out_of_no_folder(name):
    chosen = configs.default()
    chosen.role.name, chosen.teacher.workdir = "cached", "runs/teacher"
    chosen.role.cached.name = name
    with pytest.raises(TgeoError, match=r"^role\.cached\.name=.*: must be the name of a file"):
        configs.check(chosen)
