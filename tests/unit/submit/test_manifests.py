"""Manifests against KubeRay's own schemas, core kinds against Kubernetes', and the promises that guard a cluster."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from medim_ray.submit.base import TARGETS, Job
from medim_ray.submit.manifests import manifests
from medim_ray.submit.spec import load_spec

ROOT = Path(__file__).parents[3]
SCHEMAS = ROOT.parent / "shared/schemas"
SHIPPED = ROOT / "cluster/kuberay"
KUBERNETES = "1.34"
LARGE, SMALL = ROOT / "jobs/pretrain-rad_dino-large.yaml", ROOT / "jobs/pretrain-medim-small.yaml"
VARIANTS = {
    "cpu": (SMALL, []),
    "gpu": (LARGE, ["kuberay.queue=chest"]),
    "spot": (LARGE, ["kuberay.overlay=spot", "kuberay.node_selector.zone=a", "kuberay.tls=true"]),
    "claim": (SMALL, ["storage.root=/mnt/medim", "storage.claim=medim", "storage.claim_gb=500"]),
    "bucket": (
        SMALL,
        ["storage.root=s3://medim", "environment.secrets={AWS_ACCESS_KEY_ID: secret:aws/id, S3_KEY: env}"],
    ),
    "cluster": (LARGE, ["kuberay.kind=cluster"]),
}


def documents(variant: str) -> list[dict[str, Any]]:
    file, overrides = VARIANTS[variant]
    return manifests(Job(spec=load_spec(file, ["target=kuberay", *overrides])))


@cache
def schema(kind: str) -> Any:
    """The schema of a custom resource, closed: KubeRay drops unknown fields without a word, a test must not."""
    file = SCHEMAS / f"ray.io_{kind.lower()}s.yaml"
    if not file.is_file():
        pytest.skip(f"{file} is not here")
    versions = yaml.safe_load(file.read_text())["spec"]["versions"]
    root = next(version for version in versions if version["name"] == "v1")["schema"]["openAPIV3Schema"]

    def close(node: Any) -> None:
        if isinstance(node, dict):
            if "properties" in node and not node.get("x-kubernetes-preserve-unknown-fields"):
                node.setdefault("additionalProperties", False)
            for child in node.values():
                close(child)
        elif isinstance(node, list):
            for child in node:
                close(child)

    close(root["properties"]["spec"])
    return jsonschema.Draft4Validator(root)


def check(document: dict[str, Any]) -> None:
    if document["apiVersion"] == "ray.io/v1":
        schema(document["kind"]).validate(document)
        for template in templates(document):
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x", **template["metadata"]}}
            kubernetes_validate.validate({**pod, "spec": template["spec"]}, KUBERNETES, strict=True)
    else:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)


def templates(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    spec = document["spec"]
    if "submitterPodTemplate" in spec:
        yield spec["submitterPodTemplate"]
    cluster = spec.get("rayClusterSpec", spec)
    yield cluster["headGroupSpec"]["template"]
    yield from (group["template"] for group in cluster["workerGroupSpecs"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_manifest_is_valid(variant: str) -> None:
    for document in documents(variant):
        check(document)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "suspended"), True),
        (("spec", "rayClusterSpec", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
        (("spec", "rayClusterSpec", "authOptions", "mode"), "on"),
        (("spec", "rayClusterSpec", "workerGroupSpecs", 0, "template", "spec", "containers", 0, "imag"), "x"),
    ],
)
def test_the_validation_itself_finds_faults(path: tuple[Any, ...], value: Any) -> None:
    document = copy.deepcopy(documents("cpu")[-1])
    node: Any = document
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        check(document)


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_root_no_writable_root_no_rights_and_limits_everywhere(variant: str) -> None:
    for template in templates(documents(variant)[-1]):
        pod = template["spec"]
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] > 0
        assert pod["automountServiceAccountToken"] is False
        for container in pod["containers"]:
            security = container["securityContext"]
            assert security["readOnlyRootFilesystem"] and not security["allowPrivilegeEscalation"]
            assert security["capabilities"] == {"drop": ["ALL"]}
            assert {"cpu", "memory"} <= container["resources"]["limits"].keys()
            assert {mount["mountPath"] for mount in container["volumeMounts"]} >= {"/tmp", "/dev/shm"}


@pytest.mark.parametrize("variant", VARIANTS)
def test_token_private_dashboard_and_a_head_without_work(variant: str) -> None:
    *others, last = documents(variant)
    cluster = last["spec"].get("rayClusterSpec", last["spec"])
    assert cluster["authOptions"] == {"mode": "token"}
    head = cluster["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert head["serviceType"] == "ClusterIP" and head["enableIngress"] is False
    policy = next(document for document in others if document["kind"] == "NetworkPolicy")["spec"]
    for template in templates(last):
        assert policy["podSelector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert all("from" in rule for rule in policy["ingress"]), "no rule lets everyone in"


def test_overlays() -> None:
    def workers(variant: str) -> Any:
        return documents(variant)[-1]["spec"]["rayClusterSpec"]["workerGroupSpecs"]

    assert "nvidia.com/gpu" not in workers("cpu")[0]["template"]["spec"]["containers"][0]["resources"]["limits"]
    gpu = workers("gpu")
    assert gpu[0]["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "8"
    assert [group["groupName"] for group in gpu] == ["workers", "decode"] and gpu[1]["replicas"] == 4
    job = documents("gpu")[-1]
    assert job["spec"]["suspend"] and job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "chest"
    spot = workers("spot")[0]["template"]["spec"]
    keys = {"karpenter.sh/capacity-type", "cloud.google.com/gke-spot", "nvidia.com/gpu"}
    assert keys <= {t["key"] for t in spot["tolerations"]}, "spot nodes with GPUs have both taints"
    assert spot["nodeSelector"] == {"zone": "a"}
    head = documents("spot")[-1]["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    assert "tolerations" not in head, "the head stays on nodes that are not taken away"


def test_claims_and_secrets_are_references() -> None:
    claim, *_, job = (document for document in documents("claim") if document["kind"] != "ServiceAccount")
    assert claim["kind"] == "PersistentVolumeClaim" and claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for template in templates(job):
        mounts = {m["name"]: m["mountPath"] for m in template["spec"]["containers"][0]["volumeMounts"]}
        assert mounts["storage"] == "/mnt/medim"
    env = {
        e["name"]: e["valueFrom"]["secretKeyRef"]
        for e in next(templates(documents("bucket")[-1]))["spec"]["containers"][0]["env"]
        if "valueFrom" in e
    }
    assert env == {
        "AWS_ACCESS_KEY_ID": {"name": "aws", "key": "id"},
        "S3_KEY": {"name": "medim-ray", "key": "S3_KEY"},
    }


@pytest.mark.parametrize("file", sorted(SHIPPED.glob("*.yaml")), ids=lambda f: f.name)
def test_shipped_manifests_are_what_submit_renders(file: Path) -> None:
    text = file.read_text()
    command = text.splitlines()[1].removeprefix("# medim-ray submit ").split()
    spec = load_spec(ROOT / command[0], command[1:-1])
    plan = TARGETS["kuberay"]().plan(Job(spec=spec))
    shipped = list(yaml.safe_load_all(text))
    rendered = list(yaml.safe_load_all(plan.text))
    for document in [*shipped, *rendered]:  # the installed Ray may be newer than the one they were written with
        cluster = (
            document["spec"] if document["kind"] == "RayCluster" else document.get("spec", {}).get("rayClusterSpec")
        )
        if cluster:
            cluster.pop("rayVersion")
    assert shipped == rendered, f"render it again: medim-ray submit {' '.join(command)}"
    for document in yaml.safe_load_all(text):
        check(document)


def test_all_overlays_are_shipped() -> None:
    kinds = {(d["kind"], f.stem) for f in SHIPPED.glob("*.yaml") for d in yaml.safe_load_all(f.read_text())}
    assert {("RayJob", f"job-{name}") for name in ("cpu", "gpu", "spot")} <= kinds
    assert {("RayCluster", f"cluster-{name}") for name in ("cpu", "gpu", "spot")} <= kinds


def test_what_would_not_pass_through_the_shells_of_kuberay_is_refused() -> None:
    with pytest.raises(ValueError, match="do not pass through KubeRay's shells"):
        manifests(Job(spec=load_spec(SMALL, ["target=kuberay", "args=['run.dir=/a b']"])))
