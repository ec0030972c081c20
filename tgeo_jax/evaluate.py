"""Named predict functions -> metrics, over a whole split, padded batches counted right."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tgeo_jax import losses, metrics
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


class Evaluator:
    """Evaluates one predict function for several seeds at once, or for one set of variables.

    Args:
        predict: (variables, raw images) -> logits_BxK.
        batch_size: examples in one compiled call.
        seeds: whether variables have a leading seed axis.
    """

    def __init__(self, predict: Predict, batch_size: int, seeds: bool):
        self._batch_size = batch_size
        sums = _batch_sums(predict)
        if seeds:
            predict = jax.vmap(predict, in_axes=(0, None))
            sums = jax.vmap(sums, in_axes=(0, None, None))
        self._logits, self._sums = jax.jit(predict), jax.jit(sums)

    def metrics(self, variables: Variables, split: Batch) -> dict[str, metrics.Mean]:
        """Sums over the split: `accuracy` in [0, 1] and `cross_entropy` in nats, [seeds] or scalar.

        The result is still on the device: nothing waits for it here.
        """
        found: list[dict[str, metrics.Mean]] = []
        for images, labels, is_real in self._batches(split):
            found.append(self._sums(variables, Batch(images, labels), is_real))
        return jax.tree.map(lambda *values: sum(values[1:], values[0]), *found)

    def logits(self, variables: Variables, split: Batch) -> np.ndarray:
        """Logits of every example, [N, K] or [seeds, N, K]."""
        parts = []
        for images, _, is_real in self._batches(split):
            logits = np.asarray(self._logits(variables, images))
            parts.append(logits[..., np.asarray(is_real), :])
        return np.concatenate(parts, axis=-2)

    def _batches(self, split: Batch) -> Iterator[tuple[Array, Array, Array]]:
        size = min(self._batch_size, split.labels_B.shape[0])
        for start in range(0, split.labels_B.shape[0], size):
            images = split.images_BxHxWxC[start : start + size]
            labels = split.labels_B[start : start + size]
            missing = size - labels.shape[0]
            if missing:  # one shape, one compilation
                images = jnp.pad(images, ((0, missing), *((0, 0),) * (images.ndim - 1)))
                labels = jnp.pad(labels, (0, missing))
            yield images, labels, jnp.arange(size) < size - missing


def _batch_sums(predict: Predict) -> Callable:
    def sums(variables: Variables, batch: Batch, is_real_B: Array) -> dict[str, metrics.Mean]:
        logits_BxK = predict(variables, batch.images_BxHxWxC)
        right_B = jnp.argmax(logits_BxK, axis=-1) == batch.labels_B
        return {
            "accuracy": metrics.mean(right_B, is_real_B),
            "cross_entropy": metrics.mean(
                losses.cross_entropy(logits_BxK, batch.labels_B), is_real_B
            ),
        }

    return sums
