import itertools

import jax
import numpy as np
import pytest

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
        ("TEACHER_INIT", 7),
        ("TEACHER_DROPOUT", 8),
        ("TEACHER_OUTER_DROPOUT", 9),
        ("CACHED_VIEW", 10),
        ("GENERATION", 11),
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


def example_data(seed, view, ids):
    keys = randomness.example_keys(seed, view, np.asarray(ids))
    return [tuple(key) for key in jax.random.key_data(keys).tolist()]


def test_an_examples_key_depends_on_no_other_example():
    together = example_data(3, 1, [40, 7, 1436, 7])
    assert together == [example_data(3, 1, [i])[0] for i in (40, 7, 1436, 7)]
    assert together[1] == together[3]


def test_examples_views_and_seeds_all_tell_keys_apart():
    found = [
        k for seed in range(3) for view in range(3) for k in example_data(seed, view, range(9))
    ]
    assert len(set(found)) == 81


def test_a_traced_view_gives_the_same_keys():
    traced = jax.jit(lambda view, ids: randomness.example_keys(3, view, ids))(2, np.arange(4))
    found = [tuple(key) for key in jax.random.key_data(traced).tolist()]
    assert found == example_data(3, 2, range(4))


@pytest.mark.parametrize("seed", [0, 5, 2**32 - 1])
def test_the_first_generation_keeps_the_seed_itself(seed):
    assert randomness.of_generation(seed, 0) == seed


def test_generations_and_seeds_all_get_seeds_of_their_own():
    found = [randomness.of_generation(s, g) for s in range(20) for g in range(20)]
    assert all(type(seed) is int and 0 <= seed < 2**32 for seed in found)
    # Of 400 random 32-bit numbers two are equal once in 50,000 draws.
    assert len(set(found)) == 400


@pytest.mark.parametrize(
    ("seed", "generation", "pinned"), [(0, 1, 3365455186), (0, 2, 904166873), (7, 1, 3285728426)]
)
def test_generations_keep_their_seeds(seed, generation, pinned):
    # Other values would silently change every chain from then on.
    assert randomness.of_generation(seed, generation) == pinned


def test_numbers_of_neighbouring_steps_are_not_correlated():
    draws = jax.vmap(
        lambda step: jax.random.normal(randomness.key(0, step, Purpose.AUGMENT), (2000,))
    )(np.arange(5))
    off_diagonal = np.corrcoef(draws)[~np.eye(5, dtype=bool)]
    # 5 / sqrt(2000) = 0.11: five standard deviations of a correlation by chance.
    assert np.abs(off_diagonal).max() < 0.11
