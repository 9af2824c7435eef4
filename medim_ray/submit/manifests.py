"""The Kubernetes objects of a job: service account, claim, network policy, and a RayJob or RayCluster of KubeRay 1.6.

In all of them no process is root, root filesystems are read-only, every container has limits, the head runs no work,
the token is made by the operator and read from its Secret, and only the job's own pods reach its ports.
"""

from __future__ import annotations

import json
import re
import shlex
from importlib.metadata import version
from typing import Any

import yaml

import medim_ray
from medim_ray.submit.base import Job, entry

Object = dict[str, Any]
IMAGE = f"medim-ray:{medim_ray.__version__}"
WORKING_DIR = "/opt/medim-ray"
USER_ID = 1000
_LABEL = "medim-ray/job"
_HEAD_CPUS, _HEAD_MEMORY_GB = 2, 8.0
_DASHBOARD, _TMP_GB = 8265, 50
# Taints that clouds and Karpenter put on interruptible nodes. The head tolerates none of them.
_SPOT = [
    {"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"},
    {"key": "kubernetes.azure.com/scalesetpriority", "operator": "Equal", "value": "spot", "effect": "NoSchedule"},
    {"key": "karpenter.sh/capacity-type", "operator": "Equal", "value": "spot", "effect": "NoSchedule"},
]


def manifests(job: Job) -> list[Object]:
    """The objects in the order in which they are made."""
    spec, kube = job.spec, job.spec.kuberay
    documents = []
    if not kube.service_account:
        account: Object = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": _metadata(job)}
        documents.append({**account, "automountServiceAccountToken": False})
    if spec.storage.claim and spec.storage.claim_gb:
        documents.append(_claim(job))
    documents.append(_network_policy(job))
    documents.append(_ray_job(job) if kube.kind == "job" else _ray_cluster_object(job))
    return documents


def _metadata(job: Job, name: str = "") -> Object:
    tags = {f"medim-ray/{key}": value for key, value in job.spec.tags.items()}
    return {
        "name": name or job.id,
        "namespace": job.spec.kuberay.namespace,
        "labels": {_LABEL: job.spec.name, "app.kubernetes.io/part-of": "medim-ray"},
        "annotations": {"medim-ray/spec-hash": job.spec.hash, **tags},
    }


def _claim(job: Job) -> Object:
    storage = job.spec.storage
    spec: Object = {
        "accessModes": ["ReadWriteMany"],  # every node writes its share of a checkpoint
        "resources": {"requests": {"storage": f"{storage.claim_gb}Gi"}},
    }
    if storage.claim_class:
        spec["storageClassName"] = storage.claim_class
    metadata = {**_metadata(job, storage.claim)}
    return {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": metadata, "spec": spec}


def _network_policy(job: Job) -> Object:
    """Into the pods: the job's own, and the operator to the dashboard. Out of them: their own, names, and HTTPS."""
    own = {"podSelector": {"matchLabels": {_LABEL: job.spec.name}}}
    operator = {
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": job.spec.kuberay.operator_namespace}}
    }
    names = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kube-system"}}}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": _metadata(job),
        "spec": {
            "podSelector": {"matchLabels": {_LABEL: job.spec.name}},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [
                {"from": [own]},
                {"from": [operator], "ports": [{"port": _DASHBOARD, "protocol": "TCP"}]},
            ],
            "egress": [
                {"to": [own]},
                {"to": [names], "ports": [{"port": 53, "protocol": "UDP"}, {"port": 53, "protocol": "TCP"}]},
                {"ports": [{"port": 443, "protocol": "TCP"}]},  # object storage, and the API of Kubernetes
            ],
        },
    }


def _ray_job(job: Job) -> Object:
    spec, kube = job.spec, job.spec.kuberay
    metadata = _metadata(job)
    if kube.queue:
        metadata["labels"]["kueue.x-k8s.io/queue-name"] = kube.queue
    submitter = _container(job, "ray-job-submitter", cpus=1, memory_gb=1.0)
    body: Object = {
        "entrypoint": _entrypoint(job),
        "entrypointNumCpus": spec.ray.entrypoint_cpus,
        "submissionMode": "K8sJobMode",
        "submitterPodTemplate": _pod(job, submitter, restart="Never"),
        "metadata": {"name": spec.name, "spec_hash": spec.hash},
        # A new attempt finds its checkpoints by the run's fixed folder on shared storage.
        "backoffLimit": spec.retries,
        "activeDeadlineSeconds": spec.time_limit_s * (spec.retries + 1),
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": 600,
        "suspend": bool(kube.queue),
        "rayClusterSpec": _ray_cluster(job),
    }
    if spec.ray.entrypoint_resources:
        body["entrypointResources"] = json.dumps(spec.ray.entrypoint_resources)
    environment: Object = {}
    if spec.environment.variables:
        environment["env_vars"] = dict(spec.environment.variables)
    if spec.environment.wheel:
        environment["py_modules"] = [spec.environment.wheel]
    if environment:
        body["runtimeEnvYAML"] = yaml.safe_dump(environment, sort_keys=False)
    return {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": metadata, "spec": body}


def _entrypoint(job: Job) -> str:
    """Words without anything that a shell would take apart: they pass through three of them (operator, `ray job
    submit`, head)."""
    words = entry(job.spec)
    for word in words:
        if not re.fullmatch(r"[-\w@%+=:,./\[\]~^]+", word):
            raise ValueError(
                f"command: {word!r} has characters that do not pass through KubeRay's shells: "
                "put the option into a file that --config names"
            )
    return shlex.join(words[:3]) + " --chdir " + WORKING_DIR + " " + " ".join(words[3:])


def _ray_cluster_object(job: Job) -> Object:
    return {"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": _metadata(job), "spec": _ray_cluster(job)}


def _ray_cluster(job: Job) -> Object:
    spec, resources = job.spec, job.spec.resources
    head = _container(job, "ray-head", cpus=_HEAD_CPUS, memory_gb=_HEAD_MEMORY_GB)
    store = str(int(spec.kuberay.shm_gb * 2**30))
    groups = [_workers(job, "workers", resources.nodes, resources.cpus, resources.memory_gb, resources.gpus)]
    if resources.decode_nodes:
        groups.append(
            _workers(job, "decode", resources.decode_nodes, resources.decode_cpus, resources.decode_memory_gb, 0)
        )
    cluster: Object = {
        "rayVersion": version("ray"),
        "authOptions": {"mode": "token"},
        "headGroupSpec": {
            "serviceType": "ClusterIP",
            "enableIngress": False,
            # No CPUs: neither workers nor the driver come here, and losing them does not take the cluster along.
            "rayStartParams": {"num-cpus": "0", "num-gpus": "0", "object-store-memory": store},
            "template": _pod(job, head),
        },
        "workerGroupSpecs": groups,
    }
    if spec.kuberay.tls:
        cluster["tlsOptions"] = {"enabled": True}
    return cluster


def _workers(job: Job, name: str, nodes: int, cpus: int, memory_gb: float, gpus: int) -> Object:
    kube = job.spec.kuberay
    template = _pod(job, _container(job, "ray-worker", cpus=cpus, memory_gb=memory_gb, gpus=gpus))
    tolerations = [{"key": kube.gpu_resource, "operator": "Exists", "effect": "NoSchedule"}] if gpus else []
    if kube.overlay == "spot" and name == "workers":
        tolerations += _SPOT
        # The time between a cloud's notice and its end: what is running commits a checkpoint.
        template["spec"]["terminationGracePeriodSeconds"] = 120
    if tolerations:
        template["spec"]["tolerations"] = tolerations
    if kube.node_selector and name == "workers":
        template["spec"]["nodeSelector"] = dict(kube.node_selector)
    store = str(int(kube.shm_gb * 2**30))
    return {
        "groupName": name,
        "replicas": nodes,
        "minReplicas": nodes,
        "maxReplicas": nodes,
        "rayStartParams": {"num-cpus": str(cpus), "num-gpus": str(gpus), "object-store-memory": store},
        "template": template,
    }


def _pod(job: Job, container: Object, restart: str = "") -> Object:
    """A pod template with the volumes that Ray writes to, since the root filesystem is read-only."""
    spec, kube = job.spec, job.spec.kuberay
    volumes: list[Object] = [
        {"name": "tmp", "emptyDir": {"sizeLimit": f"{_TMP_GB}Gi"}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{kube.shm_gb:g}Gi"}},
    ]
    if spec.storage.claim:
        volumes.append({"name": "storage", "persistentVolumeClaim": {"claimName": spec.storage.claim}})
    pod: Object = {
        "serviceAccountName": kube.service_account or job.id,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER_ID,
            "runAsGroup": USER_ID,
            "fsGroup": USER_ID,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
        "volumes": volumes,
    }
    if restart:
        pod["restartPolicy"] = restart
    return {"metadata": {"labels": {_LABEL: job.spec.name}}, "spec": pod}


def _container(job: Job, name: str, *, cpus: int, memory_gb: float, gpus: int = 0) -> Object:
    spec = job.spec
    amounts: Object = {"cpu": str(cpus), "memory": f"{memory_gb:g}Gi"}
    if gpus:
        amounts[spec.kuberay.gpu_resource] = str(gpus)
    mounts = [{"name": "tmp", "mountPath": "/tmp"}, {"name": "shm", "mountPath": "/dev/shm"}]
    if spec.storage.claim:
        mounts.append({"name": "storage", "mountPath": spec.storage.root})
    return {
        "name": name,
        "image": spec.environment.image or IMAGE,
        "resources": {"requests": amounts, "limits": dict(amounts)},
        "env": [{"name": "HOME", "value": "/tmp"}, {"name": "RAY_USAGE_STATS_ENABLED", "value": "0"}, *_secrets(job)],
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": mounts,
    }


def _secrets(job: Job) -> list[Object]:
    """Variables out of Secrets: of the object that a reference names, else of kuberay.secret under their own names."""
    variables = []
    for name, reference in job.spec.environment.secrets.items():
        kind, _, where = reference.partition(":")
        secret, _, key = where.partition("/") if kind == "secret" else (job.spec.kuberay.secret, "", name)
        variables.append({"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}})
    return variables
