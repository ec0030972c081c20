"""The runs of a table as JobSets that Kueue admits, on GPU nodes or TPU slices."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from experiments.reproduction.runs import Run, stages
from tgeo_jax import peers
from tgeo_jax.errors import ConfigError

_PORT = 8476
_WORKER = "worker"
_LONGEST = 40  # of a JobSet's name: pods append to it, and a host name has 63 letters
_SAVING = 120  # seconds that a pod has to save before it is killed
_STAGE, _TABLE = "tgeo-jax/stage", "tgeo-jax/table"


@dataclasses.dataclass(frozen=True)
class Place:
    """On what a run trains.

    Attributes:
        image: of the container; see the Dockerfile.
        queue: Kueue's LocalQueue; empty: the cluster's own scheduling.
        namespace: of everything.
        accelerator: a TPU as `tpu-v5-lite-podslice`, a GPU as `nvidia-h100-80gb`, in GKE's names;
            empty: CPUs.
        topology: of a TPU slice, such as `4x4`; empty for GPUs.
        chips: TPU chips or GPUs of one host.
        hosts: of one run; of a TPU slice its topology says how many.
        claim: a volume that all pods see, as `CLAIM:/mount`; empty: everything is in a bucket.
        retries: of a run that failed.
    """

    image: str
    queue: str = ""
    namespace: str = "default"
    accelerator: str = ""
    topology: str = ""
    chips: int = 0
    hosts: int = 1
    claim: str = ""
    retries: int = 1

    @property
    def is_tpu(self) -> bool:
        return self.accelerator.startswith("tpu")

    @property
    def pods(self) -> int:
        """Hosts that one run takes.

        Raises:
            ConfigError: a topology that the hosts' chips do not divide.
        """
        if not self.is_tpu:
            return self.hosts
        if not re.fullmatch(r"\d+(x\d+){1,2}", self.topology):
            raise ConfigError(
                f"--topology={self.topology!r}: must be that of a TPU slice, as in 4x4 or 2x2x2"
            )
        chips = math.prod(map(int, self.topology.split("x")))
        if self.chips < 1 or chips % self.chips:
            raise ConfigError(
                f"--chips={self.chips}: must divide the {chips} chips of --topology={self.topology}"
            )
        return chips // self.chips


def write(runs: Sequence[Run], folder: pathlib.Path, table: str, place: Place) -> pathlib.Path:
    """Writes the manifests of what is not finished, teachers and students apart.

    Args:
        runs: of the table; those that are done or cannot run are left out.
        folder: for the manifests.
        table: its name.
        place: on what.

    Returns:
        The script that applies them in their order, to be run by bash.

    Raises:
        ConfigError: nothing is left to train, an impossible place, or folders that only this
            machine sees.
    """
    left = stages(runs)
    if not left:
        raise ConfigError("--backend=kubernetes: nothing is left to train")
    _check([run for own in left.values() for run in own], place)
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["#!/bin/bash", "# Students begin when all teachers have ended.", "set -euo pipefail"]
    for number, (stage, own) in enumerate(left.items()):
        path = folder / f"{number}-{stage}.json"
        items = [manifest(run, table, stage, place) for run in own]
        path.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": items}, indent=1))
        lines.append(f'kubectl apply -f "$(dirname "$0")/{path.name}"')
        if number + 1 < len(left):
            lines += _waiting(table, stage, place.namespace)
    script = folder / "apply.sh"
    script.write_text("\n".join(lines) + "\n")
    return script


def _waiting(table: str, stage: str, namespace: str) -> list[str]:
    """Lines that wait until every JobSet of a stage has completed or failed."""
    chosen = f"-n {namespace} -l {_TABLE}={_slug(table)},{_STAGE}={stage}"
    path = '{range .items[*]}{.status.terminalState}{";"}{end}'  # of a running one it is empty
    return [
        "while true; do",
        f"    states=$(kubectl get jobsets {chosen} -o jsonpath='{path}')",
        "    grep -qE '(^|;);' <<< \"$states\" || break",
        "    sleep 30",
        "done",
    ]


def _check(runs: Sequence[Run], place: Place) -> None:
    if not place.image:
        raise ConfigError("--image='': needed: the container's image, built from the Dockerfile")
    if place.claim and not re.fullmatch(r"[a-z0-9.-]+:/\S+", place.claim):
        raise ConfigError(f"--claim={place.claim!r}: must be CLAIM:/mount")
    mount = place.claim.partition(":")[2]
    for run in runs:
        for field, path in (("workdir", str(run.workdir)), ("data.dir", run.config.data.dir)):
            if "://" in path or (mount and path.startswith(f"{mount}/")):
                continue
            what = "--workdir" if field == "workdir" else "--set=data.dir"
            raise ConfigError(
                f"{what}={path!r}: pods see no folder of this machine; name a bucket (gs://, s3://)"
                " or a folder of --claim"
            )


def manifest(run: Run, table: str, stage: str, place: Place) -> dict[str, Any]:
    """The JobSet of one run.

    Pods that stop with 75 or are moved away start again without end, since they have saved; any
    other failure counts against `place.retries`.

    Args:
        run: which.
        table: its table.
        stage: `teachers` or `students`.
        place: on what.

    Raises:
        ConfigError: an impossible place.

    References:
        JobSet, jobset.x-k8s.io/v1alpha2; Kueue's label `kueue.x-k8s.io/queue-name`.
    """
    name, pods = _named(table, run.name), place.pods
    labels = {_TABLE: _slug(table), _STAGE: stage}
    if place.queue:
        labels["kueue.x-k8s.io/queue-name"] = place.queue
    job = {
        "parallelism": pods,
        "completions": pods,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {
            "rules": [
                {
                    "action": "FailJob",
                    "onExitCodes": {
                        "containerName": _WORKER,
                        "operator": "In",
                        "values": [peers.RESTART],
                    },
                },
                {
                    "action": "FailJob",
                    "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
                },
            ]
        },
        "template": {"metadata": {"labels": labels}, "spec": _pod(run, name, pods, place)},
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": name, "namespace": place.namespace, "labels": labels},
        "spec": {
            "network": {"enableDNSHostnames": True, "subdomain": name},
            "failurePolicy": {
                "maxRestarts": place.retries,
                "rules": [
                    {
                        "name": "saved",
                        "action": "RestartJobSetAndIgnoreMaxRestarts",
                        "onJobFailureReasons": ["PodFailurePolicy"],
                    }
                ],
            },
            "replicatedJobs": [{"name": _WORKER, "replicas": 1, "template": {"spec": job}}],
        },
    }


def _pod(run: Run, name: str, pods: int, place: Place) -> dict[str, Any]:
    environment = {}
    if pods > 1:
        environment = {
            "JAX_COORDINATOR_ADDRESS": f"{name}-{_WORKER}-0-0.{name}:{_PORT}",
            "JAX_NUM_PROCESSES": str(pods),
        }
    container: dict[str, Any] = {
        "name": _WORKER,
        "image": place.image,
        "command": run.command,
        "env": [{"name": key, "value": value} for key, value in environment.items()],
        # Grain's processes hand batches over in shared memory, of which a container has 64 MB.
        "volumeMounts": [{"name": "shared-memory", "mountPath": "/dev/shm"}],
    }
    spec: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": _SAVING,
        "containers": [container],
        "volumes": [{"name": "shared-memory", "emptyDir": {"medium": "Memory"}}],
    }
    if pods > 1:
        container["ports"] = [{"containerPort": _PORT}]
    if place.accelerator:
        resource = "google.com/tpu" if place.is_tpu else "nvidia.com/gpu"
        container["resources"] = {"limits": {resource: place.chips}}
        kind = "tpu-accelerator" if place.is_tpu else "accelerator"
        spec["nodeSelector"] = {f"cloud.google.com/gke-{kind}": place.accelerator}
        if place.is_tpu:
            spec["nodeSelector"]["cloud.google.com/gke-tpu-topology"] = place.topology
    if place.claim:
        claim, _, mount = place.claim.partition(":")
        container["volumeMounts"].append({"name": "runs", "mountPath": mount})
        spec["volumes"].append({"name": "runs", "persistentVolumeClaim": {"claimName": claim}})
    return spec


def _named(table: str, run: str) -> str:
    """A host name for a run; long ones end in a digest.

    Examples:
        >>> _named("digits", "noisy/kd")
        'digits-noisy-kd'
        >>> _named("cifar100", "resnet32x4-resnet8x4/logit_std/seed_4")
        'cifar100-resnet32x4-resnet8x4-l-e9c9dbc0'
    """
    name = _slug(f"{table}-{run}")
    if len(name) > _LONGEST:
        name = f"{name[: _LONGEST - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return name


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
