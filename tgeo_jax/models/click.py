"""Networks for the click-through rate: one logit from the rows of a table's categories.

Each returns [0, z]: with two classes, softmax is then the sigmoid of z and cross-entropy the
log-loss, so that every loss, ratio and metric takes them as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn import initializers

from tgeo_jax.models.layers import Dtype
from tgeo_jax.models.tables import Table, check_dropout, check_ids

Array = jax.Array


def pairs(rows_BxFxD: Array) -> Array:
    """Sum over all pairs of fields of the product of their rows, [B], in time linear in F.

    `sum_{f<g} <v_f, v_g> = 1/2 sum_d [(sum_f v_fd)^2 - sum_f v_fd^2]`.

    References:
        Rendle 2010, factorization machines, lemma 3.1; DeepFM (arXiv 1703.04247), equation 2.

    Examples:
        >>> print(pairs(jnp.array([[[1.0], [2.0], [3.0]]])))    # 1*2 + 1*3 + 2*3
        [11.]
    """
    square_of_sum = jnp.square(rows_BxFxD.sum(axis=1))
    return 0.5 * (square_of_sum - jnp.square(rows_BxFxD).sum(axis=1)).sum(axis=-1)


def _two_logits(z_B: Array) -> Array:
    z_B = z_B.astype(jnp.promote_types(z_B.dtype, jnp.float32))
    return jnp.stack([jnp.zeros_like(z_B), z_B], axis=-1)


class _Clicks(nn.Module):
    """What the three networks have in common.

    Attributes:
        num_classes: 2.
        vocabulary: values of each field, the unknown one counted.
        embedding: width of a row.
        hidden: widths of the deep part.
        dropout: share of its hidden units dropped in training.
        hash_buckets: rows of a field at most, see `tables.field_sizes`; 0: no limit.
        held: see `tables.Table`.
        dtype: of the deep part's computation; logits are float32 or better.
    """

    num_classes: int
    vocabulary: Sequence[int] = ()
    embedding: int = 16
    hidden: Sequence[int] = (64, 32)
    dropout: float = 0.0
    hash_buckets: int = 0
    held: int = 0
    dtype: Dtype = None

    def _check(self, name: str, ids: Array) -> None:
        check_ids(name, ids, self.vocabulary, held=self.held)
        check_dropout(self.dropout)
        if self.num_classes != 2:
            raise ValueError(
                f"model {name!r} tells clicks from the rest: its dataset must have 2 classes, and "
                f"this one has {self.num_classes}; use 'row_encoder'"
            )

    def _rows(self, ids_BxF: Array) -> Array:
        """The embeddings, [B, F, D]."""
        return self._table(self.embedding, "table")(ids_BxF)

    def _wide(self, ids_BxF: Array) -> Array:
        """The linear part, a weight for each value: [B]."""
        weights_BxFx1 = self._table(1, "wide", init=initializers.zeros)(ids_BxF)
        return weights_BxFx1[..., 0].sum(axis=1)

    def _table(self, width: int, name: str, **init: Any) -> Table:
        return Table(self.vocabulary, width, self.hash_buckets, self.held, name=name, **init)

    def _tower(self, x: Array, train: bool) -> Array:
        """(Dense, ReLU, dropout) for each width."""
        for index, width in enumerate(self.hidden):
            x = nn.relu(nn.Dense(width, dtype=self.dtype, name=f"deep_{index}")(x))
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return x


def _readout(x: Array) -> Array:
    """One number a row, with the network's only free bias, in float32 or better."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return nn.Dense(1, name="head")(x)[:, 0]


class WideDeep(_Clicks):
    """A linear model beside a network of embeddings: `z = sum_f w_f(id_f) + deep(v_1, ..., v_F)`.

    The wide part has a weight for each value, and no cross products chosen by hand.

    Attributes: as of `_Clicks`.

    Raises:
        ValueError: another number of classes, an input that is no table of categories, or an
            option out of range.

    References:
        Cheng et al. 2016 (arXiv 1606.07792), equation 3.

    Examples:
        >>> net = WideDeep(2, (3, 4), embedding=2, hidden=(5,))
        >>> net.init_with_output(jax.random.key(0), jnp.array([[1, 0]]))[0].shape
        (1, 2)
    """

    @nn.compact
    def __call__(self, ids_BxF: Array, train: bool = False) -> Array:
        self._check("wide_deep", ids_BxF)
        rows_BxFxD, wide_B = self._rows(ids_BxF), self._wide(ids_BxF)
        deep = self._tower(rows_BxFxD.reshape(len(ids_BxF), -1), train)
        return _two_logits(wide_B + _readout(deep))


class DeepFM(_Clicks):
    """A factorisation machine and a network on the same rows.

    `z = sum_f w_f(id_f) + sum_{f<g} <v_f, v_g> + deep(v_1, ..., v_F)`.

    Attributes: as of `_Clicks`.

    Raises:
        ValueError: as `WideDeep`.

    References:
        Guo et al. 2017 (arXiv 1703.04247), equations 1 to 4.

    Examples:
        >>> net = DeepFM(2, (3, 4), embedding=2, hidden=(5,))
        >>> net.init_with_output(jax.random.key(0), jnp.array([[1, 0]]))[0].shape
        (1, 2)
    """

    @nn.compact
    def __call__(self, ids_BxF: Array, train: bool = False) -> Array:
        self._check("deepfm", ids_BxF)
        rows_BxFxD, wide_B = self._rows(ids_BxF), self._wide(ids_BxF)
        deep = self._tower(rows_BxFxD.reshape(len(ids_BxF), -1), train)
        return _two_logits(wide_B + pairs(rows_BxFxD) + _readout(deep))


class DCNv2(_Clicks):
    """Cross layers of full rank beside a network: the parallel structure of DCN-V2.

    `x_{l+1} = x_0 * (W_l x_l + b_l) + x_l` from `x_0 = (v_1, ..., v_F)`; z is linear in the last
    x and the last hidden layer together. The paper finds parallel and stacked each better on some
    data; this one keeps the deep part that of the other two networks.

    Attributes: as of `_Clicks`, and
        cross_layers: how many, at least 1.

    Raises:
        ValueError: as `WideDeep`.

    References:
        Wang et al. 2021 (arXiv 2008.13535), equation 1 and figure 1, the parallel structure.

    Examples:
        >>> net = DCNv2(2, (3, 4), embedding=2, hidden=(5,))
        >>> net.init_with_output(jax.random.key(0), jnp.array([[1, 0]]))[0].shape
        (1, 2)
    """

    cross_layers: int = 3

    @nn.compact
    def __call__(self, ids_BxF: Array, train: bool = False) -> Array:
        self._check("dcn_v2", ids_BxF)
        if self.cross_layers < 1:
            raise ValueError(f"cross_layers={self.cross_layers}: must be at least 1")
        rows_BxFxD = self._rows(ids_BxF)
        first_BxX = rows_BxFxD.reshape(len(ids_BxF), -1)
        crossed_BxX = first_BxX
        for index in range(self.cross_layers):
            layer = nn.Dense(first_BxX.shape[1], dtype=self.dtype, name=f"cross_{index}")
            crossed_BxX = first_BxX * layer(crossed_BxX) + crossed_BxX
        deep = self._tower(first_BxX, train)
        return _two_logits(_readout(jnp.concatenate([crossed_BxX, deep], axis=1)))
