"""What a launcher or a user says of the processes of a run."""

from __future__ import annotations

import pytest

from tgeo_jax import cluster
from tgeo_jax.errors import ConfigError

VARIABLES = {"JAX_COORDINATOR_ADDRESS": "first:1234", "JAX_NUM_PROCESSES": "4"}


def test_flags_come_before_variables():
    given = {"coordinator": "mine:1", "num_processes": 2, "process_id": 1}
    environment = {**VARIABLES, "JAX_PROCESS_ID": "3"}
    assert cluster.explicit(given, environment) == ("mine:1", 2, 1)
    assert cluster.explicit({}, environment) == ("first:1234", 4, 3)


def test_an_indexed_job_of_kubernetes_says_which_process_this_is():
    found = cluster.explicit({}, {**VARIABLES, "JOB_COMPLETION_INDEX": "0"})
    assert found == ("first:1234", 4, 0)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"coordinator": "a:1"}, "--num_processes: missing"),
        ({"process_id": 0}, "--coordinator: missing"),
        ({"coordinator": "a", "num_processes": 2, "process_id": 0}, "--coordinator='a': must be"),
        ({"coordinator": "a:1", "num_processes": 0, "process_id": 0}, "--num_processes=0: must"),
        ({"coordinator": "a:1", "num_processes": 2, "process_id": 2}, "--process_id=2: must be 0"),
        ({"coordinator": "a:1", "num_processes": "x", "process_id": 0}, "--num_processes='x'"),
    ],
)
def test_what_cannot_be_is_refused(given, said):
    with pytest.raises(ConfigError, match=said):
        cluster.explicit(given, {})


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"SLURM_NTASKS": "8", "SLURM_STEP_NODELIST": "n[0-7]"}, "Slurm"),
        ({"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "n0"}, None),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "Open MPI"),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, None),
    ],
)
def test_launchers(environment, expected):
    assert cluster.launcher(environment) == expected


def test_a_tpu_is_asked_for_its_slice(tmp_path, monkeypatch):
    device = tmp_path / "accel0"
    device.touch()
    monkeypatch.setattr(cluster, "_TPU_DEVICES", (str(device),))
    assert cluster.launcher({}) == "Cloud TPU"
    assert cluster.launcher({"JAX_PLATFORMS": "cpu"}) is None


def test_a_single_host_needs_nothing():
    assert cluster.start({}, environment={}) is False
    one = {"coordinator": "a:1", "num_processes": 1, "process_id": 0}
    assert cluster.start(one, environment={}) is False
