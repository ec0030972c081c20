"""Attack detection on NSL-KDD with any method, as in TGeo-KD (ICLR 2024, arXiv 2312.15112).

The argument is the method, or `teacher` for the teacher that the others need. Five classes, 41
features, of which three are one-hot encoded; the test files hold attacks that training does not.
Needs the dataset (`python -m experiments.prepare --dataset=nsl_kdd --source=FOLDER`).
Command: python -m experiments.main --config=configs/attack/nsl_kdd.py:tgeo \\
    --workdir=runs/nsl_kdd/tgeo
"""

from ml_collections import ConfigDict

from configs import recipes


def get_config(argument: str = "tgeo") -> ConfigDict:
    return recipes.attack("nsl_kdd", argument, "runs/nsl_kdd")
