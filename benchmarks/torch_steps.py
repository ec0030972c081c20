"""Training steps as PyTorch users write them: what ours are timed against.

All of them train one student on a constant batch, in training mode, with SGD:
  plain: teacher and student forward, `mean [(1 - a) CE + a T^2 KL]`, backward, `SGD.step`.
  create_graph: TGeo-KD's bilevel step by `torch.autograd.grad(..., create_graph=True)`, the update
    written out, and the held-out loss by `torch.func.functional_call`.
  higher: the same step by the library `higher`.
As ours with `meta.order="student_first"`, a bilevel step keeps the student's update that it has
differentiated, and only the training batch moves the running statistics.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tgeo_jax.errors import ConfigError

_INSTALL = "install it by pip install -e '.[benchmarks]'"
try:
    import torch
    from torch import Tensor, nn
    from torch.nn import functional as F

    from benchmarks.torch_nets import named
except ImportError as error:
    raise ConfigError(f"benchmarks.torch_steps: needs PyTorch; {_INSTALL}") from error


@dataclasses.dataclass(frozen=True)
class Setting:
    """How to train, and how to compute.

    Attributes:
        temperature: T of the soft loss.
        alpha: the plain step's ratio.
        learning_rate: of the student, whose optimiser is SGD.
        momentum: of SGD.
        nesterov: of SGD.
        weight_decay: of SGD.
        fusion_learning_rate: of the fusion network, whose optimiser is AdamW.
        fusion_weight_decay: of AdamW.
        only_fusion: whether the outer backward pass is told that nobody wants the student's
            gradient. `outer.backward()`, as in the examples of `higher`, finds it as well.
        channels_last: memory format of images and networks.
        dtype: of parameters and computation; for bfloat16, as with ours, of computation only.
        device: where.
    """

    temperature: float = 4.0
    alpha: float = 0.5
    learning_rate: float = 0.05
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    fusion_learning_rate: float = 1e-3
    fusion_weight_decay: float = 1e-4
    only_fusion: bool = False
    channels_last: bool = False
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    @property
    def stored_dtype(self) -> torch.dtype:
        """Of parameters, losses and logits."""
        return torch.promote_types(self.dtype, torch.float32)

    def network(self, module: nn.Module) -> Any:
        """A copy in this dtype and format, on this device."""
        placed: Any = copy.deepcopy(module).to(self.device, self.stored_dtype)
        return placed.to(memory_format=self._format)

    def images(self, images_BxHxWxC: Any) -> Tensor:
        """[B, C, H, W] in this dtype and format, on this device."""
        return (
            self.floats(images_BxHxWxC).permute(0, 3, 1, 2).contiguous(memory_format=self._format)
        )

    def floats(self, array: Any) -> Tensor:
        """An array of numbers as a tensor."""
        return torch.tensor(np.array(array), dtype=self.stored_dtype, device=self.device)

    def labels(self, labels_B: Any) -> Tensor:
        """Class indices as a tensor."""
        return torch.tensor(np.array(labels_B), dtype=torch.int64, device=self.device)

    def precision(self) -> Any:
        """A context for forward passes."""
        if self.dtype == self.stored_dtype:
            return contextlib.nullcontext()
        return torch.autocast(torch.device(self.device).type, self.dtype)

    @property
    def _format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format


class Batches(NamedTuple):
    """A step's arrays as ours takes them: NumPy or JAX, channels last; what is not needed: None."""

    images_BxHxWxC: Any
    labels_B: Any
    val_images_BxHxWxC: Any = None
    val_labels_B: Any = None
    class_means_KxK: Any = None
    teacher_logits_BxK: Any = None  # in place of the teacher's forward pass


class Seen(NamedTuple):
    """What a student's pass over the training batch gives."""

    logits_BxK: Tensor
    taught_BxK: Tensor  # the teacher's logits
    hard_B: Tensor
    soft_B: Tensor


class Ahead(NamedTuple):
    """What a bilevel step knows before it changes anything but running statistics."""

    inner: Tensor
    outer: Tensor
    params: Sequence[Tensor]
    momenta: Sequence[Tensor]  # none without momentum
    buffers: Sequence[Tensor]  # running statistics, moved by the training batch alone


class Plain:
    """Distillation with a constant ratio.

    Args:
        student: its copy `self.student` is trained, in training mode.
        teacher: in evaluation mode; None where the batches hold its logits.
        batches: constant arrays.
        setting: hyperparameters, format, dtype and device.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module | None, batches: Batches, setting: Setting
    ):
        self.setting = setting
        self.student = setting.network(student).train().requires_grad_()
        self.teacher = None
        if teacher is not None:
            self.teacher = setting.network(teacher).eval().requires_grad_(False)
        self.sgd = torch.optim.SGD(
            self.student.parameters(),
            setting.learning_rate,
            setting.momentum,
            weight_decay=setting.weight_decay,
            nesterov=setting.nesterov,
        )
        self.images = setting.images(batches.images_BxHxWxC)
        self._labels = setting.labels(batches.labels_B)
        if teacher is None:
            self._taught = setting.floats(batches.teacher_logits_BxK)

    def step(self) -> Tensor:
        """Takes one step; returns the loss of before it, not waited for."""
        seen, alpha = self._see(self.student), self.setting.alpha
        loss = torch.mean((1 - alpha) * seen.hard_B + alpha * seen.soft_B)
        self.sgd.zero_grad()
        loss.backward()
        self.sgd.step()
        return loss.detach()

    def _see(self, student: Any) -> Seen:
        taught, logits = self._teach(), self._logits(student, self.images)
        hard = F.cross_entropy(logits, self._labels, reduction="none")
        return Seen(logits, taught, hard, kl(logits, taught, self.setting.temperature))

    @torch.no_grad()
    def _teach(self) -> Tensor:
        if self.teacher is None:
            return self._taught
        return self._logits(self.teacher, self.images)

    def _logits(self, network: Any, images: Tensor) -> Tensor:
        with self.setting.precision():
            logits = network(images)
        return logits.to(self.setting.stored_dtype)


class CreateGraph(Plain):
    """TGeo-KD's bilevel step by double backward; `self.fusion` gives the ratios.

    Args: those of `Plain`; the batches need held-out examples and class means.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module | None, batches: Batches, setting: Setting
    ):
        super().__init__(student, teacher, batches, setting)
        self._val_images = setting.images(batches.val_images_BxHxWxC)
        self._val_labels = setting.labels(batches.val_labels_B)
        self._class_means = setting.floats(batches.class_means_KxK)
        self.fusion = setting.network(fusion_network(len(self._class_means)))
        self.fusion_optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            self.fusion.parameters(),
            setting.fusion_learning_rate,
            weight_decay=setting.fusion_weight_decay,
        )
        self._momenta: Sequence[Tensor] = []
        if setting.momentum:
            self._momenta = [torch.zeros_like(p) for p in self.student.parameters()]

    def step(self) -> Tensor:
        """Takes one step of both networks; returns the inner loss of before it, not waited for."""
        ahead = self._look_ahead()
        self.fusion_optimizer.zero_grad()
        if self.setting.only_fusion:
            ahead.outer.backward(inputs=list(self.fusion.parameters()))
        else:
            self.student.zero_grad()  # where the last step's outer gradient still is
            ahead.outer.backward()
        self.fusion_optimizer.step()
        self._write_back(ahead)
        return ahead.inner.detach()

    def hypergradient(self) -> Mapping[str, Tensor]:
        """d outer / d fusion parameters, by name; changes nothing."""
        before = [buffer.clone() for buffer in self.student.buffers()]
        names, params = zip(*self.fusion.named_parameters(), strict=True)
        grads = torch.autograd.grad(self._look_ahead().outer, params)
        _overwrite(self.student.buffers(), before)
        return dict(zip(names, grads, strict=True))

    def _look_ahead(self) -> Ahead:
        loss = self._inner_loss(self.student)
        params = list(self.student.parameters())
        grads = torch.autograd.grad(loss, params, create_graph=True)
        new_params, momenta = self._updated(params, grads)
        buffers = list(self.student.buffers())
        moved = {name: buffer.clone() for name, buffer in self.student.named_buffers()}
        names = [name for name, _ in self.student.named_parameters()]
        state = {**dict(zip(names, new_params, strict=True)), **moved}
        outer = self._outer_loss(
            lambda images: torch.func.functional_call(self.student, state, (images,))
        )
        return Ahead(loss, outer, new_params, momenta, buffers)

    def _inner_loss(self, student: Any) -> Tensor:
        seen = self._see(student)
        alpha_B = self.fusion(
            trilateral_features(
                seen.logits_BxK.detach(), seen.taught_BxK, self._labels, self._class_means
            )
        )
        return torch.mean((1 - alpha_B) * seen.hard_B + alpha_B * seen.soft_B)

    def _outer_loss(self, student: Any) -> Tensor:
        return F.cross_entropy(self._logits(student, self._val_images), self._val_labels)

    def _updated(
        self, params: Sequence[Tensor], grads: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """What `torch.optim.SGD` would make of parameters and momenta, differentiably."""
        setting, new_params, momenta = self.setting, [], []
        for index, (param, grad) in enumerate(zip(params, grads, strict=True)):
            direction = grad
            if setting.weight_decay:
                direction = direction + setting.weight_decay * param
            if setting.momentum:
                momentum = direction + setting.momentum * self._momenta[index]
                momenta.append(momentum)
                direction = (
                    direction + setting.momentum * momentum if setting.nesterov else momentum
                )
            new_params.append(param - setting.learning_rate * direction)
        return new_params, momenta

    def _write_back(self, ahead: Ahead) -> None:
        _overwrite(self.student.parameters(), ahead.params)
        _overwrite(self._momenta, ahead.momenta)


class Higher(CreateGraph):
    """As `CreateGraph`, by `higher.innerloop_ctx`, which makes a functional copy at every step."""

    def __init__(
        self, student: nn.Module, teacher: nn.Module | None, batches: Batches, setting: Setting
    ):
        try:
            import higher
        except ImportError as error:
            raise ConfigError(f"benchmarks.torch_steps: needs higher; {_INSTALL}") from error
        self._higher = higher
        super().__init__(student, teacher, batches, setting)

    def _look_ahead(self) -> Ahead:
        with self._higher.innerloop_ctx(self.student, self.sgd) as (student, optimizer):
            loss = self._inner_loss(student)
            params = list(optimizer.step(loss))
            buffers = [buffer.clone() for buffer in student.buffers()]
            outer = self._outer_loss(student)
            states = [optimizer.state[0][index] for index in range(len(params))]
            momenta = [state["momentum_buffer"] for state in states if state]
        return Ahead(loss, outer, params, momenta, buffers)

    def _write_back(self, ahead: Ahead) -> None:
        params = list(self.student.parameters())
        _overwrite(params, ahead.params)
        _overwrite(self.student.buffers(), ahead.buffers)
        for param, momentum in zip(params, ahead.momenta, strict=False):
            self.sgd.state[param]["momentum_buffer"] = momentum.detach()


STEPS = {"plain": Plain, "create_graph": CreateGraph, "higher": Higher}


def fusion_network(num_classes: int, hidden: Sequence[int] = (32, 16)) -> nn.Sequential:
    """`learned_ratios.FusionNetwork` for the relation set `full`, layers named as there."""
    layers: dict[str, nn.Module] = {}
    inputs = 9 * num_classes
    for index, width in enumerate(hidden):
        layers[f"Dense_{index}"] = nn.Linear(inputs, width)
        layers[f"activation_{index}"] = nn.LeakyReLU(0.01)
        inputs = width
    layers[f"Dense_{len(hidden)}"] = nn.Linear(inputs, 1)
    return named(**layers, ratio=nn.Sigmoid(), flat=nn.Flatten(0))


def kl(logits_BxK: Tensor, taught_BxK: Tensor, temperature: float) -> Tensor:
    """`losses.kl`: T^2 KL(teacher, student) of each sample."""
    learned = F.log_softmax(logits_BxK / temperature, 1)
    taught = F.log_softmax(taught_BxK / temperature, 1)
    terms = F.kl_div(learned, taught, reduction="none", log_target=True)
    return temperature**2 * terms.sum(1)


def trilateral_features(
    logits_BxK: Tensor, taught_BxK: Tensor, labels_B: Tensor, class_means_KxK: Tensor
) -> Tensor:
    """`geometry.trilateral_features` with the relation set `full`, from detached logits."""
    student, teacher = F.softmax(logits_BxK, 1), F.softmax(taught_BxK, 1)
    truth = F.one_hot(labels_B, student.shape[1]).to(student.dtype)
    mean = class_means_KxK[labels_B]
    vertices = [student, teacher, truth, mean]
    pairs = [
        (mean, student), (truth, student), (teacher, student), (teacher, truth), (mean, truth)
    ]  # fmt: skip
    return torch.cat([*vertices, *((end - start) ** 2 for end, start in pairs)], 1)


@torch.no_grad()
def _overwrite(tensors: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)
