"""PyTorch checkpoints become variables with which the Flax networks say the same."""

from __future__ import annotations

import collections
import pathlib
import pickle
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import methods
from tgeo_jax import convert, models
from tgeo_jax.errors import CheckpointError

torch = pytest.importorskip("torch")
save_file = pytest.importorskip("safetensors.torch").save_file

from benchmarks import torch_imagenet, torch_nets  # noqa: E402

CLASSES = 10
NAMES = [*torch_nets.NETS, *torch_imagenet.NETS]
SIMPLE = "resnet8"


def network(name: str = SIMPLE, num_classes: int = CLASSES) -> torch.nn.Module:
    return torch_nets.randomised(torch_nets.build(name, num_classes), seed=NAMES.index(name))


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    """The checkpoint that the tests of formats and errors start from."""
    return dict(network().state_dict())


@pytest.fixture(scope="module")
def expected(state):
    return convert.from_torch(SIMPLE, state, CLASSES)


def random_images(batch: int, side: int) -> np.ndarray:
    return np.random.RandomState(0).randn(batch, side, side, 3).astype(np.float32)


def logits(name: str, variables, images: np.ndarray, num_classes: int = CLASSES) -> np.ndarray:
    module = models.build(name, num_classes)
    apply = methods.quick_jit(lambda variables, x: module.apply(variables, x, train=False))
    return np.asarray(apply(variables, images))


def torch_logits(module: torch.nn.Module, images: np.ndarray) -> np.ndarray:
    return module(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()


def saved(path: pathlib.Path, content) -> pathlib.Path:
    torch.save(content, path)
    return path


def test_every_network_with_a_pytorch_original_is_converted():
    assert set(NAMES) == {*models.SMALL, *models.LARGE}


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_the_pytorch_network(name):
    original = network(name)
    variables = convert.from_torch(name, original.state_dict(), CLASSES)
    images = random_images(1 if name in ("deit_small", "vit_base") else 2, original.image_side)
    wanted = torch_logits(original, images)
    assert 0.5 < wanted.std() < 4  # else the tolerance would say nothing
    np.testing.assert_allclose(logits(name, variables, images), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["resnet20", "wrn_16_2", "ShuffleV1", "mobilenetv2", "deit_tiny"])
def test_variables_are_those_of_an_initialisation_in_float32(name):
    module = models.build(name, CLASSES)
    original = network(name)
    images = jax.ShapeDtypeStruct((1, original.image_side, original.image_side, 3), jnp.float32)
    wanted = jax.eval_shape(module.init, jax.random.key(0), images)
    variables = convert.from_torch(name, original.state_dict(), CLASSES)
    assert set(variables) == {"params", "batch_stats"}
    describe = lambda leaf: (leaf.shape, leaf.dtype)  # noqa: E731
    got = jax.tree.map(describe, variables)
    assert got == {"batch_stats": {}, **jax.tree.map(describe, wanted)}


@pytest.mark.parametrize("num_classes", [2, 100])
def test_a_checkpoint_of_other_classes_converts_when_their_number_is_given(num_classes):
    original = network(num_classes=num_classes)
    variables = convert.from_torch(SIMPLE, original.state_dict(), num_classes)
    images = random_images(2, 32)
    got = logits(SIMPLE, variables, images, num_classes)
    np.testing.assert_allclose(got, torch_logits(original, images), rtol=0, atol=1e-4)


def wrapped(state, *keys: str) -> dict:
    """As training scripts save it: beside an epoch, an accuracy and an optimizer's memory."""
    for key in keys:
        memory = {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}
        accuracy = torch.tensor([75.3])
        state = {"epoch": 240, key: state, "best_acc": accuracy, "optimizer": memory}
    return state


WRAPPINGS = [(), ("model",), ("state_dict",), ("model_state",), ("net",), ("state_dict", "model")]


@pytest.mark.parametrize("keys", WRAPPINGS, ids=".".join)
@pytest.mark.parametrize("suffix", [None, ".pth", ".pt"])
def test_wrappers_are_unwrapped(keys, suffix, state, expected, tmp_path):
    content = wrapped(state, *keys)
    source = content if suffix is None else saved(tmp_path / f"net{suffix}", content)
    assert methods.same(convert.from_torch(SIMPLE, source, CLASSES), expected)


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."]
)
def test_prefixes_of_parallel_and_compiled_networks_are_dropped(prefix, state, expected):
    prefixed = {prefix + name: tensor for name, tensor in state.items()}
    assert methods.same(convert.from_torch(SIMPLE, prefixed, CLASSES), expected)


def test_a_network_whose_own_names_begin_with_a_wrappers_converts_from_a_wrapper(tmp_path):
    """MobileNetV1's tensors are called `model.0.0.weight` and so on."""
    original = network("mobilenetv1").state_dict()
    plain = convert.from_torch("mobilenetv1", original, CLASSES)
    path = saved(tmp_path / "net.pth", {"model": {f"module.{k}": v for k, v in original.items()}})
    assert methods.same(convert.from_torch("mobilenetv1", path, CLASSES), plain)


@pytest.mark.parametrize("kind", [str, pathlib.Path])
def test_a_path_may_be_a_string_or_a_path(kind, state, expected, tmp_path):
    path = saved(tmp_path / "net.pth", state)
    assert methods.same(convert.from_torch(SIMPLE, kind(path), CLASSES), expected)


def test_a_checkpoint_of_pytorchs_old_format_is_read(state, expected, tmp_path):
    path = tmp_path / "net.pth"
    torch.save({"model": state}, path, _use_new_zipfile_serialization=False)
    assert methods.same(convert.from_torch(SIMPLE, path, CLASSES), expected)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_safetensors_are_read(prefix, state, expected, tmp_path):
    path = tmp_path / "net.safetensors"
    save_file({prefix + k: v for k, v in state.items()}, path, metadata={"format": "pt"})
    assert methods.same(convert.from_torch(SIMPLE, path, CLASSES), expected)


def test_numpy_arrays_serve_as_tensors(state, expected):
    arrays = {name: tensor.numpy() for name, tensor in state.items()}
    assert methods.same(convert.from_torch(SIMPLE, arrays, CLASSES), expected)


def test_trainable_parameters_serve_as_tensors(state, expected):
    parameters = {
        name: torch.nn.Parameter(tensor) if tensor.is_floating_point() else tensor
        for name, tensor in state.items()
    }
    assert methods.same(convert.from_torch(SIMPLE, parameters, CLASSES), expected)


def test_counters_of_batches_are_not_needed(state, expected):
    """Checkpoints from before PyTorch 0.4.1 have none."""
    old = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    assert len(old) < len(state)
    assert methods.same(convert.from_torch(SIMPLE, old, CLASSES), expected)


def test_entries_beside_the_tensors_are_ignored(state, expected):
    mixed = {"epoch": 240, "accuracy": 0.75, "arch": SIMPLE, "optimizer": {"lr": 0.1}, **state}
    assert methods.same(convert.from_torch(SIMPLE, mixed, CLASSES), expected)


@pytest.mark.parametrize("file", [None, "net.pth", "net.safetensors"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_become_float32_without_further_rounding(dtype, file, state, tmp_path):
    stored = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
    rounded = {k: v.float() for k, v in stored.items()}
    source = stored
    if file is not None:
        source = tmp_path / file
        (save_file if source.suffix == ".safetensors" else torch.save)(stored, source)
    variables = convert.from_torch(SIMPLE, source, CLASSES)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype(np.float32)}
    assert methods.same(variables, convert.from_torch(SIMPLE, rounded, CLASSES))


def test_training_the_pytorch_network_on_does_not_change_the_variables():
    original = network()
    variables = convert.from_torch(SIMPLE, original.state_dict(), CLASSES)
    before = jax.tree.map(np.array, variables)
    for tensor in original.state_dict().values():
        tensor.zero_()
    assert methods.same(variables, before)


def refusal(source, name: str = SIMPLE, num_classes: int = CLASSES) -> str:
    with pytest.raises(CheckpointError) as caught:
        convert.from_torch(name, source, num_classes)
    return str(caught.value)


def test_another_number_of_classes_names_the_last_layer_and_both_shapes(state):
    message = refusal(state, num_classes=100)
    assert re.search(r"fc\.weight\b.*\(10, 64\).*\(100, 64\)", message)


def test_another_width_names_the_first_tensor_and_both_shapes(state):
    message = refusal(state, name="resnet8x4")
    assert re.search(r"conv1\.weight\b.*\(16, 3, 3, 3\).*\(32, 3, 3, 3\)", message)
    assert "layer" not in message


def test_a_kernel_of_the_wrong_layout_is_refused(state):
    """A dense layer's kernel as Flax stores it has the right number of elements."""
    message = refusal(state | {"fc.weight": state["fc.weight"].T})
    assert re.search(r"fc\.weight\b.*\(64, 10\).*\(10, 64\)", message)


@pytest.mark.parametrize("name", ["conv1.weight", "layer2.0.bn2.running_var", "fc.bias"])
def test_a_missing_tensor_is_named(name, state):
    message = refusal({key: value for key, value in state.items() if key != name})
    assert name in message
    assert "missing" in message


@pytest.mark.parametrize("name", ["layer1.1.conv1.weight", "fc2.bias", "running_mean"])
def test_an_extra_tensor_is_named(name, state):
    message = refusal(state | {name: torch.ones(3)})
    assert re.search(rf"\b{re.escape(name)}\b", message)


def test_a_checkpoint_of_another_depth_is_refused(state):
    assert "layer1.1." in refusal(state, name="resnet14")


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, {"model": {}}, [1, 2], None])
def test_a_file_without_tensors_is_refused_by_name(content, tmp_path):
    path = saved(tmp_path / "net.pth", content)
    assert str(path) in refusal(path)


class Malicious:
    """What would create a file when unpickled."""

    def __init__(self, path: pathlib.Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("way", ["zip", "old", "pickle"])
@pytest.mark.parametrize("suffix", [".pth", ".pt"])
def test_code_in_a_checkpoint_is_refused_and_does_not_run(way, suffix, state, tmp_path):
    path, witness = tmp_path / f"net{suffix}", tmp_path / "witness"
    content = {"model": state, "options": Malicious(witness)}
    if way == "pickle":
        path.write_bytes(pickle.dumps(content["options"], protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=way == "zip")
    assert str(path) in refusal(path)
    assert not witness.exists()
    if way != "pickle":  # the attack itself works where nothing stops it
        torch.load(path, weights_only=False)["options"].close()
        assert witness.exists()


def test_a_whole_saved_network_is_refused_with_the_way_out(tmp_path):
    path = saved(tmp_path / "net.pth", torch.nn.Linear(2, 2))
    message = refusal(path)
    assert str(path) in message
    assert "state_dict" in message


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"these are not tensors", bytes(range(256)) * 8])
def test_a_file_that_holds_something_else_is_refused_by_name(content, suffix, tmp_path):
    path = tmp_path / f"net{suffix}"
    path.write_bytes(content)
    assert str(path) in refusal(path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_truncated_file_is_refused_by_name(suffix, state, tmp_path):
    path = tmp_path / f"net{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(state, path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert str(path) in refusal(path)


@pytest.mark.parametrize("name", ["net.pth", "net.safetensors", "net.npz"])
def test_a_path_that_does_not_exist_is_named(name, tmp_path):
    assert str(tmp_path / name) in refusal(tmp_path / name)


def test_a_folder_is_not_a_checkpoint(tmp_path):
    folder = tmp_path / "net.pth"
    folder.mkdir()
    assert str(folder) in refusal(folder)


def test_an_unknown_suffix_is_refused_with_the_known_ones(tmp_path):
    path = tmp_path / "net.npz"
    np.savez(path, weight=np.ones(3))
    message = refusal(path)
    assert str(path) in message
    assert ".pth" in message
    assert ".safetensors" in message


def test_an_ordered_dictionary_is_converted_without_changing_it(state):
    ordered = collections.OrderedDict(("module." + k, v.clone()) for k, v in state.items())
    before = {k: v.clone() for k, v in ordered.items()}
    convert.from_torch(SIMPLE, ordered, CLASSES)
    assert list(ordered) == list(before)
    assert all(torch.equal(ordered[k], v) for k, v in before.items())
