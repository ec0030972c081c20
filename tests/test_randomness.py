import itertools

import jax
import numpy as np

from tgeo_jax import randomness
from tgeo_jax.randomness import Purpose


def data(*args):
    return tuple(np.asarray(jax.random.key_data(randomness.key(*args))).tolist())


def test_purposes_keep_their_numbers():
    # A renumbered purpose would silently change every result from then on.
    pinned = [
        ("STUDENT_INIT", 0),
        ("FUSION_INIT", 1),
        ("TRAIN_ORDER", 2),
        ("VALIDATION_ORDER", 3),
        ("AUGMENT", 4),
        ("DROPOUT", 5),
        ("OUTER_DROPOUT", 6),
    ]
    assert [(p.name, p.value) for p in Purpose][: len(pinned)] == pinned


def test_seed_step_and_purpose_all_tell_keys_apart():
    # Small numbers in every place, so that (1, 2) and (2, 1) are among them.
    places = list(itertools.product(range(4), range(4), Purpose))
    assert len({data(*place) for place in places}) == len(places)


def test_the_same_place_gives_the_same_key():
    assert data(3, 5, Purpose.AUGMENT) == data(3, 5, Purpose.AUGMENT)


def test_a_traced_seed_and_step_give_the_same_key():
    traced = jax.jit(lambda seed, step: randomness.key(seed, step, Purpose.DROPOUT))(3, 5)
    assert tuple(jax.random.key_data(traced).tolist()) == data(3, 5, Purpose.DROPOUT)


def test_seeds_under_vmap_get_the_keys_they_have_alone():
    keys = jax.vmap(lambda seed: randomness.key(seed, 7, Purpose.TRAIN_ORDER))(np.arange(3))
    alone = [data(seed, 7, Purpose.TRAIN_ORDER) for seed in range(3)]
    assert [tuple(k) for k in jax.random.key_data(keys).tolist()] == alone


def test_numbers_of_neighbouring_steps_are_not_correlated():
    draws = jax.vmap(
        lambda step: jax.random.normal(randomness.key(0, step, Purpose.AUGMENT), (2000,))
    )(np.arange(5))
    off_diagonal = np.corrcoef(draws)[~np.eye(5, dtype=bool)]
    # 5 / sqrt(2000) = 0.11: five standard deviations of a correlation by chance.
    assert np.abs(off_diagonal).max() < 0.11
