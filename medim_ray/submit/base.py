"""What a target is: a plan of what would be sent, made without contact, and five verbs that need the target.

Shell that all targets share is here too: the job's command line, its environment, and the check of its interpreter.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from medim_ray.registry import Registry
from medim_ray.submit.spec import JobSpec

State = Literal["pending", "running", "succeeded", "failed", "stopped", "lost"]
ENDED: tuple[State, ...] = ("succeeded", "failed", "stopped", "lost")
UNFINISHED = 75
"""Exit code of a command that was asked to stop, has committed what it did, and has work left (EX_TEMPFAIL)."""
NO_PACKAGE = 78
"""Exit code of a job whose image or interpreter lacks medim_ray (EX_CONFIG)."""


EXIT_CODE, STOPPED = "exit_code", "stopped"
"""Files in a job's folder: what the command ended with, and that it was told to."""


GRACE_S = 60.0
"""Seconds between the request to end and the kill."""


class TargetError(RuntimeError):
    """The target can't be reached, refuses, or lost the job; the message says what to do."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One attempt at a spec. attempt: 0, then 1 for the first `jobs resubmit`."""

    spec: JobSpec
    attempt: int = 0

    @property
    def id(self) -> str:
        """A name that no other attempt and no other spec has."""
        return f"{self.spec.name}-{self.spec.hash[:8]}-{self.attempt}"

    @property
    def folder(self) -> Path:
        """Script, log and exit code of this attempt, for targets that share a filesystem with us."""
        root = self.spec.storage.root
        return (Path.home() / ".medim-ray" if "://" in root else Path(root)) / "jobs" / self.id


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What would be sent: `text` exactly (a script, a manifest, a request) and how; notes say what is left out."""

    text: str
    how: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Record:
    """A job that was submitted, as state.py keeps it. handle: what the target calls it."""

    name: str
    hash: str
    target: str
    attempt: int
    handle: str
    submitted_at: float
    spec: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """A plain tree; the spec holds references to secrets only."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Status:
    """state, the command's exit code once it has ended, and the target's own words on it."""

    state: State
    exit_code: int | None = None
    reason: str = ""


class Target(Protocol):
    """A place where jobs run. Constructed without arguments; `plan` contacts nothing."""

    def plan(self, job: Job) -> Plan: ...

    def submit(self, job: Job, plan: Plan) -> str:
        """Sends the plan; the target's handle. ValueError or TargetError with the fix. A job of the same id that the
        target already has is attached to, not doubled."""
        ...

    def status(self, record: Record, job: Job) -> Status: ...

    def logs(self, record: Record, job: Job, follow: bool) -> Iterator[str]:
        """Pieces of the log from its beginning; with `follow` until the job has ended."""
        ...

    def stop(self, record: Record, job: Job) -> None: ...


TARGETS: Registry[Any] = Registry("target")


def interpreter(spec: JobSpec) -> str:
    """The Python that runs the job. A bare `python` would be the one of Ray or of the node, not of the environment."""
    return spec.environment.python or ("python" if in_image(spec) else sys.executable)


def in_image(spec: JobSpec) -> bool:
    """Whether the command runs in `environment.image`."""
    if spec.target == "slurm":
        return spec.slurm.container != "none"
    return spec.target == "kuberay"


def words(spec: JobSpec) -> list[str]:
    """`PYTHON -m medim_ray.cli …`."""
    return [interpreter(spec), "-m", "medim_ray.cli", *spec.arguments]


def entry(spec: JobSpec, folder: Path | None = None) -> list[str]:
    """The command under entry.py, which sees to its time limit and retries."""
    where = ["--folder", str(folder)] if folder is not None else []
    limits = ["--retries", str(spec.retries), "--time-limit", str(spec.time_limit_s)]
    return [interpreter(spec), "-m", "medim_ray.submit.entry", *where, *limits, "--", *spec.arguments]


def package_check(spec: JobSpec) -> str:
    """A shell line that ends the job with NO_PACKAGE where the interpreter has no medim_ray."""
    python = interpreter(spec)
    where = f"image {spec.environment.image}: {python}" if in_image(spec) else python
    said = f"medim-ray: {where} has no medim_ray: use the image of cluster/docker, environment.python or .wheel"
    return f"{shlex.quote(python)} -c 'import medim_ray.cli' || {{ echo {shlex.quote(said)} >&2; exit {NO_PACKAGE}; }}"


def exports(spec: JobSpec) -> list[str]:
    """Shell lines that set variables and secrets."""
    variables = {**spec.environment.variables, **spec.tls.variables()}
    return [*(f"export {name}={shlex.quote(value)}" for name, value in variables.items()), *secret_lines(spec)]


def secret_lines(spec: JobSpec) -> list[str]:
    """Shell lines that read secrets from their files, and end the job where one that should be set is not."""
    lines = []
    for name, reference in spec.environment.secrets.items():
        kind, _, path = reference.partition(":")
        if kind == "file":
            lines.append(f'{name}="$(cat {shlex.quote(path)})" || exit 1; export {name}')
        else:
            lines.append(f': "${{{name}:?is not set where the job runs, see environment.secrets}}"')
    return lines


def kube_secrets(spec: JobSpec) -> list[str]:
    """Names of secrets that only Kubernetes can resolve."""
    return [name for name, reference in spec.environment.secrets.items() if reference.startswith("secret:")]


def notes_outside_kubernetes(spec: JobSpec) -> list[str]:
    """Parts of a spec that say something to another target only; a dry run of any spec on any target says so."""
    notes = []
    if spec.environment.image and not in_image(spec):
        notes.append(f"environment.image is not used on target {spec.target}: {interpreter(spec)} runs the job")
    if kube_secrets(spec):
        notes.append(
            f"{', '.join(kube_secrets(spec))}: secret: is a reference of Kubernetes; on target {spec.target} write env "
            "or file:/PATH before you submit"
        )
    return notes
