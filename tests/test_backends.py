"""Who trains the runs of a table: processes here, Slurm's arrays, Kubernetes' JobSets."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import threading
import time

import jsonschema
import numpy as np
import pytest

from experiments.reproduction import kubernetes, local, runs, slurm
from tests.conftest import ROOT, command_environment
from tests.several import finish, free_port
from tgeo_jax import config as configs
from tgeo_jax import peers
from tgeo_jax.errors import ConfigError, Interrupted

SCHEMA = json.loads((ROOT / "tests" / "schemas" / "jobset.json").read_text())


@dataclasses.dataclass(frozen=True)
class Scripted(runs.Run):
    """A run whose command is a Python program; a finished one writes result.json."""

    program: str = ""

    @property
    def command(self):
        begin = "import os, pathlib, sys, time\nhere = pathlib.Path(sys.argv[1])\n"
        end = "(here / 'result.json').write_text('{}')"
        script = self.workdir / "program.py"
        script.write_text(begin + self.program.replace("FINISH", end))
        return ["python", str(script), str(self.workdir)]


# The first call leaves a mark and stops with this status, the second one finishes.
SECOND = """
if not (here / 'mark').exists():
    (here / 'mark').write_text('')
    sys.exit({status})
FINISH
"""
WAITS = """
import signal
def stop(*_): (here / 'saved').write_text(''); sys.exit(75)
signal.signal(signal.SIGTERM, stop)
(here / 'mark').write_text('')
time.sleep(60)
"""


def _runs(folder, **programs):
    """By name; `student` needs `teacher`."""
    found = {}
    for name, program in programs.items():
        workdir = folder / name
        workdir.mkdir(parents=True)
        (workdir / "config.json").write_text(configs.to_json(configs.default()))
        needs = "teacher" if name.startswith("student") else ""
        found[name] = Scripted(name, "x.py", (), configs.default(), workdir, needs, program=program)
    return found


def _train(found, folder, workers=1, retries=1):
    said = []
    failures = local.train(
        found, folder / "logs", workers=[{}] * workers, retries=retries, tell=said.append
    )
    return {failure.run: failure.why for failure in failures}, said


def test_teachers_come_before_their_students(tmp_path):
    program = f"assert (pathlib.Path({str(tmp_path)!r}) / 'teacher/result.json').exists()\nFINISH"
    found = _runs(tmp_path, student=program, teacher="time.sleep(0.3)\nFINISH")
    failures, said = _train(found, tmp_path, workers=2)
    assert failures == {}
    assert said == ["teacher: begins", "teacher: done (1 of 2)",
                    "student: begins", "student: done (2 of 2)"]  # fmt: skip


def test_what_is_done_is_not_trained_again(tmp_path):
    found = _runs(tmp_path, teacher="sys.exit(1)", student="FINISH")
    (tmp_path / "teacher" / "result.json").write_text("{}")
    failures, said = _train(found, tmp_path)
    assert (failures, said[0]) == ({}, "student: begins")


def test_a_failed_run_is_tried_again_and_stops_no_other(tmp_path):
    found = _runs(
        tmp_path,
        teacher="print('error: it broke'); sys.exit(1)",
        student="FINISH",
        other="FINISH",
        again=SECOND.format(status=1),
    )
    failures, said = _train(found, tmp_path)
    assert set(failures) == {"teacher", "student"}
    assert re.fullmatch(r"error: it broke \(status 1; all of it is in .*teacher\.log\)",
                        failures["teacher"])  # fmt: skip
    assert failures["student"] == "teacher could not be trained"
    assert "teacher: ended with status 1; again (1 of 1)" in said
    assert "again: done (2 of 4)" in said
    assert (tmp_path / "logs" / "teacher.log").read_text().count("error: it broke") == 2


def test_what_its_user_got_wrong_is_not_tried_again(tmp_path):
    found = _runs(tmp_path, teacher="print('error: no'); sys.exit(2)")
    failures, said = _train(found, tmp_path, retries=5)
    assert said.count("teacher: begins") == 1
    assert "status 2" in failures["teacher"]


def test_a_run_that_saved_and_stopped_goes_on_whatever_the_retries(tmp_path):
    found = _runs(tmp_path, teacher=SECOND.format(status=peers.RESTART))
    failures, said = _train(found, tmp_path, retries=0)
    assert failures == {}
    assert said.count("teacher: begins") == 2


def test_a_killed_run_says_by_what(tmp_path):
    found = _runs(tmp_path, teacher="os.kill(os.getpid(), 9)")
    failures, _ = _train(found, tmp_path, retries=0)
    assert "signal 9" in failures["teacher"]


def test_as_many_at_a_time_as_there_are_devices(tmp_path):
    meets = "(here / 'mark').write_text('')\nother = here.parent / '{}' / 'mark'\n"
    meets += "while not other.exists(): time.sleep(0.01)\nFINISH"
    found = _runs(tmp_path, one=meets.format("two"), two=meets.format("one"))
    assert _train(found, tmp_path, workers=2)[0] == {}


def test_each_worker_has_its_device(tmp_path):
    show = "(here / 'device').write_text(os.environ['CUDA_VISIBLE_DEVICES'])\n"
    show += "time.sleep(0.3)\nFINISH"
    found = _runs(tmp_path, one=show, two=show)
    workers = local.devices({"CUDA_VISIBLE_DEVICES": "3,5"})
    local.train(found, tmp_path / "logs", workers=workers, tell=lambda line: None)
    assert {(tmp_path / n / "device").read_text() for n in ("one", "two")} == {"3", "5"}
    assert local.devices({"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "3,5"}) == [{}]


def test_sigterm_lets_all_save(tmp_path):
    found = _runs(tmp_path, one=WAITS, two=WAITS, three="FINISH")

    def ask():
        while not all((tmp_path / name / "mark").exists() for name in ("one", "two")):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=ask).start()
    with pytest.raises(Interrupted, match="same command goes on"):
        _train(found, tmp_path, workers=2)
    assert all((tmp_path / name / "saved").exists() for name in ("one", "two"))
    assert not (tmp_path / "three" / "result.json").exists()


def _submitted(tmp_path, found, srun, **options):
    """Runs what slurm.write wrote, with a scheduler of a few lines; returns what it was told."""
    tools = tmp_path / "tools"
    tools.mkdir()
    told = tmp_path / "told"
    (tools / "sbatch").write_text(
        f"#!/bin/bash\necho sbatch $(basename ${{@: -1}}) ${{@:2:$#-2}} >> {told}\n"
        'script="${@: -1}"\nlast=$(sed -n "s/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p" $script)\n'
        "for ((i = 0; i <= last; i++)); do\n"
        "    SLURM_ARRAY_TASK_ID=$i SLURM_JOB_ID=job$i bash $script >&2\n"
        f"    echo task $i ended with $? >> {told}\ndone\necho 7\n"
    )
    (tools / "scontrol").write_text(f"#!/bin/bash\necho scontrol $* >> {told}\n")
    (tools / "srun").write_text(f"#!/bin/bash\n{srun}\n")
    for tool in tools.iterdir():
        tool.chmod(0o755)
    script = slurm.write(list(found.values()), tmp_path / "slurm", "t", root=ROOT, **options)
    environment = {"PATH": f"{tools}:{os.environ['PATH']}"}
    subprocess.run(["bash", script], env=environment, check=True, capture_output=True, timeout=60)
    return told.read_text().splitlines()


def test_slurm_trains_teachers_then_students(tmp_path):
    found = _runs(tmp_path, teacher="FINISH", student="FINISH", student_2="FINISH", done="")
    (tmp_path / "done" / "result.json").write_text("{}")
    run = f'{shlex.quote(sys.executable)} "${{@:2}}"'  # not the `python` of the path
    told = _submitted(tmp_path, found, run, options=["--partition=gpu"], at_a_time=4)
    assert told == [
        "sbatch teachers.sh", "task 0 ended with 0",
        "sbatch students.sh --dependency=afterany:7", "task 0 ended with 0", "task 1 ended with 0",
    ]  # fmt: skip
    assert all((run.workdir / "result.json").exists() for run in found.values())
    script = (tmp_path / "slurm" / "students.sh").read_text()
    assert "#SBATCH --array=0-1%4\n" in script
    assert "#SBATCH --partition=gpu\n" in script


@pytest.mark.parametrize(("status", "again"), [(75, True), (137, True), (1, True), (2, False)])
def test_slurm_requeues_what_may_go_on(tmp_path, status, again):
    told = _submitted(tmp_path, _runs(tmp_path, teacher=""), f"exit {status}")
    expected = ["sbatch teachers.sh", *["scontrol requeue job0"] * again]
    assert told == [*expected, f"task 0 ended with {status}"]


def test_slurm_gives_up_what_fails_without_retries(tmp_path):
    told = _submitted(tmp_path, _runs(tmp_path, teacher=""), "exit 1", retries=0)
    assert told == ["sbatch teachers.sh", "task 0 ended with 1"]


def test_slurm_says_what_is_wrong(tmp_path):
    found = list(_runs(tmp_path, teacher="").values())
    with pytest.raises(ConfigError, match=r"--sbatch='partition=x': must begin with a hyphen"):
        slurm.write(found, tmp_path / "slurm", "t", root=ROOT, options=["partition=x"])
    with pytest.raises(ConfigError, match=r"--backend=slurm: nothing is left"):
        slurm.write([], tmp_path / "slurm", "t", root=ROOT)


def _run(workdir, **fields):
    config = configs.default()
    config.data.dir = "gs://bucket/data"
    flags = tuple(f"--config.{name.replace('__', '.')}={value}" for name, value in fields.items())
    return runs.Run("noisy/kd", "configs/digits/plain.py", flags, config, workdir)


class _Bucket(pathlib.PurePosixPath):
    """As a path of etils prints itself."""

    def __str__(self):
        return f"gs://{super().__str__()}"


GPUS = kubernetes.Place(
    image="registry.example/tgeo:1", queue="research", accelerator="nvidia-h100-80gb", chips=8,
    hosts=2,
)  # fmt: skip
SLICE = kubernetes.Place(
    image="registry.example/tgeo:1", queue="research", accelerator="tpu-v5-lite-podslice",
    topology="4x4", chips=4, claim="runs:/runs",
)  # fmt: skip
CPU = kubernetes.Place(image="registry.example/tgeo:1")


@pytest.mark.parametrize(("place", "pods"), [(GPUS, 2), (SLICE, 4), (CPU, 1)])
def test_manifests_are_those_that_jobset_publishes(place, pods):
    found = kubernetes.manifest(_run(_Bucket("b/x")), "digits", "students", place)
    jsonschema.Draft202012Validator(SCHEMA).validate(found)
    job = found["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert (job["parallelism"], job["completions"]) == (pods, pods)
    pod = job["template"]["spec"]
    names = {variable["name"] for variable in pod["containers"][0]["env"]}
    assert ("JAX_COORDINATOR_ADDRESS" in names) == (pods > 1)
    labels = found["metadata"]["labels"]
    assert labels.get("kueue.x-k8s.io/queue-name") == (place.queue or None)


def test_the_schema_refuses_what_jobset_does_not_know():
    found = kubernetes.manifest(_run(_Bucket("b/x")), "digits", "students", GPUS)
    found["spec"]["replicatedJobs"][0]["template"]["spec"]["parallelisms"] = 2
    with pytest.raises(jsonschema.ValidationError, match="parallelisms"):
        jsonschema.Draft202012Validator(SCHEMA).validate(found)


def test_accelerators_are_asked_for_as_gke_names_them():
    def pod(place):
        found = kubernetes.manifest(_run(_Bucket("b/x")), "digits", "students", place)
        return found["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]

    assert pod(GPUS)["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}
    assert pod(GPUS)["containers"][0]["resources"] == {"limits": {"nvidia.com/gpu": 8}}
    assert pod(SLICE)["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
    }
    assert pod(SLICE)["containers"][0]["resources"] == {"limits": {"google.com/tpu": 4}}
    assert pod(SLICE)["volumes"][1]["persistentVolumeClaim"] == {"claimName": "runs"}
    assert "nodeSelector" not in pod(CPU)


def test_the_command_of_a_container_trains_as_two_processes(digits_dir, tmp_path):
    fields = {
        "student__name": "mlp", "train__epochs": 2, "train__steps_per_dispatch": 5, "seeds": 1,
    }  # fmt: skip
    run = dataclasses.replace(_run(tmp_path / "run", **fields))
    place = dataclasses.replace(CPU, hosts=2)
    job = kubernetes.manifest(run, "digits", "students", place)["spec"]["replicatedJobs"][0]
    (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
    given = {variable["name"]: variable["value"] for variable in container["env"]}
    host, _, port = given["JAX_COORDINATOR_ADDRESS"].partition(":")
    assert (host, port) == ("digits-noisy-kd-worker-0-0.digits-noisy-kd", "8476")
    given["JAX_COORDINATOR_ADDRESS"] = f"127.0.0.1:{free_port()}"  # there is no cluster's DNS here
    assert container["command"][0] == "python"
    processes = [
        subprocess.Popen(
            [sys.executable, *container["command"][1:]],
            cwd=ROOT,
            env=command_environment(
                digits_dir,
                **given,
                JOB_COMPLETION_INDEX=str(index),
                NPROC="32",
                XLA_FLAGS="--xla_backend_optimization_level=0",
            ),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for index in range(2)
    ]
    ended = finish(processes)
    assert [status for status, _ in ended] == [0, 0], ended
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["device"].startswith("2 x ")
    assert np.isfinite(result["test_accuracy"]["last"]["mean"])


def test_manifests_are_written_in_the_order_in_which_they_are_applied(tmp_path):
    students = dataclasses.replace(_run(_Bucket("b/student")), name="noisy/kd", needs="t")
    teacher = dataclasses.replace(_run(_Bucket("b/teacher")), name="t")
    script = kubernetes.write(_waiting(teacher, students), tmp_path / "k", "digits", GPUS)
    lists = {p.name: json.loads(p.read_text()) for p in sorted((tmp_path / "k").glob("*.json"))}
    assert {name: [item["metadata"]["name"] for item in found["items"]]
            for name, found in lists.items()} == {
        "0-teachers.json": ["digits-t"], "1-students.json": ["digits-noisy-kd"],
    }  # fmt: skip
    tools = tmp_path / "tools"
    tools.mkdir()
    told, states = tmp_path / "told", tmp_path / "states"
    states.write_text("Completed;;")  # one of two teachers still trains
    (tools / "kubectl").write_text(
        f'#!/bin/bash\necho "$1 $(basename "${{@: -1}}")" >> {told}\n'
        f"[ $1 = get ] && cat {states} || true\n"
    )
    (tools / "sleep").write_text(
        f"#!/bin/bash\necho slept >> {told}\necho -n 'Failed;' > {states}\n"
    )
    for tool in tools.iterdir():
        tool.chmod(0o755)
    environment = {"PATH": f"{tools}:{os.environ['PATH']}"}
    subprocess.run(["bash", script], env=environment, check=True, timeout=60)
    applied = [line for line in told.read_text().splitlines() if not line.startswith("get")]
    assert applied == ["apply 0-teachers.json", "slept", "apply 1-students.json"]


def _waiting(*found):
    """Runs of which nothing is done; their folders are in no bucket that can be asked here."""

    class Waiting(runs.Run):
        def status(self):
            return runs.WAITING, 0.0

    fields = [field.name for field in dataclasses.fields(runs.Run)]
    return [Waiting(**{name: getattr(run, name) for name in fields}) for run in found]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": ""}, r"--image='': needed"),
        ({"claim": "runs"}, r"--claim='runs': must be CLAIM:/mount"),
        ({"topology": ""}, r"--topology='': must be that of a TPU slice"),
        ({"topology": "2x3"}, r"--chips=4: must divide the 6 chips of --topology=2x3"),
    ],
)
def test_kubernetes_says_what_is_wrong(tmp_path, changes, message):
    place = dataclasses.replace(SLICE, **changes)
    with pytest.raises(ConfigError, match=message):
        kubernetes.write(_waiting(_run(_Bucket("b/x"))), tmp_path, "digits", place)


def test_pods_see_no_folder_of_this_machine(tmp_path):
    run = _run(tmp_path / "x")
    with pytest.raises(ConfigError, match=r"--workdir='.*': pods see no folder"):
        kubernetes.write([run], tmp_path, "digits", GPUS)
    claimed = _run(pathlib.PurePosixPath("/runs/x"))
    claimed.config.data.dir = "/elsewhere"
    with pytest.raises(ConfigError, match=r"--set=data\.dir='/elsewhere': pods see no folder"):
        kubernetes.write(_waiting(claimed), tmp_path, "digits", SLICE)
