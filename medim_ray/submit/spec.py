"""Job specs: what to run, where and with how much, typed and loaded like the configs. Nothing here contacts a target.

A spec says `${storage.root}` and `${name}` where a path depends on them, so that one file serves every target.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from medim_ray.config.loader import leaves, load, option, run_hash

TARGETS = ("local", "ray", "slurm", "kuberay")
MAX_NAME = 35  # with hash and attempt 47 characters, the most that KubeRay allows a RayJob
_NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")  # KubeRay takes no name that begins with a digit
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SECRET_NAME = re.compile(r"token(?!s|iz)|secret|passw|credential|api_?key|access_?key|private_?key|salt", re.I)
_NO_VALUES = ("_PATH", "_FILE", "_DIR", "_MODE", "_NAME", "_URL")  # such variables say where a secret is
_SECRET_VALUE = re.compile(
    r"AKIA[0-9A-Z]{16}|hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|-----BEGIN [A-Z ]*PRIVATE KEY"
    r"|://[^/\s:@]+:(?!\d+(/|$))[^\s@]+@"  # a password in a URL, but no port
)
_TAG = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
_OBJECT_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")
_ARRAY = re.compile(r"\d+(-\d+(:\d+)?)?(,\d+(-\d+(:\d+)?)?)*(%\d+)?")
_REFERENCE = re.compile(r"env|file:/.+|secret:[a-z0-9][-a-z0-9.]*/[-._a-zA-Z0-9]+")
# Options of the commands that name storage: where nodes have no common working folder they must be absolute.
STORAGE_OPTIONS = ("out", "run", "shards", "run.dir", "data.shards", "source.path", "track.aim_repo")


@dataclass(frozen=True, kw_only=True)
class Resources:
    """Nodes of a job. `decode_*`: further nodes without accelerators, which only decode and transform images."""

    nodes: int = option(1, "nodes that run training workers")
    cpus: int = option(2, "CPU cores of each of them")
    gpus: int = option(0, "accelerators of each of them")
    memory_gb: float = option(4.0, "memory of each of them")
    decode_nodes: int = option(0, "further nodes, of another kind, for image decoding")
    decode_cpus: int = option(4, "CPU cores of each of these")
    decode_memory_gb: float = option(16.0, "memory of each of these")

    def __post_init__(self) -> None:
        for key in ("nodes", "cpus", "decode_cpus"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)}: must be at least 1")
        for key in ("gpus", "decode_nodes"):
            if getattr(self, key) < 0:
                raise ValueError(f"{key}={getattr(self, key)}: must be at least 0")
        for key in ("memory_gb", "decode_memory_gb"):
            if not 1 <= getattr(self, key) < math.inf:
                raise ValueError(f"{key}={getattr(self, key)}: Ray alone takes about 1 GB; give more, and a number")


@dataclass(frozen=True, kw_only=True)
class Environment:
    """The software of a job: an image, or a working folder with an interpreter, or a wheel over one of them."""

    image: str = option("", "container image; required by kuberay, used by slurm with slurm.container")
    python: str = option("", "interpreter; empty: `python` in an image, else the one that submits")
    working_dir: str = option("", "folder with the recipes; sent to ray, entered elsewhere; empty: the current one")
    excludes: tuple[str, ...] = option(
        (".git", ".venv", ".env", ".mypy_cache", ".ruff_cache", ".hypothesis", "storage", "runs", "shards", "demo"),
        "patterns, as in .gitignore, that are not sent with the working folder",
    )
    wheel: str = option("", "wheel of this package, a path or URL, to run instead of what the interpreter has")
    variables: dict[str, str] = option({}, "environment variables that are no secrets")
    secrets: dict[str, str] = option(
        {}, "NAME: env (set where it runs), file:/PATH (read there) or secret:OBJECT/KEY (Kubernetes); never a value"
    )

    def __post_init__(self) -> None:
        for name in (*self.variables, *self.secrets):
            if not _VARIABLE.fullmatch(name):
                raise ValueError(f"{name!r} is no name of an environment variable: letters, digits and _ only")
        for name, value in self.variables.items():
            if _SECRET_NAME.search(name) or _SECRET_VALUE.search(value):
                raise ValueError(
                    f"variables.{name} looks like a secret, and specs are no place for one: "
                    f"write environment.secrets: {{{name}: env}} and set it where the job runs"
                )
        for name, reference in self.secrets.items():
            if not _REFERENCE.fullmatch(reference):
                raise ValueError(
                    f"secrets.{name}: not a reference (it is not shown here, it may be the secret): "
                    "use env, file:/PATH or secret:OBJECT/KEY"
                )


@dataclass(frozen=True, kw_only=True)
class Storage:
    """Where shards and runs lie. Every node must see it."""

    root: str = option("storage", "folder on a shared filesystem, or fsspec URL; the command says ${storage.root}")
    claim: str = option("", "kuberay: PersistentVolumeClaim to mount at storage.root; empty with a URL")
    claim_gb: int = option(0, "kuberay: size of a claim to make (ReadWriteMany); 0: the claim exists")
    claim_class: str = option("", "kuberay: storage class of the claim to make; empty: the cluster's default")

    def __post_init__(self) -> None:
        if not self.root or self.root.startswith("~"):
            raise ValueError(
                f"root={self.root}: give a folder or URL; `~` is another folder on every machine: write it out"
            )
        if self.claim_gb < 0:
            raise ValueError(f"claim_gb={self.claim_gb}: must be at least 0; 0: the claim exists")
        if self.claim and "://" in self.root:
            raise ValueError(
                f"claim={self.claim} with root={self.root}: a claim is mounted at a folder; give one of both"
            )
        _check_object_names(self, "claim", "claim_class")


@dataclass(frozen=True, kw_only=True)
class Tls:
    """Certificates for Ray's own connections, as paths on the nodes; all three or none."""

    cert: str = option("", "certificate of the nodes (RAY_TLS_SERVER_CERT)")
    key: str = option("", "its private key (RAY_TLS_SERVER_KEY)")
    ca: str = option("", "certificate of the authority that signed it (RAY_TLS_CA_CERT)")

    def __post_init__(self) -> None:
        given = [key for key in ("cert", "key", "ca") if getattr(self, key)]
        if given and len(given) < 3:
            raise ValueError(f"only {', '.join(given)} given: TLS needs cert, key and ca")

    def variables(self) -> dict[str, str]:
        """What Ray reads, on head, workers and client alike; empty without TLS."""
        if not self.cert:
            return {}
        names = {"RAY_TLS_SERVER_CERT": self.cert, "RAY_TLS_SERVER_KEY": self.key, "RAY_TLS_CA_CERT": self.ca}
        return {"RAY_USE_TLS": "1", **names}


@dataclass(frozen=True, kw_only=True)
class RayTarget:
    """A running cluster with the Jobs API."""

    address: str = option(
        "http://127.0.0.1:8265", "dashboard of the cluster; through ssh or port-forward, never public"
    )
    token_file: str = option("", "file with the token; empty: RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token")
    entrypoint_cpus: float = option(0.5, "CPUs reserved for the driver; above 0 it keeps off a head without CPUs")
    entrypoint_resources: dict[str, float] = option({}, "custom resources for the driver, e.g. {stable: 1}")
    max_upload_mb: int = option(100, "limit of what is sent with a job; Ray's own is 512")

    def __post_init__(self) -> None:
        if not re.match(r"https?://[^/\s]", self.address):
            raise ValueError(
                f"address={self.address}: the Jobs API speaks HTTP; use http://HOST:8265, "
                "not the address that ray.init takes"
            )
        if not 0 < self.max_upload_mb <= 512:
            raise ValueError(f"max_upload_mb={self.max_upload_mb}: between 1 and 512, Ray's own limit")
        amounts = {"entrypoint_cpus": self.entrypoint_cpus, **self.entrypoint_resources}
        for name, amount in amounts.items():
            if not 0 <= amount < math.inf:
                raise ValueError(f"{name}={amount}: an amount is at least 0")


@dataclass(frozen=True, kw_only=True)
class SlurmTarget:
    """Options of sbatch, and how a cluster of Ray is made inside an allocation."""

    partition: str = option("", "empty: the default one")
    account: str = option("", "empty: the user's default")
    qos: str = option("", "empty: the default one")
    constraint: str = option("", "features that the nodes must have")
    exclusive: bool = option(False, "no other job on the nodes")
    array: str = option("", "e.g. 0-7: that many tasks, each with its own cluster and SLURM_ARRAY_TASK_ID")
    container: Literal["none", "apptainer", "pyxis"] = option("none", "how environment.image is run")
    symmetric: bool = option(False, "start with `ray symmetric-run`; needs nodes of one kind that are not shared")
    signal_s: int = option(120, "seconds before the time limit at which the job is asked to commit a checkpoint")
    start_timeout_s: int = option(300, "seconds that the cluster may take to come up")
    options: tuple[str, ...] = option((), "further lines for sbatch, e.g. [--reservation=chest]")

    def __post_init__(self) -> None:
        for key in ("partition", "account", "qos", "constraint"):
            if re.search(r"\s", getattr(self, key)):
                raise ValueError(f"{key}={getattr(self, key)!r}: has white space, where sbatch reads the next option")
        if self.array and not _ARRAY.fullmatch(self.array):
            raise ValueError(f"array={self.array}: task numbers such as 0-7, 0-30:10 or 1,3,5, and %N for N at once")
        for text in self.options:
            if not re.fullmatch(r"--[a-z][-a-z]*(=\S+)?", text):
                raise ValueError(f"options: {text!r} is not of the form --name or --name=value")
        if self.signal_s < 1 or self.start_timeout_s < 1:
            raise ValueError(f"signal_s={self.signal_s}, start_timeout_s={self.start_timeout_s}: must be at least 1")


@dataclass(frozen=True, kw_only=True)
class KubeTarget:
    """A RayJob or a RayCluster, and what guards it."""

    namespace: str = option("medim-ray", "namespace; it must exist")
    kind: Literal["job", "cluster"] = option("job", "a RayJob, or a RayCluster alone that takes jobs of target ray")
    overlay: Literal["auto", "cpu", "gpu", "spot"] = option(
        "auto", "kind of the workers; spot: interruptible nodes, with or without GPUs; auto: by resources.gpus"
    )
    context: str = option("", "kubectl context; empty: the current one")
    queue: str = option("", "Kueue local queue; the job is made suspended and Kueue starts it")
    service_account: str = option("", "existing account, e.g. with access to a bucket; empty: one without any rights")
    operator_namespace: str = option("kuberay-operator", "namespace of the operator, which may reach the head")
    node_selector: dict[str, str] = option({}, "labels that workers' nodes must have")
    secret: str = option("medim-ray", "Secret whose keys stand for environment.secrets that are env or file:")
    gpu_resource: str = option("nvidia.com/gpu", "name of the accelerator")
    shm_gb: float = option(2.0, "shared memory of each pod: Ray's object store")
    tls: bool = option(False, "encrypt Ray's connections with certificates of the operator")

    def __post_init__(self) -> None:
        _check_object_names(self, "namespace", "queue", "service_account", "operator_namespace", "secret")
        if not 0 < self.shm_gb < math.inf:
            raise ValueError(f"shm_gb={self.shm_gb}: Ray's object store needs more than 0")


@dataclass(frozen=True, kw_only=True)
class JobSpec:
    """One job. Everything but `tags` and `args` of the same meaning is its identity."""

    name: str = field(metadata={"help": "name of the job: lower case, digits and -; the key of `medim-ray jobs`"})
    command: tuple[str, ...] = field(metadata={"help": "a medim-ray command with its overrides, one item a word"})
    args: tuple[str, ...] = option((), "further overrides, after those of the command: args=[train.steps=4]")
    target: Literal["local", "ray", "slurm", "kuberay"] = option("local", "where it runs")
    resources: Resources = field(default_factory=Resources)
    environment: Environment = field(default_factory=Environment)
    storage: Storage = field(default_factory=Storage)
    retries: int = option(3, "times that the job is begun again after a lost node or the time limit")
    time_limit_s: int = option(86_400, "wall-clock limit of one attempt")
    tags: dict[str, str] = option(
        {}, "labels for people; no part of the identity, and no place for patient data", hashed=False
    )
    tls: Tls = field(default_factory=Tls)
    ray: RayTarget = field(default_factory=RayTarget)
    slurm: SlurmTarget = field(default_factory=SlurmTarget)
    kuberay: KubeTarget = field(default_factory=KubeTarget)

    def __post_init__(self) -> None:
        for key, value, _ in leaves(self):
            if any(_SECRET_VALUE.search(text) for text in _texts(value)):
                raise ValueError(
                    f"{key} holds what looks like a secret (not shown here), and specs are no place for one: give it "
                    "by environment.secrets"
                )
        if not _NAME.fullmatch(self.name) or len(self.name) > MAX_NAME:
            shown = self.name if len(self.name) <= 60 else f"{self.name[:60]}… ({len(self.name)} characters)"
            raise ValueError(
                f"name={shown!r}: 1 to {MAX_NAME} lower-case letters, digits and dashes, a letter first, on every "
                f"target alike; e.g. name={_slug(self.name)}"
            )
        if not self.command:
            raise ValueError("command is empty: give a medim-ray command, e.g. command: [doctor]")
        if self.retries < 0:
            raise ValueError(f"retries={self.retries}: must be at least 0")
        for text in self.arguments:
            key, _, value = text.partition("=")
            if "\n" in text or "\0" in text:
                raise ValueError(f"command: {key!r} holds a line break, which no target passes on alike")
            if value and _SECRET_NAME.search(key.rpartition(".")[2]):
                raise ValueError(
                    f"command: {key}=… looks like a secret, and commands are seen by all: "
                    "give it by environment.secrets"
                )
        least = self.start_up_s
        if self.time_limit_s < least:
            raise ValueError(
                f"time_limit_s={self.time_limit_s}: shorter than the start-up; on target {self.target} a job of "
                f"{self.resources.nodes + self.resources.decode_nodes} node(s) needs at least {least} s before its "
                "first checkpoint can be there"
            )
        for tag in self.tags:
            if not _TAG.fullmatch(tag):
                raise ValueError(f"tags: {tag!r}: 1 to 63 letters, digits, -, _ and ., as Kubernetes has it")
        self._check_slurm()
        self._check_kuberay()

    def _check_slurm(self) -> None:
        slurm = self.slurm
        if slurm.container != "none" and not self.environment.image:
            raise ValueError(
                f"slurm.container={slurm.container} runs environment.image, which is empty: give the image"
            )
        if self.target == "slurm" and self.resources.decode_nodes and (slurm.array or slurm.symmetric):
            key = f"array={slurm.array}" if slurm.array else "symmetric=true"
            raise ValueError(
                f"slurm.{key} with resources.decode_nodes={self.resources.decode_nodes}: nodes of another kind make a "
                "heterogeneous job, which can't be one: use resources.decode_nodes=0"
            )

    def _check_kuberay(self) -> None:
        if self.target == "kuberay" and self.kuberay.shm_gb >= self.resources.memory_gb:
            raise ValueError(
                f"kuberay.shm_gb={self.kuberay.shm_gb} of resources.memory_gb={self.resources.memory_gb}: shared "
                "memory is part of a pod's memory, leave some for the work: a third is usual"
            )
        kind, gpus = self.kuberay.overlay, self.resources.gpus
        if (kind == "gpu" and not gpus) or (kind == "cpu" and gpus):
            raise ValueError(f"kuberay.overlay={kind} with resources.gpus={gpus}: change one, or use overlay=auto")

    @property
    def start_up_s(self) -> int:
        """Seconds before which no attempt can have done anything: Ray, workers, and on Slurm the notice it gets."""
        start = 30 + 2 * (self.resources.nodes + self.resources.decode_nodes)
        return start + (self.slurm.signal_s if self.target == "slurm" else 0)

    @property
    def arguments(self) -> tuple[str, ...]:
        """The words after `medim-ray`."""
        return (*self.command, *self.args)

    @property
    def hash(self) -> str:
        """Twelve digits over all that the job is a function of."""
        return run_hash(self)


def load_spec(file: str | Path | None, overrides: Sequence[str] = ()) -> JobSpec:
    """The spec of `file` with overrides; a relative storage.root is taken from the current folder.

    ValueError: see JobSpec, and options of the command that name storage by a relative path where no folder is shared.
    """
    if file is not None and not Path(file).is_file():
        kind = "is a folder: name a file in it" if Path(file).is_dir() else "does not exist"
        raise ValueError(f"job file {file} {kind}; jobs/ has examples")
    try:
        spec = load(JobSpec, file, overrides)
    except TypeError as error:  # of OmegaConf: a list where a mapping belongs, or the reverse
        raise ValueError(f"{file} {' '.join(overrides)}: {error}") from None
    root = spec.storage.root
    if "://" not in root and not Path(root).is_absolute():
        # Before `${storage.root}` is put into the command, hence loaded once more.
        spec = load(JobSpec, file, [*overrides, f"storage.root={Path(root).absolute()}"])
    _check_environment(spec)
    if spec.target in ("ray", "kuberay"):
        _check_paths(spec)
    return spec


def _check_environment(spec: JobSpec) -> None:
    """ValueError where a secret of our own environment stands in the spec, e.g. by `${oc.env:NAME}`."""
    for name, secret in os.environ.items():
        named = spec.environment.secrets.get(name) == "env"
        if len(secret) < 8 or not (named or (_SECRET_NAME.search(name) and not name.endswith(_NO_VALUES))):
            continue
        for key, value, _ in leaves(spec):
            if any(secret in text for text in _texts(value)):
                raise ValueError(
                    f"{key} holds the value of {name}, and specs are no place for a secret: give it by "
                    f"environment.secrets: {{{name}: env}}; \\${{oc.env:{name}}} is read where the job runs"
                )


def _check_paths(spec: JobSpec) -> None:
    for text in spec.arguments:
        key, equals, value = text.partition("=")
        if equals and key in STORAGE_OPTIONS and value and "://" not in value and not value.startswith("/"):
            raise ValueError(
                f"command: {text}: a relative path lies in each node's own folder on target {spec.target}, which no "
                f"other node sees: write {key}=${{storage.root}}/{value}, or a URL such as s3://"
            )


def changed(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Dotted keys whose values differ between two specs."""
    keys: list[str] = []
    for f in fields(new):
        before, after = getattr(old, f.name), getattr(new, f.name)
        if hasattr(after, "__dataclass_fields__"):
            keys += changed(before, after, f"{prefix}{f.name}.")
        elif before != after:
            keys.append(f"{prefix}{f.name}")
    return keys


def _slug(name: str) -> str:
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "my-job"
    return (slug if slug[0].isalpha() else f"job-{slug}")[:MAX_NAME].strip("-")


def _texts(value: Any) -> Iterator[str]:
    """The strings of a leaf: itself, the items of a list, the keys and values of a mapping."""
    entries = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else [value]
    yield from (entry for entry in entries if isinstance(entry, str))


def _check_object_names(group: Any, *keys: str) -> None:
    for key in keys:
        name = getattr(group, key)
        if name and not _OBJECT_NAME.fullmatch(name):
            raise ValueError(f"{key}={name!r}: Kubernetes takes lower-case letters, digits, dashes and dots in names")
