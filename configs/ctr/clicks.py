"""Click-through rates with any method, as in TGeo-KD (ICLR 2024, arXiv 2312.15112).

The argument is `dataset,method`: `frappe`, `movielens`, `criteo` or `avazu`, and the method, or
`teacher` for the teacher that the others need. Of the training rows a tenth is held out; the
teacher learns from 70 % of the rest, students from the other 30 %.
Needs the dataset (`python -m experiments.prepare --dataset=frappe --source=FOLDER`).
Command: python -m experiments.main --config=configs/ctr/clicks.py:frappe,tgeo \\
    --workdir=runs/frappe/tgeo
Of a log larger than memory (criteo, avazu), for the teacher and for students:
--config.data.pipeline=stream --config.data.oversample=False; see docs/data.md.
Other networks: --config.student.name=deepfm or dcn_v2, likewise of the teacher.
Cost: see docs/tables.md.
Expected: see docs/tables.md; criteo and avazu were run on stand-ins of their layout only.
"""

from ml_collections import ConfigDict

from configs import recipes
from tgeo_jax.data import clicks
from tgeo_jax.errors import ConfigError, nearest

DATASETS = tuple(
    layout.name for layout in (clicks.CRITEO, clicks.AVAZU, clicks.FRAPPE, clicks.MOVIELENS)
)


def get_config(argument: str = "frappe,tgeo") -> ConfigDict:
    dataset, comma, method = argument.partition(",")
    if not comma:
        raise ConfigError(f"--config=configs/ctr/clicks.py:{argument}: must end in dataset,method")
    if dataset not in DATASETS:
        raise ConfigError(f"dataset {dataset!r}: unknown{nearest(dataset, DATASETS)}")
    return recipes.clicks(dataset, method, f"runs/{dataset}")
