"""A transformer encoder over the columns of a table."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from tgeo_jax.models.layers import Dtype, recomputed
from tgeo_jax.models.tables import Table, check_dropout, check_ids
from tgeo_jax.models.transformer import Block, layer_norm, weight_init

Array = jax.Array


def _uniform(key: Array, shape: tuple[int, ...], dtype: Dtype = jnp.float32) -> Array:
    """Between -1 and 1 over the square root of the width."""
    bound = shape[-1] ** -0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)


class _NumericTokens(nn.Module):
    """A token of each number: [B, F] -> [B, F, D]."""

    width: int

    @nn.compact
    def __call__(self, x_BxF: Array) -> Array:
        shape = (x_BxF.shape[-1], self.width)
        weight_FxD, bias_FxD = (self.param(n, _uniform, shape) for n in ("weight", "bias"))
        return x_BxF[..., None] * weight_FxD[None] + bias_FxD[None]


class RowEncoder(nn.Module):
    """BERT's encoder with the features of a row as its tokens.

    Numeric feature f becomes the token `x_f * weight_f + bias_f`, a categorical one a row of an
    embedding table; `weight_f`, `bias_f` and the rows are a feature's own, so that no positions are
    added. A class token stands before them; a linear layer reads it out, without BERT's pooler.

    Sizes are BERT's in depth only: a 4-layer student by default, a 12-layer teacher with
    `layers=12`. BERT normalises after the residual sum (`norm="post"`), which needs a warm-up of
    the learning rate to train 12 layers; `norm="pre"` does not, and has one more norm before the
    readout.

    Attributes:
        num_classes: K.
        vocabulary: values of each field; empty: inputs are numbers.
        layers: transformer blocks.
        width: D, of the tokens, a multiple of `heads`.
        heads: attention heads.
        dropout: share of values dropped in training, of the tokens and of what each half of a block
            adds.
        norm: `pre` or `post`.
        hash_buckets: rows of a categorical field at most, see `tables.field_sizes`; 0: no limit.
        held: see `tables.Table`.
        dtype: of the computation.
        remat: whether blocks are recomputed in the backward pass instead of kept.

    Raises:
        ValueError: images, indices without a vocabulary, numbers with one, or an option out of
            range.

    References:
        BERT (Devlin et al. 2018, arXiv 1810.04805); tokens of numbers as the feature
        tokenizer of FT-Transformer makes them (Gorishniy et al. 2021, arXiv 2106.11959).

    Examples:
        >>> net = RowEncoder(5, layers=1, width=8, heads=2)
        >>> net.init_with_output(jax.random.key(0), jnp.ones((2, 41)))[0].shape
        (2, 5)
    """

    num_classes: int
    vocabulary: Sequence[int] = ()
    layers: int = 4
    width: int = 64
    heads: int = 4
    dropout: float = 0.0
    norm: str = "pre"
    hash_buckets: int = 0
    held: int = 0
    dtype: Dtype = None
    remat: bool = False

    @nn.compact
    def __call__(self, rows_BxF: Array, train: bool = False) -> Array:
        self._check(rows_BxF)
        embed: nn.Module
        if self.vocabulary:
            embed = Table(
                self.vocabulary, self.width, self.hash_buckets, self.held, weight_init, name="table"
            )
        else:
            embed = _NumericTokens(self.width, name="tokens")
        x = embed(rows_BxF)
        x = x if self.dtype is None else x.astype(self.dtype)
        token = self.param("cls_token", weight_init, (1, 1, self.width))
        x = jnp.concatenate([jnp.tile(token.astype(x.dtype), (x.shape[0], 1, 1)), x], axis=1)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        first, block = self.norm == "pre", recomputed(Block, self.remat)
        for index in range(self.layers):
            layer = block(self.heads, self.dtype, self.dropout, first, name=f"blocks_{index}")
            x = layer(x, train)
        read = (layer_norm("norm", self.dtype)(x) if first else x)[:, 0]
        read = read.astype(jnp.promote_types(read.dtype, jnp.float32))
        return nn.Dense(self.num_classes, kernel_init=weight_init, name="head")(read)

    def _check(self, rows: Array) -> None:
        if self.norm not in ("pre", "post"):
            raise ValueError(f"norm={self.norm!r}: use one of pre, post")
        check_dropout(self.dropout)
        if self.vocabulary:
            check_ids("row_encoder", rows, self.vocabulary, held=self.held)
        elif rows.ndim != 2 or not jnp.issubdtype(rows.dtype, jnp.floating):
            raise ValueError(
                f"model 'row_encoder' reads rows of numbers, or of categories with a vocabulary; "
                f"its input is {rows.dtype} {list(rows.shape)}"
            )
