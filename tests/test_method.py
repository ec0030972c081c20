"""What a method refuses, and what it says of itself."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from tests import methods
from tgeo_jax import distill, models, ratios, roles

MLP = models.build("mlp", methods.NUM_CLASSES, hidden=())
ONLINE = {"dml": roles.dml(MLP), "trikd": roles.trikd(MLP)}
# A frozen teacher with an anchor trains nothing along.
OFFLINE = {
    "frozen": roles.frozen(MLP),
    "cached": roles.cached(MLP),
    "each": roles.several(roles.Ensemble((MLP, MLP)), workdirs=("a", "b"), combine="each"),
    "trikd frozen": roles.trikd(MLP, start="frozen"),
}
LEARNED = {"tgeo", "bikd", "rw"}  # from an outer loss


def _method(role, ratio, **changes):
    return methods.method(role=role, ratio=ratios.RATIOS[ratio](), **changes)


@pytest.mark.parametrize("ratio", ratios.RATIOS)
@pytest.mark.parametrize("role", [*OFFLINE, *ONLINE])
def test_a_method_is_meta_learned_by_its_ratio(ratio, role):
    assert _method({**OFFLINE, **ONLINE}[role], ratio).meta_learned == (ratio in LEARNED)


@pytest.mark.parametrize("ratio", ratios.RATIOS)
def test_without_a_teacher_nothing_is_learned_from_an_outer_loss(ratio):
    assert not _method(roles.alone(None), ratio).meta_learned


@pytest.mark.parametrize("role", OFFLINE)
@pytest.mark.parametrize("order", distill.ORDERS)
@pytest.mark.parametrize("ratio", ["constant", "tgeo", "bikd"])
def test_every_order_goes_with_a_teacher_that_is_frozen(role, order, ratio):
    assert _method(OFFLINE[role], ratio, order=order, meta_every=3).order == order


@pytest.mark.parametrize("role", ONLINE)
@pytest.mark.parametrize("ratio", sorted(LEARNED))
def test_prequential_is_refused_with_a_teacher_that_trains_along(role, ratio):
    with pytest.raises(ValueError, match=r"meta\.order='prequential'.*will have changed.*use meta"):
        _method(ONLINE[role], ratio, order="prequential")
    assert _method(ONLINE[role], ratio, order="fusion_first").meta_learned


@pytest.mark.parametrize("role", ONLINE)
def test_an_order_without_meaning_refuses_nothing(role):
    """Where nothing is learned there is no order to keep: sweeps over the ratio may set it."""
    for ratio in set(ratios.RATIOS) - LEARNED:
        assert not _method(ONLINE[role], ratio, order="prequential", meta_every=2).meta_learned


@pytest.mark.parametrize("order", distill.ORDERS)
@pytest.mark.parametrize("ratio", ratios.RATIOS)
def test_without_a_teacher_every_order_will_do(order, ratio):
    _method(roles.alone(None), ratio, order=order, meta_every=2)


@pytest.mark.parametrize("estimator", ["reverse", "finite_difference"])
@pytest.mark.parametrize("role", [roles.alone(None), *OFFLINE.values(), *ONLINE.values()])
def test_prequential_is_refused_with_other_estimators(estimator, role):
    said = rf"meta\.estimator='{estimator}': meta\.order='prequential'.*meta\.estimator='mixed'"
    with pytest.raises(ValueError, match=said):
        _method(role, "constant", order="prequential", estimator=estimator)


@pytest.mark.parametrize("role", [roles.alone(None), *OFFLINE.values(), *ONLINE.values()])
def test_an_unknown_order_is_named_with_the_known_ones(role):
    said = r"meta\.order='teacher_first': use one of student_first, fusion_first, prequential"
    with pytest.raises(ValueError, match=said):
        _method(role, "tgeo", order="teacher_first")


@pytest.mark.parametrize(("field", "value"), [("order", "prequential"), ("meta_every", 2)])
def test_rw_is_refused_where_its_weights_would_be_missing(field, value):
    with pytest.raises(ValueError, match=r"ratio\.name='rw'"):
        _method(roles.frozen(MLP), "rw", **{field: value})
    assert _method(roles.frozen(MLP), "rw", order="fusion_first", meta_every=1).meta_learned


def test_length_of_training_is_counted_in_steps():
    method = _method(roles.alone(None), "constant", steps_per_epoch=7, num_epochs=13)
    assert method.total_steps == 91


@pytest.mark.parametrize("name", [name for name in {**OFFLINE, **ONLINE} if name != "each"])
def test_one_teacher_has_the_ratio_as_it_is(name):
    method = _method({**OFFLINE, **ONLINE}[name], "tgeo")
    assert method.fusion_ratio is method.ratio


@pytest.mark.parametrize("ratio", ratios.RATIOS)
def test_each_of_several_teachers_has_a_ratio_of_its_own(ratio):
    method = _method(OFFLINE["each"], ratio)
    one, both = (
        jax.eval_shape(lambda key, ratio=ratio: ratio.init(key, 4), jax.random.key(0))
        for ratio in (method.ratio, method.fusion_ratio)
    )
    assert jax.tree.map(lambda leaf: (2, *leaf.shape), one) == jax.tree.map(jnp.shape, both)
    assert (method.fusion_ratio.per_batch is None) == (ratio != "rw")
    assert method.fusion_ratio is method.fusion_ratio  # made once: it is compared by identity


def test_the_pure_step_loads_no_network(command):
    said = "import sys, tgeo_jax.distill, tgeo_jax.parallel; print(*sys.modules)"
    loaded = command("-c", said).stdout.split()
    assert {"tgeo_jax.bilevel", "tgeo_jax.method", "tgeo_jax.state"} <= set(loaded)
    assert not [name for name in loaded if name.startswith("tgeo_jax.models")]
