"""Attack detection in power systems with any method, as in TGeo-KD (ICLR 2024, arXiv 2312.15112).

The argument is `variant,method`: `binary`, `3class` or `37class`, and the method or `teacher`; for
the paper's BERT over features as tokens `variant,row_encoder,method`. 128 measurements of four
relays. Needs the dataset of that variant (`python -m experiments.prepare
--dataset=power_attack_3class --source=FOLDER`, with the folder of data1.csv to data15.csv); its
files are not redistributable: this config was run on stand-ins of their layout only.
Command: python -m experiments.main --config=configs/attack/power_attack.py:3class,tgeo \\
    --workdir=runs/power_attack_3class/tgeo
Cost: not measured yet.
Expected: no run is recorded yet; the paper reports accuracy 92.39 (teacher 88.19), with other
networks.
"""

from ml_collections import ConfigDict

from configs import recipes
from tgeo_jax.errors import ConfigError, nearest

VARIANTS = ("binary", "3class", "37class")


def get_config(argument: str = "3class,tgeo") -> ConfigDict:
    variant, comma, method = argument.partition(",")
    if not comma:
        raise ConfigError(
            f"--config=configs/attack/power_attack.py:{argument}: must end in variant,method"
        )
    if variant not in VARIANTS:
        raise ConfigError(f"variant {variant!r}: unknown{nearest(variant, VARIANTS)}")
    name = f"power_attack_{variant}"
    return recipes.attack(name, method, f"runs/{name}")
