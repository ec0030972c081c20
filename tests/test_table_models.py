"""Networks for rows of tables, against PyTorch and NumPy with the same weights, in float64."""

from __future__ import annotations

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tgeo_jax import assemble, models, networks, teachers
from tgeo_jax import config as configs
from tgeo_jax.data import sources
from tgeo_jax.errors import ConfigError
from tgeo_jax.models import click, tables
from tgeo_jax.models.build import default_options

VOCABULARY = (3, 5, 2)
ROWS, FIELDS = sum(VOCABULARY), len(VOCABULARY)
CLICK = ("wide_deep", "deepfm", "dcn_v2")
TINY = {"embedding": 4, "hidden": (5, 3)}


def tiny(name):
    return {"layers": 1, "width": 8, "heads": 2} if name == "row_encoder" else TINY


def indices(batch=6, seed=0, vocabulary=VOCABULARY):
    random = np.random.RandomState(seed)
    return np.stack([random.randint(0, size, batch) for size in vocabulary], 1).astype(np.int32)


def numbers(batch=6, features=4):
    return np.random.RandomState(0).rand(batch, features)


def made(name, inputs, num_classes=2, **options):
    """A network and random weights in float64."""
    module = models.build(name, num_classes, **options)
    shapes = jax.eval_shape(module.init, jax.random.key(0), inputs)
    random = np.random.RandomState(1)
    return module, jax.tree.map(lambda leaf: 0.5 * random.randn(*leaf.shape), shapes["params"])


def logits_of(module, params, inputs):
    return np.asarray(jax.jit(module.apply)({"params": params}, inputs))


def count(name, num_classes=2, inputs=None, **options):
    module = models.build(name, num_classes, **options)
    inputs = indices() if inputs is None else inputs
    variables = jax.eval_shape(module.init, jax.random.key(0), inputs)
    assert set(variables) == {"params"}
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables))


# Sizes.


def tower(first, widths):
    return sum((a + 1) * b for a, b in itertools.pairwise((first, *widths)))


@pytest.mark.parametrize("hidden", [(64, 64), (64, 32), (7,)])
@pytest.mark.parametrize("width", [16, 3])
def test_parameters_of_the_click_networks_in_closed_form(width, hidden):
    options = {"vocabulary": VOCABULARY, "embedding": width, "hidden": hidden}
    flat = FIELDS * width
    rows, deep, last = ROWS * width, tower(flat, hidden), hidden[-1] + 1
    assert count("wide_deep", **options) == rows + ROWS + deep + last
    assert count("deepfm", **options) == rows + ROWS + deep + last
    for layers in (1, 3):
        cross = layers * flat * (flat + 1)
        found = count("dcn_v2", cross_layers=layers, **options)
        assert found == rows + cross + deep + flat + last


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_parameters_of_the_row_encoder_in_closed_form(norm):
    width, features, classes = 8, 41, 5
    attention = (width + 1) * 3 * width + (width + 1) * width
    feed_forward = (width + 1) * 4 * width + (4 * width + 1) * width
    block = attention + feed_forward + 4 * width
    for layers in (1, 4):
        options = {"layers": layers, "width": width, "heads": 2, "norm": norm}
        last = width + (width + 1) * classes + (2 * width if norm == "pre" else 0)
        found = count("row_encoder", classes, numbers(2, features), **options)
        assert found == 2 * features * width + layers * block + last
        found = count("row_encoder", classes, vocabulary=VOCABULARY, **options)
        assert found == ROWS * width + layers * block + last


def test_defaults_are_a_small_student():
    assert default_options("row_encoder")["layers"] == 4
    for name in CLICK:
        assert default_options(name)["embedding"] == 16
        assert default_options(name)["hidden"] == (64, 32)
    for name in models.TABLES:
        section = configs.default().student[name].to_dict()
        assert section == default_options(name)
        assert not {"vocabulary", "held", "remat", "dtype"} & set(section)


# Values.


def by_torch(params, names, x, activation):
    torch = pytest.importorskip("torch")
    for name in names:
        layer = torch.nn.functional.linear
        kernel, bias = (torch.tensor(params[name][part]) for part in ("kernel", "bias"))
        x = layer(x, kernel.T, bias)
        x = activation(x) if activation else x
    return x


@pytest.mark.parametrize("name", CLICK)
def test_click_networks_are_those_of_their_papers(name, x64):
    torch = pytest.importorskip("torch")
    inputs = indices()
    module, params = made(name, inputs, vocabulary=VOCABULARY, **TINY)
    # A table for each field, as most implementations have it.
    cuts = np.cumsum(VOCABULARY)[:-1]
    columns = torch.tensor(inputs, dtype=torch.long).T

    def looked_up(table):
        parts = np.split(params[table]["rows"], cuts)
        each = zip(columns, parts, strict=True)
        return torch.stack(
            [torch.nn.functional.embedding(ids, torch.tensor(part)) for ids, part in each], 1
        )

    v = looked_up("table")  # [B, F, D]
    flat = v.flatten(1)
    deep = by_torch(params, ("deep_0", "deep_1"), flat, torch.relu)
    if name == "dcn_v2":
        x = flat
        for index in range(3):
            x = flat * by_torch(params, (f"cross_{index}",), x, None) + x
        z = by_torch(params, ("head",), torch.cat([x, deep], 1), None)[:, 0]
    else:
        z = by_torch(params, ("head",), deep, None)[:, 0] + looked_up("wide").sum((1, 2))
    if name == "deepfm":
        for f, g in itertools.combinations(range(FIELDS), 2):
            z = z + (v[:, f] * v[:, g]).sum(1)
    found = logits_of(module, params, inputs)
    np.testing.assert_array_equal(found[:, 0], 0)
    np.testing.assert_allclose(found[:, 1], z.numpy(), rtol=1e-10)


def test_two_logits_make_the_sigmoid_and_the_log_loss(x64):
    inputs, labels = indices(), np.array([0, 1, 1, 0, 1, 0])
    module, params = made("deepfm", inputs, vocabulary=VOCABULARY, **TINY)
    logits = logits_of(module, params, inputs)
    p = 1 / (1 + np.exp(-logits[:, 1]))
    np.testing.assert_allclose(jax.nn.softmax(logits)[:, 1], p, rtol=1e-12)
    log_loss = -(labels * np.log(p) + (1 - labels) * np.log(1 - p))
    found = -jax.nn.log_softmax(logits)[np.arange(6), labels]
    np.testing.assert_allclose(found, log_loss, rtol=1e-10)


def test_the_sum_over_pairs_is_that_over_all_pairs(x64):
    rows = np.random.RandomState(2).randn(4, 7, 3)
    expected = [
        sum(row[f] @ row[g] for f, g in itertools.combinations(range(7), 2)) for row in rows
    ]
    np.testing.assert_allclose(click.pairs(jnp.asarray(rows)), expected, rtol=1e-12)


def torch_encoder(params, layers, heads, norm):
    """`torch.nn.TransformerEncoder` layers with our weights."""
    torch = pytest.importorskip("torch")
    width = params["cls_token"].shape[-1]
    made = []
    for index in range(layers):
        ours = params[f"blocks_{index}"]
        layer = torch.nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, activation="gelu", layer_norm_eps=1e-6,
            batch_first=True, norm_first=norm == "pre", dtype=torch.float64,
        )  # fmt: skip
        state = {}
        for theirs, mine in (
            ("self_attn.in_proj_", ours["attn"]["qkv"]),
            ("self_attn.out_proj.", ours["attn"]["proj"]),
            ("linear1.", ours["mlp"]["fc1"]),
            ("linear2.", ours["mlp"]["fc2"]),
        ):
            state[f"{theirs}weight"], state[f"{theirs}bias"] = mine["kernel"].T, mine["bias"]
        for which in ("norm1", "norm2"):
            state[f"{which}.weight"], state[f"{which}.bias"] = (
                ours[which][part] for part in ("scale", "bias")
            )
        layer.load_state_dict({key: torch.tensor(value) for key, value in state.items()})
        made.append(layer)
    return made


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("categorical", [False, True])
def test_the_row_encoder_is_a_transformer_encoder_over_features(norm, categorical, x64):
    torch = pytest.importorskip("torch")
    options = {"layers": 2, "width": 6, "heads": 2, "norm": norm}
    inputs = indices() if categorical else numbers()
    if categorical:
        options["vocabulary"] = VOCABULARY
    module, params = made("row_encoder", inputs, 3, **options)
    if categorical:
        offsets = np.array([0, 3, 8])
        tokens = params["table"]["rows"][inputs + offsets]
    else:
        columns = [
            np.outer(inputs[:, f], params["tokens"]["weight"][f]) + params["tokens"]["bias"][f]
            for f in range(inputs.shape[1])
        ]
        tokens = np.stack(columns, 1)
    first = np.broadcast_to(params["cls_token"], (len(inputs), 1, 6))
    x = torch.tensor(np.concatenate([first, tokens], 1))
    with torch.no_grad():
        for layer in torch_encoder(params, 2, 2, norm):
            x = layer(x)
        x = x[:, 0]
        if norm == "pre":
            scale, bias = (torch.tensor(params["norm"][part]) for part in ("scale", "bias"))
            x = torch.nn.functional.layer_norm(x, (6,), scale, bias, 1e-6)
        expected = by_torch(params, ("head",), x, None).numpy()
    np.testing.assert_allclose(logits_of(module, params, inputs), expected, rtol=1e-9)


def test_an_mlp_reads_rows_of_numbers(x64):
    torch = pytest.importorskip("torch")
    module, params = made("mlp", numbers(), 3, hidden=(5, 4))
    x = by_torch(params, ("Dense_0", "Dense_1"), torch.tensor(numbers()), torch.relu)
    expected = by_torch(params, ("Dense_2",), x, None).numpy()
    np.testing.assert_allclose(logits_of(module, params, numbers()), expected, rtol=1e-10)


@pytest.mark.parametrize("name", models.TABLES)
def test_dropout_works_in_training_alone(name):
    options = {"dropout": 0.5, "vocabulary": VOCABULARY, **tiny(name)}
    inputs = indices()
    module, params = made(name, inputs, **options)
    calm = logits_of(module, params, inputs)
    np.testing.assert_array_equal(calm, logits_of(module, params, inputs))

    def trained(seed, module=module):
        rngs = {"dropout": jax.random.key(seed)}
        return module.apply({"params": params}, inputs, train=True, rngs=rngs)

    assert np.abs(trained(0) - trained(1)).max() > 1e-3
    np.testing.assert_array_equal(trained(0), trained(0))
    without = models.build(name, 2, **(options | {"dropout": 0.0}))
    np.testing.assert_allclose(trained(0, without), calm, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", models.TABLES)
def test_bfloat16_changes_digits_but_neither_parameters_nor_logits_dtype(name):
    inputs = indices()
    full, half = (
        models.build(name, 2, vocabulary=VOCABULARY, precision=precision, **tiny(name))
        for precision in ("float32", "bfloat16")
    )
    _, params = made(name, inputs, vocabulary=VOCABULARY, **tiny(name))
    variables = {"params": jax.tree.map(np.float32, params)}
    assert jax.eval_shape(half.init, jax.random.key(0), inputs) == jax.eval_shape(
        full.init, jax.random.key(0), inputs
    )
    a, b = (jax.jit(module.apply)(variables, inputs) for module in (full, half))
    assert b.dtype == jnp.float32
    assert 0 < np.abs(a - b).max() < 0.1


# Hashing.


def murmur(value):
    """MurmurHash3's 32-bit finaliser in Python's integers."""
    value ^= value >> 16
    value = value * 0x85EBCA6B % 2**32
    value ^= value >> 13
    value = value * 0xC2B2AE35 % 2**32
    return value ^ value >> 16


def test_rows_of_hashed_indices_are_those_computed_by_hand():
    vocabulary, buckets = (1000, 3, 500), 7
    assert tables.field_sizes(vocabulary, buckets) == (7, 3, 7)
    ids = indices(200, vocabulary=vocabulary)
    ids[0] = 0
    expected = np.empty_like(ids)
    for row, values in enumerate(ids):
        for f, (value, offset) in enumerate(zip(values, (0, 7, 10), strict=True)):
            bucket = int(value)
            if f != 1 and value:
                bucket = 1 + murmur(int(value) ^ (f + 1) * 0x9E3779B9 % 2**32) % (buckets - 1)
            expected[row, f] = offset + bucket
    found = np.asarray(tables.row_numbers(ids, vocabulary, buckets))
    np.testing.assert_array_equal(found, expected)
    assert list(found[0]) == [0, 7, 10]  # the unknown value keeps a row to itself
    assert (np.delete(found, 0, 0)[:, 0][ids[1:, 0] > 0] > 0).all()
    # Every bucket is used, about as often as the others.
    of_bucket = np.bincount(found[:, 0], minlength=7)[1:7]
    assert of_bucket.min() > 15
    assert not np.array_equal(found[:, 0], found[:, 2] - 10)


@pytest.mark.parametrize("name", models.TABLES)
def test_a_hashed_network_has_the_rows_of_its_buckets(name):
    module = models.build(name, 2, vocabulary=(1000, 3, 500), hash_buckets=7)
    shapes = jax.eval_shape(module.init, jax.random.key(0), indices())
    assert shapes["params"]["table"]["rows"].shape[0] == 17


def test_a_network_that_holds_some_rows_gets_their_numbers(x64):
    inputs = indices()
    module, params = made("deepfm", inputs, vocabulary=VOCABULARY, hash_buckets=2, **TINY)
    rows = np.asarray(tables.row_numbers(inputs, VOCABULARY, 2))
    used = np.unique(rows)
    part = {**params}
    for table in ("table", "wide"):
        part[table] = {"rows": params[table]["rows"][used]}
    found = logits_of(module.clone(held=len(used)), part, np.searchsorted(used, rows))
    np.testing.assert_allclose(found, logits_of(module, params, inputs), rtol=1e-12)


# What does not go together.


def dataset(inputs, vocabulary=(), num_classes=2):
    labels = np.arange(len(inputs), dtype=np.int32) % num_classes
    split = sources.Split(inputs, labels, np.arange(len(inputs), dtype=np.int32))
    names = tuple(map(str, range(num_classes)))
    return sources.Dataset(split, split, split, names, (0.0,), (1.0,), vocabulary)


CATEGORIES = dataset(indices(), VOCABULARY)
NUMBERS = dataset(numbers().astype(np.float32))
IMAGES = dataset(np.zeros((6, 8, 8, 1), np.uint8))
REFUSED = [
    ("mlp", {}, CATEGORIES, "model 'mlp' computes with numbers, .*indices of categories; use one"),
    ("cnn", {}, CATEGORIES, "model 'cnn' computes with numbers"),
    ("resnet8", {}, NUMBERS, "model 'resnet8' looks at images, .*rows of a table; use 'mlp' or"),
    ("cnn", {}, NUMBERS, "model 'cnn' looks at images"),
    ("row_encoder", {}, IMAGES, r"model 'row_encoder' reads rows .*float32 \[1, 8, 8, 1\]"),
    ("row_encoder", {}, dataset(indices()), r"model 'row_encoder' reads rows .*int32 \[1, 3\]"),
    *((name, {}, NUMBERS, rf"model '{name}' looks rows up .*float32 \[1, 4\]") for name in CLICK),
    *((name, {}, IMAGES, rf"model '{name}' looks rows up .*float32") for name in CLICK),
    *(
        (name, {}, dataset(indices(), VOCABULARY, 3), rf"model '{name}' .* 2 classes, .* has 3;")
        for name in CLICK
    ),
    ("deepfm", {}, dataset(indices(), (3, 5)), "has 3 fields, the vocabulary 2"),
    ("deepfm", {"dropout": 1.0}, CATEGORIES, r"dropout=1\.0: must lie in \[0, 1\)"),
    ("deepfm", {"hash_buckets": 1}, CATEGORIES, "hash_buckets=1: must be 0 .*or at least 2"),
    ("deepfm", {"embedding": 0}, CATEGORIES, "embedding=0: must be a pos|a row of 0 numbers"),
    ("dcn_v2", {"cross_layers": 0}, CATEGORIES, "cross_layers=0: must be at least 1"),
    ("dcn_v2", {}, dataset(indices(), (2**30, 2**30, 2)), "2,147,483,650 rows together"),
    ("row_encoder", {"norm": "both"}, NUMBERS, "norm='both': use one of pre, post"),
    ("row_encoder", {"heads": 3}, NUMBERS, "heads=3: must divide the width of the tokens, 64"),
]


@pytest.mark.parametrize(("name", "options", "data", "said"), REFUSED)
def test_what_does_not_go_together_is_refused_before_anything_is_compiled(
    name, options, data, said, monkeypatch
):
    monkeypatch.setattr(sources, "load", lambda *args, **kwargs: data)
    config = configs.default()
    config.role.name, config.student.name, config.data.batch_size = "alone", name, 2
    config.student[name].update(options) if options else None
    with pytest.raises(ConfigError, match=said):
        assemble.assemble(config)
    config.role.name, config.teacher.name = "dml", name  # a peer
    config.teacher[name].update(options) if options else None
    with pytest.raises(ConfigError, match=said):
        _with_peer(teachers.load(config, data), data)


def _with_peer(trained, data):
    try:
        jax.eval_shape(trained.module.init, jax.random.key(0), networks.example(data))
    except ValueError as error:
        raise ConfigError(str(error)) from error


def test_networks_are_built_for_what_a_dataset_holds():
    module = networks.build("deepfm", CATEGORIES, precision="float32", hidden=(4,))
    assert (module.vocabulary, module.hidden, module.num_classes) == (VOCABULARY, (4,), 2)
    assert networks.build("row_encoder", NUMBERS, precision="float32", remat=True).remat
    assert networks.build("mlp", NUMBERS, precision="float32").num_classes == 2
    assert [networks.example(d).dtype for d in (CATEGORIES, NUMBERS, IMAGES)] == [
        np.int32, np.float32, np.float32,
    ]  # fmt: skip
