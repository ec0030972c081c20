"""TFDS builder of scikit-learn's bundled handwritten digits: real images without a download."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

_DESCRIPTION = """
1,797 handwritten digits of the UCI set "Optical Recognition of Handwritten Digits" (its test
part), 8x8 pixels, as bundled with scikit-learn. Grey levels 0..16 are stored times 15. The split
into train (1,437) and test (360) is stratified by class and fixed by this builder's version.
"""
_CITATION = """
@misc{alpaydin1998digits, author={Alpaydin, E. and Kaynak, C.},
  title={Optical Recognition of Handwritten Digits}, howpublished={UCI Machine Learning Repository},
  year={1998}, doi={10.24432/C50P49}}
"""
_GREY_SCALE = 15  # 16 * 15 = 240 fits a byte, and the grey levels stay exact


class Digits(tfds.core.GeneratorBasedBuilder):
    """Images uint8 [8, 8, 1], label in 0..9, id = index in scikit-learn's array."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {"1.0.0": "Stratified 80/20 split, random_state 0."}

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            description=_DESCRIPTION,
            citation=_CITATION,
            homepage="https://archive.ics.uci.edu/dataset/80",
            features=tfds.features.FeaturesDict(
                {
                    "id": tfds.features.Text(),
                    "image": tfds.features.Image(shape=(8, 8, 1)),
                    "label": tfds.features.ClassLabel(names=[str(d) for d in range(10)]),
                }
            ),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        del dl_manager
        digits = load_digits()
        train, test = train_test_split(
            np.arange(len(digits.target)), test_size=0.2, stratify=digits.target, random_state=0
        )
        return {
            "train": self._generate_examples(digits, np.sort(train)),
            "test": self._generate_examples(digits, np.sort(test)),
        }

    def _generate_examples(self, digits: Any, indices: np.ndarray) -> Iterator:
        for index in indices:
            pixels = (digits.images[index] * _GREY_SCALE).astype(np.uint8)
            # PNG bytes: encoding an array through the Image feature would need TensorFlow.
            png = io.BytesIO()
            Image.fromarray(pixels).save(png, "PNG")
            png.seek(0)
            key = f"digits_{index:04d}"
            yield key, {"id": key, "image": png, "label": int(digits.target[index])}
