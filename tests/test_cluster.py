"""What a launcher or a user says of the processes of a run."""

from __future__ import annotations

import os
import re
import subprocess

import pytest

from tests.conftest import ROOT
from tgeo_jax import cluster
from tgeo_jax.errors import ConfigError

VARIABLES = {"JAX_COORDINATOR_ADDRESS": "first:1234", "JAX_NUM_PROCESSES": "4"}
# What Slurm 22.05 says in a batch script, and to the second task of a step on one host.
BATCH = {"SLURM_JOB_ID": "8", "SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
STEP = {
    **BATCH, "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_STEP_NODELIST": "n1",
    "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_ID": "0",
}  # fmt: skip
# And in the shell that salloc opens on a host of its own.
SHELL = {
    **BATCH, "SLURM_STEP_NODELIST": "n1", "SLURM_STEP_TASKS_PER_NODE": "1",
    "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_ID": "4294967290",
}  # fmt: skip
# What Open MPI 5.0.11 says to the second process on one host.
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1", "PMIX_NAMESPACE": "prterun-n1-9946@1",
}  # fmt: skip
ELSEWHERE = {**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"}


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
        (STEP, "Slurm"),
        ({**STEP, "SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "Open MPI"),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({**OPEN_MPI, **BATCH, "SLURM_STEP_NODELIST": "n1"}, "Open MPI"),
        (BATCH, None),
        (SHELL, None),
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


def test_mpirun_in_a_job_of_slurm_counts_its_own_processes():
    found = cluster.explicit({"coordinator": "n1:1"}, {**BATCH, **ELSEWHERE})
    assert found == ("n1:1", 4, 3)


def test_open_mpi_on_launched_needs_no_coordinator():
    found = [
        cluster.launched({**OPEN_MPI, **BATCH, "OMPI_COMM_WORLD_RANK": str(rank)})
        for rank in range(2)
    ]
    host, _, port = found[0].coordinator.rpartition(":")
    assert [place[1:] for place in found] == [(2, 0), (2, 1)]
    assert found[0].coordinator == found[1].coordinator
    assert host == "127.0.0.1"
    assert 61440 <= int(port) <= 65535
    other = cluster.launched({**OPEN_MPI, "PMIX_NAMESPACE": "prterun-n1-9947@1"})
    assert other.coordinator != found[0].coordinator
    chosen = cluster.launched({**OPEN_MPI, "JAX_COORDINATOR_PORT": "7000"})
    assert chosen.coordinator == "127.0.0.1:7000"


def test_open_mpi_on_several_hosts_does(monkeypatch):
    def refuse(**said):
        assert said["local_device_ids"] == [1]
        raise ValueError("coordinator_address should be defined.")  # JAX 0.10, asked under 5.0

    monkeypatch.setattr(cluster.jax.distributed, "initialize", refuse)
    assert cluster.launched(ELSEWHERE) is None
    with pytest.raises(ConfigError, match=r"--coordinator: missing; JAX cannot ask this Open MPI"):
        cluster.start({}, environment=ELSEWHERE)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        (BATCH, None),
        (STEP, [1]),
        ({**STEP, "CUDA_VISIBLE_DEVICES": "0,1"}, [1]),
        ({**STEP, "CUDA_VISIBLE_DEVICES": "1"}, [0]),
        ({**STEP, "JAX_LOCAL_DEVICE_IDS": "4,5"}, None),
        ({**STEP, "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}, None),
        ({**STEP, "SLURM_STEP_TASKS_PER_NODE": "2(x3),1"}, [1]),
        (OPEN_MPI, [1]),
        ({**OPEN_MPI, **BATCH}, [1]),
        ({**ELSEWHERE, "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, None),
    ],
)
def test_processes_on_launched_have_devices_of_their_own(environment, expected):
    assert cluster.local_devices(environment) == expected


@pytest.mark.parametrize("environment", [STEP, OPEN_MPI])
@pytest.mark.parametrize("given", [{}, {"coordinator": "127.0.0.1:1"}])
def test_jax_is_told_what_the_launcher_says(given, environment, monkeypatch):
    told, called = {}, []
    monkeypatch.setattr(cluster.jax.distributed, "initialize", lambda **said: told.update(said))
    monkeypatch.setattr(cluster.roll_call, "hold", lambda *said: called.append(said))
    cluster.start(given, environment=environment, start_timeout=9)
    address = given.get("coordinator") or cluster.launched(environment).coordinator
    assert called == [(address, 2, 1, 9)]
    assert (told["coordinator_address"], told["num_processes"], told["process_id"]) == (
        address, 2, 1,
    )  # fmt: skip
    assert told["local_device_ids"] == [1]


@pytest.mark.parametrize(
    ("status", "restarts", "requeued"),
    [(0, 0, False), (1, 0, False), (2, 0, False), (75, 0, True), (137, 3, True), (75, 100, False)],
)
def test_the_documented_job_of_slurm_requeues_what_can_go_on(tmp_path, status, restarts, requeued):
    text = (ROOT / "docs" / "pods.md").read_text()
    (script,) = re.findall(r"```sh\n(#!/bin/bash\n.*?)```", text, re.DOTALL)
    said = tmp_path / "said"
    for name, ends in (("srun", status), ("scontrol", 0)):
        path = tmp_path / name
        path.write_text(f'#!/bin/sh\necho {name} "$@" >> {said}\nexit {ends}\n')
        path.chmod(0o755)
    environment = {
        **os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "8",
        "SLURM_RESTART_COUNT": str(restarts),
    }  # fmt: skip
    done = subprocess.run(
        ["bash", "-c", script, "pod.sh", "--workdir=a b"], env=environment, check=False
    )
    assert done.returncode == status
    first, *then = said.read_text().splitlines()
    assert first == "srun python -m experiments.main --workdir=a b"
    assert then == ["scontrol requeue 8"] * requeued
