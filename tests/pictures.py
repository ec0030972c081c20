"""A stand-in for ImageNet: TFDS's own builder, features and class names, a few small photographs.

The photographs are cut from the two that come with scikit-learn. As in ImageNet they are JPEGs of
all sizes, some of them grey, one in CMYK.
"""

from __future__ import annotations

import functools
import io
import tempfile
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from sklearn.datasets import load_sample_images
from tensorflow_datasets.datasets.imagenet2012 import imagenet2012_dataset_builder as original

from tgeo_jax.data import preparing

CLASSES = 7  # of the 1,000, so that a few images fill them
CMYK = 2  # the number of that image in each split; every fifth is grey


def prepare_imagenet(
    data_dir: str,
    train: int = 40,
    validation: int = 12,
    *,
    corrupt: Collection[str] = (),
    sides: tuple[int, int] = (24, 80),
    files: int = 1,
) -> None:
    """Writes `imagenet2012` as array_record, for `sources.builder("imagenet2012", data_dir)`.

    Args:
        data_dir: TFDS folder.
        train: how many images.
        validation: likewise; 0 leaves the split out.
        corrupt: file names (see `file_name`) of images whose second half is missing.
        sides: smallest and largest width and height.
        files: into how many each split is cut, at most as many as images.
    """
    writer = _Writer(data_dir=data_dir, file_format="array_record")
    writer.sizes = {"train": train, "validation": validation}
    writer.corrupt, writer.sides = corrupt, sides
    config = tfds.download.DownloadConfig(num_shards=files)
    with preparing.without_bars_of_tfds(), tempfile.TemporaryDirectory() as downloads:
        writer.download_and_prepare(download_dir=downloads, download_config=config)


def file_name(split: str, number: int) -> str:
    """What an image is called, and its key.

    Examples:
        >>> file_name("train", 3)
        'train_3.JPEG'
    """
    return f"{split}_{number}.JPEG"


def label(number: int) -> int:
    """The class of an image, whose name tells its number.

    Examples:
        >>> label(9)
        2
    """
    return number % CLASSES


def picture(split: str, number: int, sides: tuple[int, int] = (24, 80)) -> Image.Image:
    """An image before it is encoded: RGB, grey or CMYK."""
    random = np.random.RandomState([number, len(split)])
    photograph = _photographs()[number % 2]
    width, height = (int(side) for side in random.randint(sides[0], sides[1] + 1, 2))
    left = random.randint(photograph.width - width + 1)
    upper = random.randint(photograph.height - height + 1)
    cut = photograph.crop((left, upper, left + width, upper + height))
    if number == CMYK:
        return cut.convert("CMYK")
    return cut.convert("L") if number % 5 == 0 else cut


def encoded(image: Image.Image) -> bytes:
    """As JPEG."""
    jpeg = io.BytesIO()
    image.save(jpeg, "JPEG", quality=90)
    return jpeg.getvalue()


class _Writer(original.Builder, skip_registration=True):  # type: ignore[call-arg, misc]
    """Hands TFDS examples that its own code would read from the archives with TensorFlow."""

    name = "imagenet2012"
    sizes: dict[str, int]
    corrupt: Collection[str]
    sides: tuple[int, int]

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        del dl_manager
        return {
            split: self._generate_examples(split, count)
            for split, count in self.sizes.items()
            if count
        }

    def _generate_examples(self, split: str, count: int) -> Iterator:
        for number in range(count):
            name = file_name(split, number)
            jpeg = encoded(picture(split, number, self.sides))
            if name in self.corrupt:
                jpeg = jpeg[: len(jpeg) // 2]
            # A file, since encoding an array would need TensorFlow.
            yield name, {"file_name": name, "image": io.BytesIO(jpeg), "label": label(number)}


@functools.cache
def _photographs() -> tuple[Image.Image, ...]:
    return tuple(Image.fromarray(pixels) for pixels in load_sample_images().images)
