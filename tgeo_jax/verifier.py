"""Verification of a run's networks on pairs of unseen people, and what is kept of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from tgeo_jax import evaluate, parallel, storage, verification
from tgeo_jax.assemble import Run
from tgeo_jax.data.pairs import Pairs
from tgeo_jax.state import Batch

Array = jax.Array
PyTree = Any


class Verifier:
    """Compares pairs by the embeddings of a network, for several seeds at once or for one.

    Args:
        pairs: of the dataset.
        evaluator: of an `embedder`, for one network or for a leading seed axis.
        images: of the pairs, where the evaluator finds them.
    """

    def __init__(self, pairs: Pairs, evaluator: evaluate.Evaluator, images: Any):
        self.pairs, self._evaluator, self._images = pairs, evaluator, images

    def similarity(self, variables: PyTree) -> np.ndarray:
        """Cosines of all pairs, [networks, P], float64."""
        embeddings = self._evaluator.logits(variables, self._images)
        each = embeddings if embeddings.ndim == 3 else embeddings[None]
        return np.stack([verification.cosines(one, self.pairs.pairs) for one in each])

    def finish(
        self,
        run: Run,
        path: storage.Path,
        student_variables: PyTree,
        teacher_variables: Callable[[], PyTree],
    ) -> dict[str, float] | None:
        """Writes verification.npz at the end of a run; see `save`.

        Args:
            run: whose students this verifier is for.
            path: of the file.
            student_variables: of all seeds.
            teacher_variables: gives those of the teacher; of all seeds, if it trained along.

        Returns:
            Figures of the teacher, of one that trained along the mean over the seeds; None where
            there is no teacher with embeddings.
        """
        found, known = {"student": self.similarity(student_variables)}, None
        module = None if run.teacher is None else run.teacher.module
        teacher = of(run, module, seeds=run.method.role.peer is not None)
        if teacher is not None:
            found["teacher"] = teacher.similarity(teacher_variables())
            known = mean_scores(teacher.scores(found["teacher"]))
        if jax.process_index() == 0:
            save(path, self.pairs, found)
        return known

    def scores(self, similarity: np.ndarray) -> list[dict[str, float]]:
        """What `verification.scores` says of each network."""
        same, folds = self.pairs.same, self.pairs.folds
        return [verification.scores(of_one, same, folds) for of_one in similarity]


def embedder(
    module: nn.Module, clean_view: Callable[[Array], Array], flip_average: bool
) -> evaluate.Predict:
    """Evaluation-mode embeddings of a face network on raw images.

    Args:
        module: with a method `embed`.
        clean_view: raw images -> network input.
        flip_average: whether to add the embedding of the mirror image; only the direction of the
            sum matters, so this is their mean.

    Examples:
        >>> import jax.numpy as jnp
        >>> from tgeo_jax import models
        >>> net = models.build("iresnet", 3, widths=(2, 2), depths=(1,), embedding=4)
        >>> images = jnp.ones((2, 8, 8, 1))
        >>> variables = net.init(jax.random.key(0), images)
        >>> embedder(net, lambda x: x, True)(variables, images).shape
        (2, 4)
    """

    def embed(variables: PyTree, images_BxHxWxC: Array) -> Array:
        inputs = clean_view(images_BxHxWxC)
        embeddings: Any = module.apply(variables, inputs, train=False, method="embed")
        if flip_average:
            embeddings += module.apply(variables, inputs[:, :, ::-1], train=False, method="embed")
        return embeddings

    return embed


def of(run: Run, module: nn.Module | None, *, seeds: bool) -> Verifier | None:
    """The verifier of one of a run's networks.

    Args:
        run: assembled.
        module: the student, or a teacher.
        seeds: whether its variables have a leading seed axis.

    Returns:
        None where the dataset has no pairs, or the network no embeddings.

    Examples:
        >>> from types import SimpleNamespace
        >>> digits = SimpleNamespace(dataset=SimpleNamespace(verification=None))
        >>> of(digits, None, seeds=True) is None
        True
    """
    pairs = run.dataset.verification
    if pairs is None or not hasattr(module, "embed"):
        return None
    assert module is not None
    evaluator = evaluate.Evaluator(
        embedder(module, run.method.clean_view, run.config.data.flip_average),
        run.config.data.eval_batch_size,
        seeds=seeds,
        one_by_one=run.loop_free,
        mesh=run.mesh,
    )
    labels = np.zeros(len(pairs.images), np.int32)
    images = parallel.put(Batch(pairs.images, labels), parallel.replicated(run.mesh))  # type: ignore[arg-type]
    return Verifier(pairs, evaluator, images)


def mean_scores(scores: list[dict[str, float]]) -> dict[str, float]:
    """Of several networks, the mean of each figure.

    Examples:
        >>> mean_scores([{"auc": 0.5}, {"auc": 1.0}])
        {'auc': 0.75}
    """
    return {name: float(np.mean([one[name] for one in scores])) for name in scores[0]}


def save(path: storage.Path, pairs: Pairs, similarity: Mapping[str, np.ndarray]) -> None:
    """Writes similarities, from which everything else can be computed.

    Args:
        path: of verification.npz: arrays `same` and `folds` [P], and by the role of the network
            (`student`, `teacher`) its similarities, [networks, P].
        pairs: what was compared.
        similarity: by role.

    Examples:
        >>> import pathlib, tempfile
        >>> images, pairs = np.zeros((3, 8, 8, 1), np.uint8), np.array([[0, 1], [0, 2]])
        >>> compared = Pairs(images, pairs, np.array([True, False]), np.array([0, 1]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder) / "verification.npz"
        ...     save(path, compared, {"student": np.array([[0.9, 0.1]])})
        ...     sorted(storage.read_arrays(path))
        ['folds', 'same', 'student']
    """
    arrays = {"same": pairs.same, "folds": pairs.folds, **similarity}
    storage.write_arrays(path, arrays)
