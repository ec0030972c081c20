"""A dataset of one's own: drawn bars and crosses, as a TFDS builder that needs no TensorFlow.

python examples/own_data.py --workdir=runs/own_data --data_dir=runs/own_data/tfds
"""

import argparse
import io

import numpy as np
import tensorflow_datasets as tfds
from ml_collections import ConfigDict
from PIL import Image

from tgeo_jax import config as configs
from tgeo_jax import generations
from tgeo_jax.data import sources


class Strokes(tfds.core.GeneratorBasedBuilder):
    """Grey images [8, 8, 1] with a horizontal bar, a vertical bar, or both."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "id": tfds.features.Text(),  # examples are read in its order
            "image": tfds.features.Image(shape=(8, 8, 1)),
            "label": tfds.features.ClassLabel(names=["horizontal", "vertical", "cross"]),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        # Your files would be read here. What is held out of "train" is not your business.
        return {"train": self._generate_examples(0, 600), "test": self._generate_examples(1, 150)}

    def _generate_examples(self, seed: int, count: int):
        random = np.random.RandomState(seed)
        for number in range(count):
            label = number % 3
            pixels = random.randint(0, 75, (8, 8)).astype(np.uint8)
            if label != 1:
                pixels[random.randint(8), :] += 90
            if label != 0:
                pixels[:, random.randint(8)] += 90
            png = io.BytesIO()  # an array would need TensorFlow to be written
            Image.fromarray(pixels).save(png, "PNG")
            png.seek(0)
            key = f"{number:05d}"
            yield key, {"id": key, "image": png, "label": label}


sources.BUILDERS["strokes"] = lambda data_dir: Strokes(
    data_dir=data_dir or None, file_format="array_record"
)


def get_config() -> ConfigDict:
    """A student alone; a teacher's configuration would be the same with another network."""
    config = configs.default()
    config.data.name = "strokes"
    config.role.name = "alone"
    config.student.cnn.widths = (8, 16)
    config.optimizer.schedule = "cosine"
    config.train.update(epochs=15, checkpoint_every=5)
    return config


def main(workdir: str, data_dir: str) -> None:
    sources.prepare("strokes", data_dir)
    config = get_config()
    config.data.dir = data_dir
    result = generations.run(config, f"{workdir}/student")
    print(f"student: test accuracy {result['test_accuracy']['last']['mean']:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", default="runs/own_data", help="folder of the run")
    parser.add_argument("--data_dir", default="", help="TFDS folder; empty: TFDS's own")
    args = parser.parse_args()
    main(args.workdir, args.data_dir)
