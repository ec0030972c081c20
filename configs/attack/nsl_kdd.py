"""Attack detection on NSL-KDD with any method, as in TGeo-KD (ICLR 2024, arXiv 2312.15112).

The argument is the method, or `teacher` for the teacher that the others need; for the paper's BERT
over features as tokens, 12 layers teaching 4, `row_encoder,` comes before it. Five classes, 41
features, of which three are one-hot encoded; the test files hold attacks that training does not.
Needs the dataset (`python -m experiments.prepare --dataset=nsl_kdd --source=FOLDER`).
Command: python -m experiments.main --config=configs/attack/nsl_kdd.py:tgeo \\
    --workdir=runs/nsl_kdd/tgeo
Of encoders: --config=configs/attack/nsl_kdd.py:row_encoder,tgeo, in runs/nsl_kdd/row_encoder/tgeo.
Cost: one seed takes 1 to 3 minutes on two busy CPU cores, with the file of 25,192 training rows;
encoders of 16 numbers a token on a tenth of it, 8 epochs: 5 to 10 minutes (docs/tables.md).
Expected: with that file and one seed, test accuracy 76.7 (teacher), 77.8 (plain), 77.5 (kd), 77.7
(tgeo), and 98 % to 99 % on what is held out of training: the test files hold attacks that training
lacks. With one seed the students' differences mean nothing. The paper's 92.39 is of other data.
"""

from ml_collections import ConfigDict

from configs import recipes


def get_config(argument: str = "tgeo") -> ConfigDict:
    return recipes.attack("nsl_kdd", argument, "runs/nsl_kdd")
