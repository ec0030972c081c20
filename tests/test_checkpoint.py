import os
import re
import subprocess
import sys

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.conftest import ROOT
from tgeo_jax import checkpoint
from tgeo_jax.checkpoint import Checkpoints
from tgeo_jax.errors import CheckpointError
from tgeo_jax.state import Best, Fusion, Learner, Peer, TrainState

SEEDS = 2
# Values that a detour through decimals, float64 or a clean-up would change.
AWKWARD = np.float32([np.nan, -0.0, np.inf, 1e-45, 0.1, np.pi, 3e37, -1 / 3])


def params(scale):
    return {"Dense_0": {"kernel": jnp.asarray(scale * np.tile(AWKWARD, (SEEDS, 3, 1)))}}


def state_and_best(scale=1.0, batch_stats=None):
    """A state with two seeds, Adam's memory, and a bfloat16 leaf; and its best."""
    student = params(scale)
    statistics = {"mean": jnp.full((SEEDS, 4), scale / 3)} if batch_stats is None else batch_stats
    fusion = {"w": jnp.asarray(scale * np.arange(SEEDS * 5).reshape(SEEDS, 5) / 7, jnp.bfloat16)}
    state = TrainState(
        step=jnp.int32(12),
        seed=jnp.asarray([3, 4], jnp.uint32),
        student=Learner(student, statistics, optax.adam(0.1).init(student)),
        fusion=Fusion(fusion, ()),
    )
    accuracy = jnp.float32([0.5, 0.25]) * scale
    best = Best(params(2 * scale), statistics, fusion, accuracy, jnp.int32([10, 12]))
    return state, best


def blank(tree):
    return jax.tree.map(jnp.zeros_like, tree)


def bits(tree):
    return [(leaf.dtype, leaf.shape, np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(tree)]


def save(directory, *steps, **changes):
    """Finished checkpoints, each with the scale of its step."""
    checkpoints = Checkpoints(directory)
    for step in steps:
        checkpoints.save(step, *state_and_best(float(step), **changes))
    checkpoints.close()


def restored(directory, examples):
    checkpoints = Checkpoints(directory)
    found = checkpoints.restore(*examples)
    checkpoints.close()
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run") / "checkpoints"
    save(directory, 1, 2, 3)
    return directory


@pytest.mark.parametrize("batch_stats", [None, {}])
def test_state_and_best_come_back_bit_for_bit(tmp_path, batch_stats):
    state, best = state_and_best(batch_stats=batch_stats)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(12, state, best)
    checkpoints.close()
    found = restored(tmp_path, (blank(state), blank(best)))
    assert jax.tree.structure(found) == jax.tree.structure((state, best))
    assert bits(found) == bits((state, best))


def with_teacher_and_anchor():
    state, best = state_and_best()
    peer = Learner(params(5.0), {"mean": jnp.full((SEEDS, 4), 1 / 7)}, optax.sgd(0.1).init({}))
    means = jnp.asarray(np.random.RandomState(0).rand(SEEDS, 4, 4), jnp.float32)
    return state.replace(teacher=Peer(peer, means), anchor={"params": params(9.0)}), best


def test_a_teacher_that_trains_along_and_the_anchor_come_back_bit_for_bit(tmp_path):
    state, best = with_teacher_and_anchor()
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(12, state, best)
    checkpoints.close()
    found = restored(tmp_path, (blank(state), blank(best)))
    assert jax.tree.structure(found) == jax.tree.structure((state, best))
    assert bits(found) == bits((state, best))
    # Neither is what comes out as the trained network.
    network = checkpoint.load_network(tmp_path, "last", seed_index=1)
    student = np.asarray(params(1.0)["Dense_0"]["kernel"])[1]
    assert network["params"]["Dense_0"]["kernel"].tobytes() == student.tobytes()


def test_a_checkpoint_of_before_there_was_a_choice_of_figure_comes_back(tmp_path):
    """Its accuracy is the score of today."""
    state, best = state_and_best()
    older = flax.serialization.to_state_dict(best)
    older["validation_accuracy"] = older.pop("validation_score")
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(12, state, older)
    checkpoints.close()
    found = restored(tmp_path, (blank(state), blank(best)))
    assert jax.tree.structure(found) == jax.tree.structure((state, best))
    assert bits(found) == bits((state, best))


def test_arrays_may_be_overwritten_once_save_returns(tmp_path):
    state, best = {"w": jnp.arange(1000.0)}, {"w": jnp.arange(3.0)}
    overwrite = jax.jit(lambda w: w - 1, donate_argnums=0)
    overwrite(jnp.zeros(1000)).block_until_ready()  # compiled, so that no time passes below
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state, best)
    overwrite(state["w"]).block_until_ready()
    assert state["w"].is_deleted()  # the next dispatch really took the buffer
    checkpoints.close()
    found, _ = restored(tmp_path, ({"w": jnp.zeros(1000)}, best))
    np.testing.assert_array_equal(found["w"], np.arange(1000))


def test_restored_arrays_lie_where_the_examples_lie(saved):
    examples = state_and_best()
    found = restored(saved, examples)
    for leaf, example in zip(jax.tree.leaves(found), jax.tree.leaves(examples), strict=True):
        assert leaf.sharding.is_equivalent_to(example.sharding, leaf.ndim)


def test_a_new_folder_holds_no_checkpoint(tmp_path):
    checkpoints = Checkpoints(tmp_path / "new")
    assert checkpoints.latest_step() is None
    checkpoints.close()


def test_the_newest_checkpoint_is_restored(saved):
    assert bits(restored(saved, state_and_best())) == bits(state_and_best(3.0))


def test_the_newest_step_is_known(saved):
    checkpoints = Checkpoints(saved)
    assert checkpoints.latest_step() == 3
    checkpoints.close()


def test_the_two_newest_checkpoints_are_kept(saved):
    assert sorted(int(path.name) for path in saved.iterdir() if path.name.isdigit()) == [2, 3]


def test_a_checkpoint_that_was_not_finished_does_not_count(tmp_path):
    save(tmp_path, 4)
    (complete,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert complete.name == "4"
    # What a killed writer leaves: Orbax renames a temporary folder as its last act.
    (tmp_path / "5.orbax-checkpoint-tmp").mkdir()
    assert bits(restored(tmp_path, state_and_best())) == bits(state_and_best(4.0))


def test_a_full_disk_is_told_and_leaves_the_checkpoint_before_whole(tmp_path):
    """In a process of its own whose files may not grow beyond a limit."""
    code = f"""
import pathlib, resource, signal
import jax.numpy as jnp
from tgeo_jax.checkpoint import Checkpoints
from tgeo_jax.errors import CheckpointError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails, as on a full disk
checkpoints = Checkpoints(pathlib.Path({str(tmp_path)!r}))
checkpoints.save(1, {{"w": jnp.ones(3)}}, {{"w": jnp.ones(3)}})
checkpoints._checkpointer.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**20))
large = {{"w": jnp.sin(jnp.arange(1e6))}}
try:
    checkpoints.save(2, large, large)
    checkpoints.close()
except CheckpointError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
again = Checkpoints(pathlib.Path({str(tmp_path)!r}))
print(again.latest_step(), again.restore({{"w": jnp.zeros(3)}}, {{"w": jnp.zeros(3)}})[0]["w"])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    told, after = done.stdout.splitlines()
    assert told.startswith(f"{tmp_path}: a checkpoint could not be written (")
    assert "that of step 1 is whole" in told
    assert after == "1 [1. 1. 1.]"


def test_closing_twice_is_allowed(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.close()
    assert checkpoints.close() is None


@pytest.mark.parametrize(("which", "scale"), [("last", 3.0), ("best", 6.0)])
@pytest.mark.parametrize("seed_index", [0, 1])
def test_a_trained_network_is_one_seed_of_the_newest_checkpoint(saved, which, scale, seed_index):
    found = checkpoint.load_network(saved, which, seed_index)
    assert set(found) == {"params", "batch_stats"}
    kernel = found["params"]["Dense_0"]["kernel"]
    assert kernel.tobytes() == np.asarray(params(scale)["Dense_0"]["kernel"])[seed_index].tobytes()
    np.testing.assert_array_equal(found["batch_stats"]["mean"], np.ones(4))  # 3 / 3


def test_a_network_without_batch_statistics_has_an_empty_collection(tmp_path):
    save(tmp_path, 1, batch_stats={})
    assert checkpoint.load_network(tmp_path, "last")["batch_stats"] == {}


_SAVE_ON_TWO_DEVICES = """
import pathlib, sys
import jax, numpy as np
from tgeo_jax import checkpoint, parallel
by_seed = parallel.by_seed(parallel.make_mesh(2))
kernel = jax.device_put(np.arange(6, dtype=np.float32).reshape(2, 3), by_seed)
checkpoints = checkpoint.Checkpoints(pathlib.Path(sys.argv[1]))
checkpoints.save(1, {"student": {"params": {"w": kernel}}}, {"params": {"w": kernel + 6}})
checkpoints.close()
"""


@pytest.fixture(scope="module")
def saved_on_two_devices(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run") / "checkpoints"
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    subprocess.run(
        [sys.executable, "-c", _SAVE_ON_TWO_DEVICES, str(directory)],
        env={**os.environ, **flags, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=True,
    )
    return directory


@pytest.mark.parametrize(("which", "expected"), [("last", [3, 4, 5]), ("best", [9, 10, 11])])
def test_a_network_trained_on_devices_that_are_not_here_loads(
    saved_on_two_devices, which, expected
):
    found = checkpoint.load_network(saved_on_two_devices, which, seed_index=1)
    assert found["params"]["w"].tolist() == expected


def test_a_run_goes_on_with_fewer_devices(saved_on_two_devices):
    one = {"w": jnp.zeros((2, 3))}
    examples = {"student": {"params": one}}, {"params": one}
    state, best = restored(saved_on_two_devices, examples)
    assert state["student"]["params"]["w"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert best["params"]["w"].tolist() == [[6, 7, 8], [9, 10, 11]]


def test_loading_from_no_folder_names_it(tmp_path):
    with pytest.raises(CheckpointError, match=re.escape(f"{tmp_path / 'gone'}: no such folder")):
        checkpoint.load_network(tmp_path / "gone", "last")


def test_loading_from_an_empty_folder_says_that_nothing_is_complete(tmp_path):
    with pytest.raises(CheckpointError, match=re.escape(f"{tmp_path}: holds no complete")):
        checkpoint.load_network(tmp_path, "last")


NETWORK = {"params": {"a": {"kernel": np.zeros((2, 3)), "bias": np.zeros(3)}}}


def test_variables_of_the_same_shapes_fit():
    other = jax.tree.map(np.ones_like, NETWORK)
    assert checkpoint.check_fits(NETWORK, other, "runs/teacher") is None


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"kernel": np.zeros((2, 4)), "bias": np.zeros(3)},
            "params/a/kernel has shape (2, 4) there, the configured network needs (2, 3)",
        ),
        (
            {"kernel": np.zeros((2, 3))},
            "params/a/bias is missing there, the configured network needs (3,)",
        ),
        (
            {"kernel": np.zeros((2, 3)), "bias": np.zeros(3), "scale": np.zeros(3)},
            "params/a/scale has shape (3,) there, the configured network has no such parameter",
        ),
    ],
)
def test_another_architecture_names_the_first_parameter_and_both_shapes(given, said):
    with pytest.raises(CheckpointError, match=f"^runs/teacher: .*{re.escape(said)}"):
        checkpoint.check_fits(NETWORK, {"params": {"a": given}}, "runs/teacher")


def test_shapes_will_do_for_the_expected_network():
    expected = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, NETWORK))
    with pytest.raises(CheckpointError, match="params/a/bias is missing"):
        checkpoint.check_fits(expected, {"params": {"a": {"kernel": np.zeros((2, 3))}}}, "x")
