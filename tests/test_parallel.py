import os
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tgeo_jax import parallel
from tgeo_jax.errors import ConfigError
from tgeo_jax.state import Fusion, Learner, Peer, TrainState


def mesh_of(size):
    """Stands for a mesh with that many devices along its data axis."""
    return types.SimpleNamespace(shape={"seed": 1, "data": size, "model": 1})


@pytest.mark.parametrize(("batch_size", "size"), [(64, 1), (63, 1), (64, 8), (8, 8)])
def test_a_batch_that_is_cut_evenly_passes(batch_size, size):
    assert parallel.check_batch(mesh_of(size), "data.batch_size", batch_size) is None


@pytest.mark.parametrize(
    ("batch_size", "size", "use"), [(63, 4, "60 or 64"), (65, 8, "64 or 72"), (3, 4, "4")]
)
def test_a_batch_that_is_not_names_field_value_devices_and_fitting_sizes(batch_size, size, use):
    said = rf"^meta\.batch_size={batch_size}: not divisible by the {size} devices.*use {use}$"
    with pytest.raises(ConfigError, match=said):
        parallel.check_batch(mesh_of(size), "meta.batch_size", batch_size)


def test_a_mesh_of_one_device_has_all_axes():
    shape = dict(parallel.make_mesh(1, jax.devices()[:1]).shape)
    assert shape == {"seed": 1, "data": 1, "model": 1}


def test_model_and_data_axis_share_a_batch():
    mesh = types.SimpleNamespace(shape={"seed": 2, "data": 4, "model": 2})
    assert parallel.batch_parts(mesh) == 8
    with pytest.raises(ConfigError, match=r"^meta\.batch_size=12: not divisible by the 8 devices"):
        parallel.check_batch(mesh, "meta.batch_size", 12)


def test_a_model_axis_that_does_not_divide_what_is_left_raises():
    with pytest.raises(ConfigError, match=r"^mesh\.model=3: must divide the 1 devices"):
        parallel.make_mesh(1, jax.devices()[:1], model_devices=3)


def test_a_seed_axis_that_does_not_divide_the_devices_raises():
    with pytest.raises(ConfigError, match=r"^mesh\.seed=2: must divide .* devices, 1$"):
        parallel.make_mesh(2, jax.devices()[:1])


def state(seeds):
    params = {"w": jnp.arange(3.0 * seeds).reshape(seeds, 3)}
    return TrainState(
        step=jnp.int32(7),
        seed=jnp.arange(seeds),
        student=Learner(params, {}, params),
        fusion=Fusion({}, ()),
        teacher=Peer(Learner(params, {}, ()), jnp.arange(4.0 * seeds).reshape(seeds, 2, 2)),
        anchor=params,
    )


def test_vmap_over_seeds_leaves_the_step_one_number():
    ranks = []

    def see(one):
        of_teacher = (one.teacher.learner.params["w"], one.teacher.class_means_KxK)
        leaves = (one.step, one.seed, one.student.params["w"], *of_teacher, one.anchor["w"])
        ranks.append(tuple(jnp.ndim(leaf) for leaf in leaves))
        return one

    found = jax.vmap(see, in_axes=(parallel.SEED_AXES,), out_axes=parallel.SEED_AXES)(state(2))
    assert ranks == [(0, 0, 1, 1, 2, 1)]
    np.testing.assert_array_equal(found.step, 7)


def test_a_placed_state_keeps_its_values():
    mesh = parallel.make_mesh(1, jax.devices()[:1])
    placed = jax.device_put(state(2), parallel.state_shardings(mesh))
    jax.tree.map(np.testing.assert_array_equal, placed, state(2))


_ON_EIGHT_DEVICES = """
import jax
from tgeo_jax import parallel
import numpy as np
mesh = parallel.make_mesh(2, model_devices=2)
print(dict(mesh.shape))
shardings = parallel.state_shardings(mesh)
of_seeds = (shardings.student, shardings.teacher, shardings.anchor)
print(shardings.step.shard_shape(()), *(one.shard_shape((4, 3)) for one in of_seeds))
print(parallel.batch_sharding(mesh).shard_shape((4, 8, 5)))
print(parallel.replicated(mesh).shard_shape((6, 8)))
teacher = {"kernel": np.ones((6, 64)), "wide": np.ones((8, 3)), "bias": np.ones(7)}
for name, where in parallel.weight_shardings(mesh, teacher).items():
    print(name, where.shard_shape(teacher[name].shape))
placed = parallel.put(teacher, parallel.weight_shardings(mesh, teacher))
print(all((parallel.fetch(placed)[name] == teacher[name]).all() for name in teacher))
"""


def test_eight_devices_cut_seeds_in_two_and_batches_in_four():
    done = subprocess.run(
        [sys.executable, "-c", _ON_EIGHT_DEVICES],
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
            "PYTHONPATH": os.pathsep.join(sys.path),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "{'seed': 2, 'data': 2, 'model': 2}",
        "() (2, 3) (2, 3) (2, 3)",  # the step on every device; 4 seeds in halves
        "(2, 2, 5)",  # 4 seeds in halves, 8 samples in quarters
        "(6, 8)",
        "bias (7,)",  # 7 in halves: nowhere
        "kernel (6, 32)",  # along the largest dimension
        "wide (4, 3)",
        "True",
    ]
