"""The configuration: its fields, their defaults, and what is wrong with a given one.

Everything chosen by name (loss, ratio, student, teacher) has a `name` and one section for each
value it can take, filled from that function's keyword-only arguments or that network's fields; so
a new value brings its own section, and switching by name on the command line needs nothing else.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from tgeo_jax import choices, losses, margins, ratios, roles, values
from tgeo_jax.data import options
from tgeo_jax.errors import ConfigError, nearest
from tgeo_jax.models.build import MODELS, default_options
from tgeo_jax.rules import RULES


def default() -> ConfigDict:
    """Every field with its default: plain knowledge distillation with the CIFAR recipe's values.

    Examples:
        >>> default().loss.kl.temperature
        4.0
    """
    return ConfigDict(
        {
            "seed": 0,  # the first seed; a run trains seeds seed, seed + 1, ...
            "seeds": 1,  # how many of them, in one program
            "data": {
                "name": "digits",
                "dir": "",  # where TFDS keeps prepared datasets; empty: TFDS's own default
                "validation_fraction": 0.1,  # held out of the training split
                "split_seed": 0,
                "label_noise": 0.0,  # share of training labels replaced by another class
                "outliers": 0.0,  # share of training images replaced by Gaussian noise
                "fraction": 1.0,  # of the training examples that are kept
                "imbalance": 1.0,  # long tail: the first class's examples over the last's
                "part": "all",  # of what is not held out: "teacher" and "student" are disjoint
                "teacher_fraction": 0.7,  # the share of part "teacher"
                "oversample": False,  # repeat training examples until classes are equal
                "min_count": 1,  # categorical tables only: rarer values share an id
                "hash_buckets": options.HASH_BUCKETS,  # streamed categorical tables only
                # For normalisation by channel: empty for mean and deviation of the training pixels.
                # Of a numeric table by feature: empty for its minimum and range.
                "mean": (),
                "std": (),
                "crop_padding": 0,  # random crop after zero padding by this many pixels
                "flip": False,  # random horizontal flip
                "cutout": 0,  # side in pixels of a square without content
                "flip_average": True,  # in verification: embeddings of image + mirror image
                "randaugment_layers": 0,  # random operations on every image
                "randaugment_magnitude": 9.0,  # in [0, 10]
                "pipeline": "resident",  # on the device; or "stream": read as needed
                "image_size": 224,  # stream only: side of the random resized crops
                "workers": 0,  # stream only: processes that decode; 0: threads
                "max_corrupt": 10,  # stream only: images of a split that may fail to decode
                "batch_size": 64,
                "eval_batch_size": 1024,
            },
            "student": _models("cnn"),
            "teacher": {
                **_models("mlp"),
                "workdir": "",  # the finished run that trained it
                "which": "last",  # its last or its best (by validation) parameters
            },
            "loss": {
                **_axis(losses.SOFT_LOSSES, "kl"),  # or several, joined: "kl+cmkd"
                "weights": (),  # of those several; empty: 1 each
                "hard": "cross_entropy",  # the margin losses need networks with a cosine head
                **_options(margins.HARD_LOSSES),
            },
            "ratio": _axis(ratios.RATIOS, "constant"),
            "role": _axis(roles.ROLES, "frozen"),
            "optimizer": {
                **_optimizer_section("sgd", learning_rate=0.05, weight_decay=5e-4),
                # A step touches only the rows of embedding tables that its batches use; the others
                # keep their moments, and weight decay does not reach them.
                "lazy_rows": False,
            },
            "meta": {
                "order": "student_first",
                "every": 1,  # the hypergradient is taken every this many steps
                "accumulate": 1,  # so many of them are averaged for one update
                "outer_soft": 0.0,  # share of the soft loss in the outer loss
                "batch_size": 64,  # of the validation batch
                "estimator": "mixed",
                "optimizer": _optimizer_section("adamw", learning_rate=1e-3, weight_decay=1e-4),
            },
            "train": {
                "epochs": 240,
                "steps_per_dispatch": 100,  # steps in one compiled program
                "eval_every": 1,  # epochs between evaluations, which also log and may save
                "checkpoint_every": 1,  # evaluations between checkpoints
                "select_by": "accuracy",  # the validation figure that chooses the best epoch
                "patience": 0,  # evaluations without a new best after which to stop; 0: never
            },
            "mesh": {
                "seed": 1,  # devices along the seed axis; the rest share the batch
                # Of those, how many keep a frozen teacher's parameters and a student's embedding
                # tables in parts.
                "model": 1,
                # Parts of a batch that BatchNorm sees by themselves: 1 as under jax.jit, 0: one for
                # each device that shares the batch, as under jax.pmap.
                "replicas": 1,
            },
            "precision": "float32",  # of the networks' computation; or "bfloat16"
            "remat": False,  # recompute the student's blocks in the backward pass, not keep them
            "profile": "",  # folder for a trace of some dispatches, which xprof opens; empty: none
            "generation": 0,  # of a chain of runs; each has random numbers of its own
        }
    )


def check(config: ConfigDict) -> None:
    """Checks a configuration by itself, before data or devices are touched.

    Raises:
        ConfigError: the first thing wrong, naming field, value and what would be right.

    Examples:
        >>> config = default()
        >>> config.data.validation_fraction = 1.5
        >>> check(config)
        Traceback (most recent call last):
        ...
        tgeo_jax.errors.ConfigError: data.validation_fraction=1.5: must lie strictly in (0, 1)
    """
    _check_fields(config.to_dict(), default().to_dict(), "")
    for field, (is_right, what) in RULES.items():
        value = _get(config, field)
        if not is_right(value):
            if isinstance(what, str):
                problem = f"must {what}"
            else:  # of names joined by "+", the first that is unknown
                part = next((part for part in value.split("+") if part not in what), value)
                problem = f"unknown{nearest(part, what)}"
            raise ConfigError(f"{field}={values.shown(value)}: {problem}")
    choices.check(config)
    options.check(config.data)
    _check_stream(config)
    _check_schedule(config, "optimizer")
    _check_schedule(config, "meta.optimizer")
    if config.seed + config.seeds > 2**32:
        raise ConfigError(
            f"seeds={config.seeds}: seeds {config.seed}, ... must stay below 2**32 = {2**32}"
        )
    if config.seeds % config.mesh.seed:
        raise ConfigError(
            f"mesh.seed={config.mesh.seed}: must divide seeds={config.seeds}, so that every "
            "device along that axis trains the same number of seeds"
        )
    values.check_finite(config.to_dict())


def unknown_field(config: ConfigDict, path: str) -> str | None:
    """What to say of a dotted field path that the configuration lacks; None where it has it.

    Examples:
        >>> unknown_field(default(), "train.epochz")
        "train.epochz: no such field; did you mean 'train.epochs'?"
    """
    section: Any = config
    parts = path.split(".")
    for depth, part in enumerate(parts):
        if not isinstance(section, ConfigDict):
            return f"{path}: {'.'.join(parts[:depth])} is a value, not a section"
        if part not in section:
            prefix = "".join(f"{p}." for p in parts[:depth])
            known = [f"{prefix}{name}" for name in section]
            return f"{path}: no such field{nearest(prefix + part, known)}"
        section = section[part]
    return None


def to_json(config: ConfigDict) -> str:
    """The configuration as readable JSON, tuples as lists.

    Examples:
        >>> json.loads(to_json(default()))["data"]["name"]
        'digits'
    """
    return json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"


def differences(old: dict, new: dict, prefix: str = "") -> list[str]:
    """Fields in which two configurations (as loaded from JSON) differ, as `field: old -> new`.

    Examples:
        >>> differences({"a": {"b": 1}}, {"a": {"b": 2}})
        ['a.b: 1 -> 2']
    """
    found = []
    for name in sorted(old.keys() | new.keys()):
        a, b = old.get(name), new.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{prefix}{name}.")
        elif a != b:
            found.append(f"{prefix}{name}: {json.dumps(a)} -> {json.dumps(b)}")
    return found


def options_of(section: ConfigDict) -> dict[str, Any]:
    """Keyword arguments chosen by a section with a name, such as `config.ratio`.

    Examples:
        >>> options_of(default().ratio)
        {'alpha': 0.9, 'warmup_epochs': 0}
    """
    return section[section.name].to_dict() if section.name in section else {}


def _axis(table: dict[str, Callable], name: str) -> dict[str, Any]:
    return {"name": name, **_options(table)}


def _options(table: dict[str, Callable]) -> dict[str, dict[str, Any]]:
    sections = {
        key: {
            # A flag needs a type to be parsed by, and "chosen for you" always stands for a number.
            p.name: placeholder(float) if p.default is None else p.default
            for p in inspect.signature(function).parameters.values()
            if p.kind is inspect.Parameter.KEYWORD_ONLY
        }
        for key, function in table.items()
    }
    return sections


def _models(name: str) -> dict[str, Any]:
    options = {key: default_options(key) for key in MODELS}
    return {"name": name, **{key: value for key, value in options.items() if value}}


def _optimizer_section(name: str, *, learning_rate: float, weight_decay: float) -> dict[str, Any]:
    return {
        "name": name,
        "learning_rate": learning_rate,
        "momentum": 0.9,  # sgd only
        "nesterov": False,  # sgd only
        "weight_decay": weight_decay,
        "clip_norm": 0.0,  # 0: no clipping
        "schedule": "constant",
        "drop_epochs": (),  # for schedule "step": the rate is multiplied at these epochs
        "drop_factor": 0.1,
        "warmup_epochs": 0.0,
    }


def _get(config: ConfigDict, path: str) -> Any:
    value: Any = config
    for part in path.split("."):
        value = value[part]
    return value


def _check_fields(given: dict, known: dict, prefix: str) -> None:
    for name, value in given.items():
        path = f"{prefix}{name}"
        if name not in known:
            raise ConfigError(
                f"{path}={values.shown(value)}: no such field{nearest(str(name), known)}"
            )
        if isinstance(known[name], dict) != isinstance(value, dict):
            expected = "a section" if isinstance(known[name], dict) else "a value"
            raise ConfigError(f"{path}={values.shown(value)}: must be {expected}")
        if isinstance(value, dict):
            _check_fields(value, known[name], f"{path}.")
        else:
            values.check(path, value, known[name])
    for name in known:
        if name not in given:
            raise ConfigError(f"{prefix}{name}: missing; start from tgeo_jax.config.default()")


def _check_stream(config: ConfigDict) -> None:
    if config.data.pipeline == "resident":
        return
    for field, value, only in (
        ("seeds", config.seeds, 1),
        ("data.imbalance", config.data.imbalance, 1.0),
        ("data.label_noise", config.data.label_noise, 0.0),
        ("data.outliers", config.data.outliers, 0.0),
    ):
        if value != only:
            raise ConfigError(
                f"{field}={value}: must be {only} with data.pipeline='stream'"
                + ("; start one run for each seed" if field == "seeds" else "")
            )
    if config.role.name == "cached":
        raise ConfigError(
            "role.name='cached': stored logits need data.pipeline='resident'; use 'frozen'"
        )


def _check_schedule(config: ConfigDict, path: str) -> None:
    section = _get(config, path)
    if section.warmup_epochs >= config.train.epochs:
        raise ConfigError(
            f"{path}.warmup_epochs={section.warmup_epochs}: must be less than "
            f"train.epochs={config.train.epochs}, or the learning rate is never reached"
        )
    if section.schedule == "step" and any(e <= section.warmup_epochs for e in section.drop_epochs):
        raise ConfigError(
            f"{path}.drop_epochs={tuple(section.drop_epochs)}: must come after "
            f"{path}.warmup_epochs={section.warmup_epochs}"
        )
    if section.nesterov and (section.name != "sgd" or section.momentum == 0):
        raise ConfigError(
            f"{path}.nesterov=True: must go with {path}.name='sgd' and {path}.momentum > 0"
        )
