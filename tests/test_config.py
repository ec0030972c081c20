import copy
import json
import re

import pytest
from ml_collections import ConfigDict

from tgeo_jax import config as configs
from tgeo_jax import errors, rules
from tgeo_jax.errors import ConfigError

# One value for every rule, of the right type, that breaks this rule and no earlier one.
BAD_OPTIMIZER = {
    "name": "zzz",
    "learning_rate": 0.0,
    "momentum": 1.0,
    "weight_decay": -1e-4,
    "clip_norm": -1.0,
    "schedule": "zzz",
    "drop_epochs": (20, 10),
    "drop_factor": 0.0,
    "warmup_epochs": -1.0,
}
BAD = {
    "seed": -1,
    "seeds": 0,
    "data.validation_fraction": 1.0,
    "data.split_seed": -1,
    "data.label_noise": 1.0,
    "data.outliers": 1.0,
    "data.fraction": 0.0,
    "data.imbalance": 0.5,
    "data.part": "zzz",
    "data.teacher_fraction": 1.0,
    "data.min_count": 0,
    "data.mean": (float("nan"),),
    "data.std": (0.5, 0.0),
    "data.crop_padding": -1,
    "data.cutout": -1,
    "data.randaugment_layers": -2,
    "data.randaugment_magnitude": 10.5,
    "data.pipeline": "zzz",
    "data.hash_buckets": 1,
    "data.image_size": 0,
    "data.workers": -1,
    "data.max_corrupt": -1,
    "precision": "zzz",
    "profile": "a\0b",
    "data.batch_size": 0,
    "data.eval_batch_size": -5,
    "student.name": "zzz",
    "teacher.name": "zzz",
    "teacher.which": "zzz",
    "loss.name": "zzz",
    "loss.weights": (1.0, -1.0),
    "loss.hard": "zzz",
    "ratio.name": "zzz",
    "role.name": "zzz",
    "meta.order": "zzz",
    "meta.every": 0,
    "meta.accumulate": 0,
    "meta.outer_soft": 1.5,
    "meta.batch_size": 0,
    "meta.estimator": "zzz",
    "train.epochs": 0,
    "train.steps_per_dispatch": 0,
    "train.eval_every": 0,
    "train.checkpoint_every": 0,
    "train.select_by": "zzz",
    "train.patience": -1,
    "mesh.seed": 0,
    "mesh.model": 0,
    "mesh.replicas": -1,
    "generation": -1,
    **{f"optimizer.{name}": value for name, value in BAD_OPTIMIZER.items()},
    **{f"meta.optimizer.{name}": value for name, value in BAD_OPTIMIZER.items()},
}
# The fix that the message must offer, for a sample of the rules.
FIX = {
    "seeds": "positive integer",
    "data.validation_fraction": "(0, 1)",
    "data.part": "all, teacher, student",
    "loss.name": "kl",
    "loss.weights": "hold finite numbers >= 0",
    "ratio.name": "constant, weighted",
    "role.name": "alone, frozen, cached, several, dml, trikd",
    "student.name": "mlp, cnn",
    "teacher.which": "last, best",
    "meta.accumulate": "positive integer",
    "meta.outer_soft": "lie in [0, 1]",
    "meta.estimator": "mixed, reverse, finite_difference",
    "optimizer.name": "sgd, adam, adamw",
    "optimizer.momentum": "[0, 1)",
    "optimizer.drop_epochs": "increase",
    "meta.optimizer.schedule": "constant, step, cosine",
    "generation": "integer >= 0",
    "train.select_by": "accuracy, macro_f1, auc, cross_entropy",
    "train.patience": "integer >= 0",
}


def changed(changes):
    """A valid configuration with some fields set, whatever their type."""
    plain = configs.default().to_dict()
    for path, value in ({"role.name": "alone"} | changes).items():
        *sections, field = path.split(".")
        section = plain
        for name in sections:
            section = section[name]
        section[field] = value
    return ConfigDict(plain)


def test_every_rule_has_its_row_in_the_table():
    assert set(BAD) == set(rules.RULES)


def test_the_configuration_that_the_table_changes_is_valid():
    configs.check(changed({}))


@pytest.mark.parametrize("field", BAD)
def test_a_broken_rule_names_field_and_value(field):
    said = re.escape(f"{field}={BAD[field]!r}: ") + "(must |unknown; )"
    with pytest.raises(ConfigError, match=f"^{said}"):
        configs.check(changed({field: BAD[field]}))


@pytest.mark.parametrize("field", FIX)
def test_a_broken_rule_says_what_would_be_right(field):
    with pytest.raises(ConfigError, match=f": (must .*|unknown; known: ){re.escape(FIX[field])}"):
        configs.check(changed({field: BAD[field]}))


@pytest.mark.parametrize(
    "field",
    [
        "data.validation_fraction",
        "data.label_noise",
        "optimizer.learning_rate",
        "meta.outer_soft",
    ],
)
def test_nan_breaks_a_rule(field):
    with pytest.raises(ConfigError, match=f"^{re.escape(field)}=nan: must "):
        configs.check(changed({field: float("nan")}))


@pytest.mark.parametrize("field", ["optimizer.learning_rate", "optimizer.weight_decay"])
def test_infinity_breaks_a_rule(field):
    with pytest.raises(ConfigError, match=f"^{re.escape(field)}=inf: must be a finite"):
        configs.check(changed({field: float("inf")}))


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_a_loss_weight_that_is_not_finite_is_named(weight):
    said = rf"^loss\.weights=\(1\.0, {weight}\): must hold finite numbers >= 0"
    with pytest.raises(ConfigError, match=said):
        configs.check(changed({"loss.weights": (1.0, weight)}))


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_outer_loss_may_be_hard_or_soft_alone(share):
    configs.check(changed({"meta.outer_soft": share}))


@pytest.mark.parametrize(
    ("field", "value"), [("data.split_seed", -1), ("data.split_seed", 2**32), ("seed", 2**32)]
)
def test_a_seed_that_32_bits_cannot_hold_is_named(field, value):
    # NumPy's and JAX's generators refuse it too, but only later and without the field's name.
    with pytest.raises(ConfigError, match=f"^{re.escape(field)}={value}: must "):
        configs.check(changed({field: value}))


def test_a_drop_at_epoch_zero_is_told_to_be_positive():
    # (0, 5) does increase: that cannot be what is wrong with it.
    with pytest.raises(ConfigError, match=r"drop_epochs=\(0, 5\): must .*(positive|> 0)"):
        configs.check(changed({"optimizer.drop_epochs": (0, 5)}))


@pytest.mark.parametrize(
    ("field", "nearest"),
    [
        ("train.epochz", "epochs"),
        ("data.batchsize", "batch_size"),
        ("loss.kl.temprature", "temperature"),
        ("optimiser", "optimizer"),
        ("student.cnn.widht", "widths"),
    ],
)
def test_an_unknown_field_is_answered_with_the_nearest_name(field, nearest):
    said = rf"^{re.escape(field)}=1: no such field; did you mean '{nearest}'\?"
    with pytest.raises(ConfigError, match=said):
        configs.check(changed({field: 1}))


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("train.epochs", "ten", "an integer"),
        ("data.batch_size", 64.0, "an integer"),
        ("seeds", True, "an integer"),
        ("optimizer.learning_rate", "0.1", "a number"),
        ("optimizer.learning_rate", None, "a number"),
        ("optimizer.nesterov", 1, "true or false"),
        ("data.name", 5, "text"),
        ("optimizer.drop_epochs", ("10",), "a tuple of numbers"),
        ("optimizer.drop_epochs", 10, "a tuple"),
        ("loss.weights", (1.0, True), "a tuple of numbers"),
        ("loss.cmkd.rank_strength", "0.3", "a number, or None"),
        ("loss.cmkd.rank_strength", True, "a number, or None"),
        ("role.several.workdirs", ("runs/a", 1), "a tuple of texts"),
        ("role.several.workdirs", "runs/a", "a tuple"),
        ("role.trikd.anchor_student", ("1",), "a tuple of numbers"),
        ("generation", 0.5, "an integer"),
        ("data.batch_size", {"train": 1}, "a value"),
        ("data", 3, "a section"),
    ],
)
def test_a_value_of_the_wrong_kind_is_told_the_right_one(field, value, expected):
    said = re.escape(f"{field}={value!r}: must be {expected}")
    with pytest.raises(ConfigError, match=f"^{said}"):
        configs.check(changed({field: value}))


def test_a_whole_number_will_do_for_a_number():
    configs.check(changed({"optimizer.learning_rate": 1, "loss.kl.temperature": 4}))


def test_a_missing_field_is_named():
    config = changed({})
    del config.data["batch_size"]
    with pytest.raises(ConfigError, match=r"^data\.batch_size: missing"):
        configs.check(config)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_a_temperature_that_is_not_positive_and_finite_is_named(temperature):
    said = rf"^loss\.kl\.temperature={temperature}: must be a finite number > 0"
    with pytest.raises(ConfigError, match=said):
        configs.check(changed({"loss.kl.temperature": temperature}))


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("constant", "alpha", 1.5),
        ("tgeo", "initial_ratio", 0.0),
        ("tgeo", "hidden", (0,)),
        ("tgeo", "relations", "ful"),
    ],
)
def test_a_bad_option_of_the_chosen_ratio_is_a_configuration_error(name, option, value):
    with pytest.raises(ConfigError, match=f"{option}={re.escape(repr(value))}"):
        configs.check(changed({"ratio.name": name, f"ratio.{name}.{option}": value}))


def test_options_of_a_ratio_that_is_not_chosen_do_not_matter():
    configs.check(changed({"ratio.name": "tgeo", "ratio.constant.alpha": 1.5}))


def test_a_distillation_without_a_teacher_is_told_how_to_get_one():
    said = r"^teacher\.workdir='': role\.name='frozen' needs a trained teacher.*role\.name='alone'"
    with pytest.raises(ConfigError, match=said):
        configs.check(configs.default())


@pytest.mark.parametrize(
    ("field", "given", "nearest"),
    [("student.name", "cnnn", "cnn"), ("role.name", "froze", "frozen")],
)
def test_an_unknown_name_is_answered_with_the_nearest(field, given, nearest):
    with pytest.raises(ConfigError, match=rf"^{field}='{given}': .*did you mean '{nearest}'\?"):
        configs.check(changed({field: given}))


@pytest.mark.parametrize("field", ["student.cnn.widths", "teacher.mlp.hidden"])
@pytest.mark.parametrize("widths", [(0,), (16, -1), (2.5,)])
def test_widths_of_a_chosen_network_must_be_positive_integers(field, widths):
    said = re.escape(f"{field}={widths}: must hold positive integers")
    with pytest.raises(ConfigError, match=f"^{said}"):
        configs.check(changed({field: widths}))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": 2**32 - 2, "seeds": 3}, r"^seeds=3: .*below 2\*\*32"),
        ({"train.epochs": 5, "optimizer.warmup_epochs": 5.0}, r"^optimizer\.warmup_epochs=5\.0"),
        (
            {
                "optimizer.schedule": "step",
                "optimizer.drop_epochs": (2, 9),
                "optimizer.warmup_epochs": 3.0,
            },
            r"^optimizer\.drop_epochs=\(2, 9\): must come after optimizer\.warmup_epochs=3\.0",
        ),
        ({"meta.optimizer.nesterov": True}, r"^meta\.optimizer\.nesterov=True: must go with"),
        ({"optimizer.nesterov": True, "optimizer.momentum": 0.0}, r"^optimizer\.nesterov=True"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        configs.check(changed(changes))


def test_prequential_needs_the_mixed_estimator():
    config = changed({"meta.order": "prequential", "meta.estimator": "reverse"})
    with pytest.raises(ConfigError, match=r"^meta\.estimator='reverse': must be 'mixed' with"):
        configs.check(config)


def test_the_seed_axis_must_divide_the_seeds():
    with pytest.raises(ConfigError, match=r"^mesh\.seed=2: must divide seeds=3"):
        configs.check(changed({"seeds": 3, "mesh.seed": 2}))


def test_a_configuration_survives_json():
    config = changed({"optimizer.drop_epochs": (10, 20), "ratio.tgeo.hidden": (8, 4), "seeds": 3})
    read = ConfigDict(json.loads(configs.to_json(config)))
    configs.check(read)
    assert configs.to_json(read) == configs.to_json(config)


def test_json_holds_the_values_under_their_sections():
    read = json.loads(configs.to_json(changed({"data.flip": True, "loss.kl.temperature": 2.5})))
    assert (read["data"]["flip"], read["loss"]["kl"]["temperature"]) == (True, 2.5)


def test_equal_configurations_have_no_differences():
    plain = json.loads(configs.to_json(configs.default()))
    assert configs.differences(plain, copy.deepcopy(plain)) == []


def test_differences_name_changed_new_and_lost_fields():
    old = {"a": {"b": 1, "gone": "x"}, "same": [1, 2]}
    new = {"a": {"b": 2}, "same": [1, 2], "new": True}
    assert configs.differences(old, new) == [
        "a.b: 1 -> 2",
        'a.gone: "x" -> null',
        "new: null -> true",
    ]


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("train.epochz", r"train\.epochz: no such field; did you mean 'train\.epochs'\?"),
        ("seed.first", r"seed\.first: seed is a value, not a section"),
        ("mesh.qqq", r"mesh\.qqq: no such field; known: mesh\.model, mesh\.replicas, mesh\.seed"),
    ],
)
def test_unknown_field_says_where_a_path_leaves_the_configuration(path, said):
    assert re.fullmatch(said, configs.unknown_field(configs.default(), path))


@pytest.mark.parametrize("path", ["loss.kl.temperature", "optimizer"])
def test_unknown_field_has_nothing_to_say_of_a_known_path(path):
    assert configs.unknown_field(configs.default(), path) is None


def test_options_are_those_of_the_chosen_value():
    config = changed({"ratio.name": "tgeo", "ratio.tgeo.relations": "edges"})
    assert configs.options_of(config.ratio)["relations"] == "edges"
    assert "alpha" not in configs.options_of(config.ratio)


def test_the_default_does_not_remember_changes():
    configs.default().data.batch_size = 1
    assert configs.default().data.batch_size == 64


@pytest.mark.parametrize(
    ("name", "said"),
    [("temprature", "; did you mean 'temperature'?"), ("zzz", "; known: temperature, alpha")],
)
def test_nearest_suggests_a_near_name_or_lists_the_known_ones(name, said):
    assert errors.nearest(name, ["temperature", "alpha"]) == said


@pytest.mark.parametrize(
    "error",
    [errors.ConfigError, errors.DataError, errors.CheckpointError, errors.TrainingError],
)
def test_commands_can_catch_every_error_of_the_package_at_once(error):
    with pytest.raises(errors.TgeoError, match="what to do"):
        raise error("what to do")


def test_a_configuration_error_is_a_value_error():
    assert issubclass(errors.ConfigError, ValueError)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("seeds", 2, "seeds=2: must be 1 with data.pipeline='stream'; start one run"),
        ("data.imbalance", 10.0, "data.imbalance=10.0: must be 1.0 with data.pipeline='stream'"),
        ("data.label_noise", 0.1, "data.label_noise=0.1: must be 0.0 with data.pipeline='stream'"),
        ("data.outliers", 0.1, "data.outliers=0.1: must be 0.0 with data.pipeline='stream'"),
        ("role.name", "cached", "role.name='cached': stored logits need data.pipeline='resident'"),
    ],
)
def test_what_a_stream_cannot_do_is_refused(field, value, said):
    chosen = changed({"teacher.workdir": "runs/t", field: value})
    configs.check(chosen)
    chosen.data.pipeline = "stream"
    with pytest.raises(ConfigError, match=f"^{re.escape(said)}"):
        configs.check(chosen)


def test_networks_without_options_have_no_section_and_are_chosen_by_name_alone():
    chosen = changed({"student.name": "resnet8x4", "teacher.name": "vgg13"})
    assert configs.options_of(chosen.student) == {}
    assert "resnet8x4" not in chosen.student
    configs.check(chosen)


TABLES = [
    ("nsl_kdd", "crop_padding", 4),
    ("frappe", "flip", True),
    ("criteo", "cutout", 2),
    ("avazu", "randaugment_layers", 1),
    ("movielens", "image_size", 32),
    ("power_attack_binary", "pipeline", "stream"),
    ("frappe", "hash_buckets", 100),
    ("digits", "hash_buckets", 100),
    ("frappe", "mean", (0.5,)),
    ("frappe", "std", (0.5,)),
    ("nsl_kdd", "min_count", 2),
    ("digits", "min_count", 2),
]


@pytest.mark.parametrize(("name", "field", "value"), TABLES)
def test_what_does_nothing_for_a_kind_of_dataset_is_refused_with_the_reason(name, field, value):
    configs.check(changed({"data.name": name}))
    with pytest.raises(ConfigError, match=rf"^data\.{field}=.*: must be .* with .*, wh(ose|ich) "):
        configs.check(changed({"data.name": name, f"data.{field}": value}))


@pytest.mark.parametrize(("field", "value"), [("part", "teacher"), ("oversample", True)])
def test_a_stream_has_no_parts_and_repeats_nothing(field, value):
    changes = {"data.name": "imagenet2012", "data.pipeline": "stream", f"data.{field}": value}
    with pytest.raises(ConfigError, match=rf"^data\.{field}=.*stream"):
        configs.check(changed(changes))


def test_a_field_whose_name_is_a_number_is_refused_like_any_other():
    strange = configs.default()
    strange.data = ConfigDict({0: 1})  # as --config.data={0:1} gives it
    with pytest.raises(ConfigError, match=r"^data\.0=1: no such field"):
        configs.check(strange)
