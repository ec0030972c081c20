"""What face networks share: PReLU, the cosine head, and a backbone before it."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn import initializers

from tgeo_jax import numeric
from tgeo_jax.models.layers import Dtype

Array = jax.Array
_SMALLEST_SQUARE = 1e-12  # of a length: what is shorter than 1e-6 has no direction


class PReLU(nn.Module):
    """`max(x, 0) + a_c min(x, 0)` with a slope for each channel, 0.25 at first.

    Examples:
        >>> layer, x = PReLU(None), -jnp.ones((1, 1, 1, 2))
        >>> print(layer.init_with_output(jax.random.key(0), x)[0].ravel())
        [-0.25 -0.25]
    """

    dtype: Dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        slope_C = self.param("scale", initializers.constant(0.25), (x.shape[-1],))
        slope = slope_C.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
        return jnp.where(x >= 0, x, slope * x)


def normalised(vectors: Array) -> Array:
    """Vectors of length 1 along the last axis, in float32 or better; 0 stays 0.

    Examples:
        >>> print(normalised(jnp.array([[3., 4.], [0., 0.]])))
        [[0.6 0.8]
         [0.  0. ]]
    """
    vectors = numeric.at_least_float32(vectors)
    squares = jnp.sum(vectors**2, axis=-1, keepdims=True)
    return vectors * jax.lax.rsqrt(jnp.maximum(squares, _SMALLEST_SQUARE))


class CosineHead(nn.Module):
    """`soft_scale * cos(theta_k)`, theta_k the angle between an embedding and class k's weights.

    In float32 or better, on accelerators too: a margin is lost in bfloat16's three digits.

    Attributes:
        num_classes: K.
        soft_scale: > 0.

    Examples:
        >>> head, embeddings = CosineHead(5, 16.0), jnp.ones((2, 3))
        >>> logits = head.init_with_output(jax.random.key(0), embeddings)[0]
        >>> logits.shape, bool((jnp.abs(logits) <= 16.001).all())
        ((2, 5), True)
    """

    num_classes: int
    soft_scale: float

    @nn.compact
    def __call__(self, embeddings_BxD: Array) -> Array:
        shape = (self.num_classes, embeddings_BxD.shape[-1])
        weight_KxD = self.param("weight", initializers.normal(0.01), shape)
        cosines_BxK = jnp.matmul(
            normalised(embeddings_BxD),
            normalised(weight_KxD).T,
            precision=jax.lax.Precision.HIGHEST,
        )
        return self.soft_scale * cosines_BxK


class FaceNetwork(nn.Module):
    """A backbone, the embeddings it makes, and a cosine head on them; a base for face networks.

    `apply(variables, images) -> logits_BxK`, and
    `apply(variables, images, method="embed") -> embeddings_BxD`, D = `embedding`; two images are
    compared by the cosine of theirs.

    Attributes:
        num_classes: K.
        embedding: D.
        soft_scale: logits are this times the cosines. Margin losses have a scale of their own; 64,
            which is usual there, would make soft targets at temperature 1 nearly one-hot.
        dtype: of the backbone's computation; embeddings and head are float32.
        remat: whether blocks are recomputed in the backward pass instead of kept.

    Examples: the networks that derive from it, `iresnet.IResNet` for one.
    """

    num_classes: int
    embedding: int = 512
    soft_scale: float = 16.0
    dtype: Dtype = None
    remat: bool = False

    def backbone(self) -> nn.Module:
        """A module (images_BxHxWxC, train) -> embeddings_BxD."""
        raise NotImplementedError

    def setup(self) -> None:
        self.features = self.backbone()
        self.head = CosineHead(self.num_classes, self.soft_scale)

    def embed(self, images_BxHxWxC: Array, train: bool = False) -> Array:
        """Embeddings [B, D], not normalised."""
        embeddings_BxD: Array = self.features(images_BxHxWxC, train)
        return embeddings_BxD

    def __call__(self, images_BxHxWxC: Array, train: bool = False) -> Array:
        logits_BxK: Array = self.head(self.embed(images_BxHxWxC, train))
        return logits_BxK
