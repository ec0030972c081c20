"""Photographs of all sizes to squares of one size, as ImageNet networks are trained and asked."""

from __future__ import annotations

import io
import math

import numpy as np
from PIL import Image

_SHARE_OF_RESIZED = 224 / 256  # the centre crop's side over that of the resized image
Box = tuple[float, float, float, float]  # left, upper, right, lower, in pixels


def square(encoded: bytes, size: int, channels: int, rng: np.random.Generator | None) -> np.ndarray:
    """Decodes an image and resizes a part of it.

    Args:
        encoded: JPEG, PNG or what else Pillow reads; grey or CMYK too.
        size: S.
        channels: C, 3 or (grey) 1.
        rng: random numbers of a random resized crop; None for the centre.

    Returns:
        Pixels [S, S, C], uint8.

    Raises:
        Exception: whatever Pillow's decoders raise for an image that is damaged.
    """
    image = Image.open(io.BytesIO(encoded)).convert("RGB" if channels == 3 else "L")
    cut = centre_box(image.size, size) if rng is None else random_box(image.size, rng)
    resized = image.resize((size, size), Image.Resampling.BILINEAR, box=cut)
    return np.asarray(resized).reshape(size, size, channels)


def random_box(size: tuple[int, int], rng: np.random.Generator) -> Box:
    """The box of a random resized crop: 8 to 100 % of the area, sides 3:4 to 4:3.

    Args:
        size: width and height.
        rng: its random numbers.

    Returns:
        A box inside the image. After ten misses it is the largest centred one of allowed shape.

    References:
        GoogLeNet (Szegedy et al. 2014, arXiv 1409.4842), section 6; constants as in torchvision.

    Examples:
        >>> left, upper, right, lower = random_box((100, 50), np.random.default_rng(0))
        >>> 0 <= left < right <= 100, 0 <= upper < lower <= 50
        (True, True)
    """
    width, height = size
    for _ in range(10):
        area = width * height * rng.uniform(0.08, 1.0)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        wide, high = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < wide <= width and 0 < high <= height:
            left = int(rng.integers(0, width - wide + 1))
            upper = int(rng.integers(0, height - high + 1))
            return (left, upper, left + wide, upper + high)
    wide, high = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    left, upper = (width - wide) // 2, (height - high) // 2
    return (left, upper, left + wide, upper + high)


def centre_box(size: tuple[int, int], image_size: int) -> Box:
    """The box that resizing the shorter side to 256/224 of S and cropping the centre would keep.

    Args:
        size: width and height.
        image_size: S; the box is as many pixels of the resized image wide.

    Returns:
        The box, in pixels of the original.

    Examples:
        >>> centre_box((256, 512), 224)
        (16.0, 144.0, 240.0, 368.0)
    """
    width, height = size
    scale = round(image_size / _SHARE_OF_RESIZED) / min(width, height)
    # To whole pixels as usual, so that a published checkpoint sees what it was tested on.
    wide, high = max(int(width * scale + 1e-9), 1), max(int(height * scale + 1e-9), 1)
    left, upper = round((wide - image_size) / 2), round((high - image_size) / 2)
    across, down = width / wide, height / high  # pixels of the original in one of the resized
    return (
        left * across,
        upper * down,
        min((left + image_size) * across, width),
        min((upper + image_size) * down, height),
    )
