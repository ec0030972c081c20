"""PyTorch checkpoints to Flax variables.

Networks of `models` carry the submodule names of the PyTorch originals, so a conversion is renaming
by rule: path components are joined by dots, `_` before a digit is a dot, kernels are transposed.
"""

from __future__ import annotations

import argparse
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tgeo_jax import models
from tgeo_jax.errors import CheckpointError

PyTree = Any
_WRAPPERS = ("model", "state_dict", "model_state", "model_state_dict", "net")
_TORCH_SUFFIXES = (".pth", ".pt", ".tar", ".bin", "")
_PREFIXES = ("module.", "_orig_mod.")
_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "mean": "running_mean",
    "var": "running_var",
}
_REPDISTILLER = "http://shape2prog.csail.mit.edu/repo"
_TORCHVISION = "https://download.pytorch.org/models"
# Where the publishers keep checkpoints of their teachers.
DOWNLOADS: Mapping[str, str] = {
    **{
        name: f"{_REPDISTILLER}/{name}_vanilla/ckpt_epoch_240.pth"
        for name in ("resnet56", "resnet110", "resnet32x4", "wrn_40_2", "vgg13", "ResNet50")
    },
    "resnet18": f"{_TORCHVISION}/resnet18-f37072fd.pth",
    "resnet34": f"{_TORCHVISION}/resnet34-b627a593.pth",
    "resnet50": f"{_TORCHVISION}/resnet50-0676ba61.pth",
    "resnet101": f"{_TORCHVISION}/resnet101-63fe2227.pth",
    "resnet152": f"{_TORCHVISION}/resnet152-394f9c45.pth",
    "mobilenetv2": f"{_TORCHVISION}/mobilenet_v2-b0353104.pth",
    "deit_tiny": "https://dl.fbaipublicfiles.com/deit/deit_tiny_patch16_224-a1311bcf.pth",
    "deit_small": "https://dl.fbaipublicfiles.com/deit/deit_small_patch16_224-cd65a155.pth",
    "vit_base": "https://huggingface.co/timm/vit_base_patch16_224.augreg_in21k_ft_in1k",
}
_COUNTER = "num_batches_tracked"  # PyTorch's BatchNorm keeps it; nothing depends on it


def from_torch(
    name: str,
    state_dict_or_path: Mapping[str, Any] | str | pathlib.Path,
    num_classes: int,
    *,
    image_size: int | None = None,
) -> PyTree:
    """Variables of a network of `models` from a PyTorch checkpoint of its original.

    Originals are the nets of RepDistiller and mdistiller for 32x32 images, torchvision's ResNets
    and MobileNetV2, mdistiller's MobileNetV1 and timm's vision transformers for ImageNet.

    Args:
        name: a key of `models.MODELS`.
        state_dict_or_path: tensors by name, wrapped or not; or a .pth, .pt or .safetensors file.
            A file is read without ever unpickling an object that is not a tensor or plain data.
        num_classes: K.
        image_size: pixels along a side; by default 32 for `models.SMALL`, 224 otherwise. Only
            vision transformers depend on it.

    Returns:
        `{"params": ..., "batch_stats": ...}`, float32 NumPy arrays.

    Raises:
        CheckpointError: a file that is missing or cannot be read safely, or the first tensor that
            is missing, superfluous or of another shape, with both shapes.
        ValueError: an unknown network, with the nearest name.

    Examples:
        >>> from_torch("resnet20", {}, 100)
        Traceback (most recent call last):
        ...
        tgeo_jax.errors.CheckpointError: state_dict: holds no tensors; it must be a state_dict, or \
a dictionary that holds one under model, state_dict, model_state, model_state_dict, net
    """
    if isinstance(state_dict_or_path, str | pathlib.Path):
        source = str(state_dict_or_path)
        state = _read(pathlib.Path(state_dict_or_path))
    else:
        source, state = "state_dict", state_dict_or_path
    tensors = _tensors(state, source)
    size = image_size or (32 if name in models.SMALL else 224)
    module = models.build(name, num_classes)
    expected = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, size, size, 3)))
    leaves, structure = jax.tree_util.tree_flatten_with_path(expected)
    wanted = {_torch_name(path): _torch_shape(leaf.shape) for path, leaf in leaves}
    _check(tensors, wanted, source, f"{name} with {num_classes} classes")
    found = [_to_flax(tensors[torch_name]) for torch_name in wanted]
    return {"batch_stats": {}, **jax.tree.unflatten(structure, found)}


def _check(
    tensors: Mapping[str, np.ndarray],
    wanted: Mapping[str, tuple[int, ...]],
    source: str,
    network: str,
) -> None:
    """Complains of the first tensor, in the checkpoint's order, that does not fit."""
    for key, tensor in tensors.items():
        if key in wanted and tensor.shape != wanted[key]:
            raise CheckpointError(
                f"{source}: tensor {key} has shape {tensor.shape}, {network} needs {wanted[key]}"
            )
    hint = "is the checkpoint of another network?"
    for key, shape in wanted.items():
        if key not in tensors:
            raise CheckpointError(
                f"{source}: tensor {key} is missing, {network} needs it in shape {shape}; {hint}"
            )
    for key, tensor in tensors.items():
        if key not in wanted and not key.endswith(_COUNTER):
            raise CheckpointError(
                f"{source}: tensor {key} of shape {tensor.shape} has no place in {network}; {hint}"
            )


def _torch_name(path: tuple) -> str:
    """`('params', 'layer1_0', 'conv1', 'kernel')` -> `layer1.0.conv1.weight`."""
    *modules, leaf = [str(key.key) for key in path[1:]]
    parts = [re.sub(r"_(?=\d)", ".", part) for part in modules]
    return ".".join([*parts, _LEAVES.get(leaf, leaf)])


def _torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    if len(shape) == 4:  # height, width, in, out
        return (shape[3], shape[2], shape[0], shape[1])
    return shape[::-1] if len(shape) == 2 else shape


def _to_flax(tensor: np.ndarray) -> np.ndarray:
    if tensor.ndim == 4:
        tensor = tensor.transpose(2, 3, 1, 0)
    elif tensor.ndim == 2:
        tensor = tensor.T
    return np.array(tensor, order="C")  # a copy: PyTorch shares its memory with NumPy


def _tensors(state: Any, source: str) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint by their plain names, float32."""
    inner: Any = state
    while isinstance(inner, Mapping):  # a wrapper may itself be wrapped
        state = inner
        inner = next((state[key] for key in _WRAPPERS if isinstance(state.get(key), Mapping)), None)
    found = {}
    for key, value in state.items() if isinstance(state, Mapping) else ():
        if _is_tensor(value):
            found[_without_prefixes(str(key))] = _as_numpy(value)
    if not found:
        raise CheckpointError(
            f"{source}: holds no tensors; it must be a state_dict, or a dictionary that holds one "
            f"under {', '.join(_WRAPPERS)}"
        )
    return found


def _is_tensor(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


def _as_numpy(value: Any) -> np.ndarray:
    if hasattr(value, "detach"):
        value = value.detach().cpu().float().numpy()  # NumPy has no bfloat16
    return np.asarray(value, np.float32)


def _without_prefixes(name: str) -> str:
    while name.startswith(_PREFIXES):
        name = name.partition(".")[2]
    return name


def _read(path: pathlib.Path) -> Any:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; name the checkpoint to convert")
    suffix = path.suffix.lower()
    if suffix not in _TORCH_SUFFIXES and suffix != ".safetensors":
        raise CheckpointError(
            f"{path}: cannot be converted; it must be a file of torch.save "
            f"({', '.join(filter(None, _TORCH_SUFFIXES))} or no suffix) or .safetensors"
        )
    try:
        import torch
        from safetensors.torch import load_file
    except ImportError as error:
        raise CheckpointError(
            f"{path}: reading it needs PyTorch; install it by pip install 'tgeo_jax[torch]'"
        ) from error
    try:
        if suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(_plain_data()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds, depending on what the file holds
        # PyTorch's own message advises to load the file without protection: not repeated here.
        found = re.search(
            r"(?:Unsupported|Unallowed) \w+ .*?([\w.]+) was not an allowed", str(error)
        )
        found = found or re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"holds {found[1]}, not only tensors" if found else "is damaged or of another format"
        raise CheckpointError(
            f"{path}: {what}, so it is not read; save the network's state_dict() alone and convert "
            "that"
        ) from error


def _plain_data() -> list[Any]:
    """Harmless types that training scripts save beside the tensors: options and best accuracies."""
    scalar = np.float64(0).__reduce__()[0]
    return [
        argparse.Namespace,
        (scalar, "numpy.core.multiarray.scalar"),
        (scalar, "numpy._core.multiarray.scalar"),
        np.dtype,
        *{type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64)},
    ]
