"""Named predict functions -> metrics, over a whole split, padded batches counted right."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tgeo_jax import metrics, parallel
from tgeo_jax.models import convolution
from tgeo_jax.state import Batch

Array = jax.Array
Variables = Any
Predict = Callable[[Variables, Array], Array]  # (variables, raw images) -> logits_BxK


def predictor(module: nn.Module, clean_view: Callable[[Array], Array]) -> Predict:
    """Evaluation-mode logits of a network on unaugmented images.

    Examples:
        >>> from tgeo_jax import models
        >>> module = models.build("mlp", 3)
        >>> images = jnp.ones((2, 4, 4, 1))
        >>> variables = module.init(jax.random.key(0), images)
        >>> predictor(module, lambda x: x)(variables, images).shape
        (2, 3)
    """

    def predict(variables: Variables, images: Array) -> Array:
        logits_BxK: Any = module.apply(variables, clean_view(images), train=False)
        return logits_BxK

    return predict


class Sweep(Protocol):
    """A split that is read as it is needed."""

    def sweep(
        self, batch_size: int, shard: tuple[int, int] = (0, 1)
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Every example once: (images, labels, whether each is real), all batches of one size.

        Of every batch, a shard (which process, of how many) gets its rows.
        """


class Evaluator:
    """Evaluates one predict function for several seeds at once, or for one set of variables.

    Args:
        predict: (variables, raw images) -> logits_BxK.
        batch_size: examples in one compiled call.
        seeds: whether variables have a leading seed axis.
        one_by_one: whether one seed comes after the other; see `parallel.over_seeds`.
        mesh: whose devices share every batch, which grows to a multiple of their number; None: one
            device.
    """

    def __init__(
        self,
        predict: Predict,
        batch_size: int,
        seeds: bool,
        *,
        one_by_one: bool = False,
        mesh: Mesh | None = None,
    ):
        self._batch_size, self._mesh = batch_size, mesh
        sums = _batch_sums(predict)
        if seeds:
            how: dict[str, Any] = {"mesh": mesh, "one_by_one": one_by_one}
            predict = parallel.over_seeds(predict, (0, None), 0, **how)
            sums = parallel.over_seeds(sums, (0, None, None, None), 0, **how)
        if mesh is not None:
            predict, sums = _shared(predict, mesh), _shared(sums, mesh)
        options = convolution.compiler_options() if one_by_one else None
        where: dict[str, Any] = {"compiler_options": options}
        if mesh is not None:
            where["out_shardings"] = parallel.replicated(mesh)
        self._logits, self._sums = jax.jit(predict, **where), jax.jit(sums, **where)

    def metrics(
        self, variables: Variables, split: Batch | Sweep, teacher_logits_NxK: Any = None
    ) -> metrics.Metrics:
        """Sums over the split, [seeds] or scalar.

        `accuracy` and, with more than five classes, `top5_accuracy` in [0, 1]; `cross_entropy`
        (the negative log-likelihood, or log-loss) in nats; `calibration` for the expected
        calibration error; `confusion` for macro F1 and recalls, unless there are many classes;
        with two classes the scores for `auc`; with a (frozen) teacher's logits
        `teacher_agreement`, how often both have the same top class, and `teacher_kl`,
        KL(teacher || student) at temperature 1 in nats. See `metrics.of_logits`.

        The result is still on the device: nothing waits for it here.
        """
        found: list[metrics.Metrics] = []
        for start, (images, labels, is_real) in self._batches(split):
            told = None
            if teacher_logits_NxK is not None:
                told = teacher_logits_NxK[start : start + labels.shape[0]]
                missing = labels.shape[0] - told.shape[0]
                told = jnp.pad(told, ((0, missing), (0, 0))) if missing else told
            found.append(self._sums(variables, Batch(images, labels), is_real, told))
        return metrics.add_up(found)

    def confusion(
        self, variables: Variables, splits: Mapping[str, Batch | Sweep]
    ) -> dict[str, list]:
        """Confusion matrices by split, [K, K] or [seeds, K, K] counts; none of many classes.

        Rows are labels, columns top classes.
        """
        sums = {name: self.metrics(variables, split) for name, split in splits.items()}
        counted = {k: found["confusion"].total for k, found in sums.items() if "confusion" in found}
        return {name: total.tolist() for name, total in parallel.fetch(counted).items()}

    def logits(self, variables: Variables, split: Batch | Sweep) -> np.ndarray:
        """Logits of every example, [N, K] or [seeds, N, K]; an unreadable one's are of a blank."""
        parts, count = [], _length(split)
        for start, (images, _, _) in self._batches(split):
            logits = np.asarray(self._logits(variables, images))
            parts.append(logits[..., : count - start, :])
        return np.concatenate(parts, axis=-2)

    def batches_of_logits(
        self, variables: Variables, split: Batch | Sweep
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(logits, labels) of all examples that can be read, batch by batch."""
        for _, (images, labels, is_real) in self._batches(split):
            labels_B, real_B = parallel.fetch((labels, is_real))
            logits = np.asarray(self._logits(variables, images))
            yield logits[..., real_B, :], labels_B[real_B]

    def _batches(self, split: Batch | Sweep) -> Iterator[tuple[int, tuple[Any, Any, Any]]]:
        size = min(self._batch_size, _length(split))
        if self._mesh is not None:
            parts = parallel.batch_parts(self._mesh)
            size = -(-size // parts) * parts
        if not isinstance(split, Batch):
            shard = jax.process_index(), jax.process_count()
            for index, batch in enumerate(split.sweep(size, shard)):
                yield index * size, self._of_processes(batch)
            return
        for start in range(0, split.labels_B.shape[0], size):
            images = split.images_BxHxWxC[start : start + size]
            labels = split.labels_B[start : start + size]
            missing = size - labels.shape[0]
            if missing:  # one shape, one compilation
                images = jnp.pad(images, ((0, missing), *((0, 0),) * (images.ndim - 1)))
                labels = jnp.pad(labels, (0, missing))
            yield start, (images, labels, np.arange(size) < size - missing)

    def _of_processes(self, batch: tuple[np.ndarray, ...]) -> Any:
        """Whole batches out of what every process has read."""
        if self._mesh is None or jax.process_count() == 1:
            return batch
        where = parallel.examples_sharding(self._mesh)
        return tuple(jax.make_array_from_process_local_data(where, part) for part in batch)


def _shared(function: Callable, mesh: Mesh) -> Callable:
    """The same, each device computing its part of the batch."""

    def of_parts(variables: Variables, batch: Any, *rest: Any) -> Any:
        where = parallel.examples_sharding(mesh)
        return function(variables, jax.lax.with_sharding_constraint(batch, where), *rest)

    return of_parts


def _length(split: Any) -> int:
    return split.labels_B.shape[0] if isinstance(split, Batch) else len(split)


def _batch_sums(predict: Predict) -> Callable:
    def sums(
        variables: Variables, batch: Batch, is_real_B: Array, teacher_logits_BxK: Array | None
    ) -> metrics.Metrics:
        logits_BxK = predict(variables, batch.images_BxHxWxC)
        return metrics.of_logits(logits_BxK, batch.labels_B, is_real_B, teacher_logits_BxK)

    return sums
