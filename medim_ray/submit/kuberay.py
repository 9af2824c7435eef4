"""Target `kuberay`: a RayJob of Kubernetes and what guards it, sent by kubectl. The manifests are in manifests.py."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from typing import Any

import yaml

from medim_ray.submit.base import NO_PACKAGE, TARGETS, Job, Plan, Record, State, Status, TargetError
from medim_ray.submit.manifests import manifests

_TIMEOUT_S = 60
_STOPPED = "medim-ray/stopped"
_LOST = "no claim is mounted there: give storage.claim=NAME (storage.claim_gb makes it), or a URL such as s3://"


class _Dumper(yaml.SafeDumper):
    """YAML without anchors, for people to read."""

    def ignore_aliases(self, data: object) -> bool:
        return True


_STATES: dict[str, State] = {
    "": "pending",
    "PENDING": "pending",
    "RUNNING": "running",
    "SUCCEEDED": "succeeded",
    "FAILED": "failed",
    "STOPPED": "stopped",
}


@TARGETS.register("kuberay")
class KubeRayTarget:
    """Jobs of a Kubernetes cluster with the KubeRay operator; the handle is the RayJob's name."""

    def plan(self, job: Job) -> Plan:
        documents = manifests(job)
        text = "".join(f"---\n{yaml.dump(document, Dumper=_Dumper, sort_keys=False)}" for document in documents)
        notes = ["environment.working_dir is not sent: recipes are those of the image, in /opt/medim-ray"]
        if _storage_is_lost(job):
            notes.append(_LOST)
        if job.spec.tls.cert:
            notes.append("tls.* is not used on target kuberay, whose operator makes certificates: say kuberay.tls=true")
        if job.spec.environment.wheel:
            notes.append("environment.wheel must be a URL that the pods reach")
        return Plan(text=text, how=f"{' '.join(_kubectl(job))} apply -f -", notes=tuple(notes))

    def submit(self, job: Job, plan: Plan) -> str:
        if not job.spec.environment.image:
            raise ValueError(
                "environment.image is empty, and kuberay runs nothing else: build cluster/docker/Dockerfile, push it, "
                "and give environment.image=REGISTRY/medim-ray:TAG"
            )
        if _storage_is_lost(job):
            raise ValueError(f"storage.root={job.spec.storage.root}: {_LOST}")
        if job.spec.kuberay.kind == "cluster":
            raise ValueError(
                "kuberay.kind=cluster is a cluster, not a job: `medim-ray submit --dry-run … | kubectl apply -f -` "
                "makes it, and target=ray sends jobs to it"
            )
        # `apply` of the same manifests twice is one job: it is attached to, not doubled.
        _run(job, ["apply", "-f", "-"], plan.text)
        return job.id

    def status(self, record: Record, job: Job) -> Status:
        try:
            text = _run(job, ["get", "rayjob", record.handle, "-o", "json"])
        except ValueError as error:
            if "NotFound" in str(error):
                return Status(state="lost", reason="it was deleted from the cluster")
            raise
        return _status_of(json.loads(text))

    def logs(self, record: Record, job: Job, follow: bool) -> Iterator[str]:
        command = [*_kubectl(job), "logs", f"job/{record.handle}", *(["--follow"] if follow else [])]
        _available()
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            assert process.stdout is not None
            yield from process.stdout

    def stop(self, record: Record, job: Job) -> None:
        if job.spec.kuberay.queue:  # Kueue would resume what only we have suspended
            _run(job, ["delete", "rayjob", record.handle])
            return
        # A suspended RayJob loses its pods and keeps its record; the mark tells it from one that waits.
        patch = json.dumps({"metadata": {"annotations": {_STOPPED: "true"}}, "spec": {"suspend": True}})
        _run(job, ["patch", "rayjob", record.handle, "--type=merge", "--patch", patch])


def _storage_is_lost(job: Job) -> bool:
    """Whether the job would write into the pods themselves."""
    return "://" not in job.spec.storage.root and not job.spec.storage.claim


def _status_of(ray_job: dict[str, Any]) -> Status:
    """The status of a RayJob; its message holds the end of the log where the command failed."""
    status: dict[str, str] = ray_job.get("status", {})
    state = _STATES.get(status.get("jobStatus", ""), "pending")
    deployment, message = status.get("jobDeploymentStatus", ""), status.get("message", "")
    if deployment == "Failed":
        state = "failed"
    if deployment == "Suspended" and _STOPPED in ray_job.get("metadata", {}).get("annotations", {}):
        state = "stopped"
    if state == "failed" and "No module named 'medim_ray'" in message:
        return Status(
            state=state,
            exit_code=NO_PACKAGE,
            reason="environment.image has no medim_ray: build cluster/docker/Dockerfile, or give environment.wheel",
        )
    found = re.search(r"exit code (\d+)", message)
    code = {"succeeded": 0, "failed": int(found[1]) if found else 1, "stopped": 1}.get(state)
    first = message.partition(", last available logs")[0].partition("\n")[0]
    return Status(state=state, exit_code=code, reason=": ".join(part for part in (deployment, first) if part))


def _kubectl(job: Job) -> list[str]:
    kube = job.spec.kuberay
    return ["kubectl", *([f"--context={kube.context}"] if kube.context else []), f"--namespace={kube.namespace}"]


def _available() -> None:
    if shutil.which("kubectl") is None:
        raise TargetError("kubectl is not on this machine: install it, or pipe --dry-run to one that is elsewhere")


def _run(job: Job, arguments: Sequence[str], text: str = "") -> str:
    """kubectl; ValueError where the cluster refuses, TargetError where it can't be asked."""
    _available()
    command = [*_kubectl(job), f"--request-timeout={_TIMEOUT_S}s", *arguments]
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    if done.returncode == 0:
        return done.stdout
    said = " ".join(done.stderr.split())
    if re.search(r"no matches for kind|could not find the requested resource", said):
        raise TargetError(f"this cluster has no KubeRay operator: {said}. Install KubeRay 1.6 or newer with its CRDs")
    if re.search(r"refused|no such host|i/o timeout|Unauthorized|no configuration|current-context", said):
        raise TargetError(f"Kubernetes can't be reached: {said}. See `kubectl config get-contexts`, kuberay.context")
    if re.search(r"context \S+ does not exist", said):
        raise ValueError(f"kuberay.context={job.spec.kuberay.context}: {said}; see `kubectl config get-contexts`")
    if re.search(r"namespaces \S+ not found", said):
        raise ValueError(f"kuberay.namespace={job.spec.kuberay.namespace}: no such namespace: kubectl create namespace")
    raise ValueError(f"kubectl: {said}")
