"""Target `ray`: the Jobs API of a running cluster, with its token. The job's id is ours, so a second submit attaches.

Secrets are never in a request: what stands in a runtime environment can be read by whoever may list jobs.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shlex
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from medim_ray.submit.base import (
    TARGETS,
    Job,
    Plan,
    Record,
    State,
    Status,
    TargetError,
    entry,
    notes_outside_kubernetes,
    package_check,
    secret_lines,
)
from medim_ray.submit.spec import JobSpec, Resources
from medim_ray.submit.upload import pack

_ASK_S = 30
_STATES: dict[str, State] = {
    "PENDING": "pending",
    "RUNNING": "running",
    "SUCCEEDED": "succeeded",
    "FAILED": "failed",
    "STOPPED": "stopped",
}


@TARGETS.register("ray")
class RayJobsTarget:
    """Jobs of a running Ray cluster; the handle is the submission id."""

    def plan(self, job: Job) -> Plan:
        spec = job.spec
        notes = notes_outside_kubernetes(spec)
        if spec.resources != Resources():
            notes.append("resources.*: the cluster has the nodes that it has; workers are asked for by train.*")
        if spec.environment.secrets:
            names = ", ".join(spec.environment.secrets)
            notes.append(f"{names}: read where the driver runs; workers have what their nodes were started with")
        with tempfile.TemporaryDirectory() as folder:
            notes.append(f"working_dir: {_pack(spec, Path(folder) / 'working_dir.zip')}")
        text = json.dumps(request(job), indent=1) + "\n"
        return Plan(text=text, how=f"POST {spec.ray.address}/api/jobs/ with the token", notes=tuple(notes))

    def submit(self, job: Job, plan: Plan) -> str:
        client = connect(job.spec)
        if _is_open(job.spec):
            print(
                f"note: {job.spec.ray.address} takes jobs without a token, from whoever reaches it: start its head "
                "with RAY_AUTH_MODE=token",
                file=sys.stderr,
            )
        arguments = request(job)
        with tempfile.TemporaryDirectory() as folder:
            archive = Path(folder) / "working_dir.zip"
            _pack(job.spec, archive)
            arguments["runtime_env"]["working_dir"] = str(archive)
            if Path(job.spec.environment.wheel).is_file():
                arguments["runtime_env"]["py_modules"] = _unpacked(job.spec.environment.wheel, Path(folder) / "wheel")
            with _translated(job.spec):
                try:
                    return str(client.submit_job(**arguments))
                except RuntimeError as error:
                    if "already exists" in str(error):
                        return job.id
                    raise

    def status(self, record: Record, job: Job) -> Status:
        client = connect(job.spec)
        with _translated(job.spec):
            try:
                info = client.get_job_info(record.handle)
            except RuntimeError as error:
                if "404" in str(error) or "does not exist" in str(error):
                    return Status(state="lost", reason="the cluster does not know it: another cluster, or a new head")
                raise
        state = _STATES[str(info.status)]
        if state in ("pending", "running"):
            return Status(state=state)
        return Status(state=state, exit_code=_exit_code(state, info.message or ""), reason=_first_line(info.message))

    def logs(self, record: Record, job: Job, follow: bool) -> Iterator[str]:
        client = connect(job.spec)
        with _translated(job.spec):
            if not follow:
                yield client.get_job_logs(record.handle)
                return
            with asyncio.Runner() as runner:
                pieces = client.tail_job_logs(record.handle)
                while True:
                    try:
                        yield runner.run(anext(pieces))
                    except StopAsyncIteration:
                        return

    def stop(self, record: Record, job: Job) -> None:
        client = connect(job.spec)
        with _translated(job.spec):
            client.stop_job(record.handle)


def request(job: Job) -> dict[str, Any]:
    """The arguments of submit_job; `working_dir` and a wheel are replaced by what is in them when it is sent."""
    spec = job.spec
    environment: dict[str, Any] = {"working_dir": str(_folder(spec))}
    if spec.environment.variables:
        environment["env_vars"] = dict(spec.environment.variables)
    if spec.environment.wheel:
        environment["py_modules"] = [spec.environment.wheel]
    tags = {f"tag.{key}": value for key, value in spec.tags.items()}
    arguments = {
        "entrypoint": _entrypoint(spec),
        "submission_id": job.id,
        "runtime_env": environment,
        "metadata": {"name": spec.name, "spec_hash": spec.hash, "attempt": str(job.attempt), **tags},
        "entrypoint_num_cpus": spec.ray.entrypoint_cpus,
    }
    if spec.ray.entrypoint_resources:
        arguments["entrypoint_resources"] = dict(spec.ray.entrypoint_resources)
    return arguments


def _unpacked(wheel: str, folder: Path) -> list[str]:
    """The packages of a wheel. Ray would install the wheel itself, with all that it depends on, on every node."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return [str(path) for path in sorted(folder.iterdir()) if path.suffix != ".dist-info"]


def connect(spec: JobSpec) -> Any:
    """A client of the Jobs API. TargetError with the fix: no cluster there, no or a wrong token, another Ray."""
    import ray
    from ray.job_submission import JobSubmissionClient

    address, token = spec.ray.address.rstrip("/"), read_token(spec.ray.token_file)
    headers = {"Authorization": f"Bearer {token}"} if token else None
    with _translated(spec, has_token=bool(token)), _address(address):
        client = JobSubmissionClient(address, headers=headers, verify=spec.tls.ca or True)
        theirs = client._do_request("GET", "/api/version").json()["ray_version"]
    if theirs != ray.__version__:
        raise TargetError(
            f"{address} runs Ray {theirs}, this is Ray {ray.__version__}: driver and cluster must be the same; install "
            f"'ray=={theirs}' here, or start the cluster with the image of this version"
        )
    return client


def _is_open(spec: JobSpec) -> bool:
    """Whether the cluster answers those who show no token."""
    import requests

    with _translated(spec):
        answer = requests.get(f"{spec.ray.address.rstrip('/')}/api/jobs/", verify=spec.tls.ca or True, timeout=_ASK_S)
    return bool(answer.ok)


def read_token(file: str = "") -> str:
    """The cluster's token: `file`, RAY_AUTH_TOKEN, the file at RAY_AUTH_TOKEN_PATH, or ~/.ray/auth_token; '' if none.

    ValueError where a file that was named can't be read.
    """
    if not file and os.environ.get("RAY_AUTH_TOKEN"):
        return os.environ["RAY_AUTH_TOKEN"]
    named = file or os.environ.get("RAY_AUTH_TOKEN_PATH", "")
    path = Path(named) if named else Path.home() / ".ray" / "auth_token"
    try:
        return path.read_text().strip()
    except OSError as error:
        if named:
            raise ValueError(f"the token file {path} can't be read: {error.strerror}") from None
        return ""


@contextlib.contextmanager
def _translated(spec: JobSpec, has_token: bool = True) -> Iterator[None]:
    """Errors of the client as TargetError that says what to do."""
    import requests
    from ray.exceptions import AuthenticationError

    address = spec.ray.address
    try:
        yield
    except AuthenticationError as error:
        if not has_token or "required" in str(error).lower():
            raise TargetError(
                f"{address} asks for a token and there is none: set RAY_AUTH_TOKEN_PATH, or ray.token_file=FILE, to "
                "the file that its head was started with (`ray get-auth-token` on the head prints it)"
            ) from None
        raise TargetError(
            f"{address} refuses the token: it is another cluster's; copy the one of this head (`ray get-auth-token` "
            "there) to ray.token_file=FILE or RAY_AUTH_TOKEN_PATH"
        ) from None
    except (ConnectionError, requests.exceptions.RequestException) as error:
        raise TargetError(
            f"no Ray cluster answers at {address} ({type(error).__name__}): is the head up (`ray status` there), and "
            "is its dashboard reachable from here (ssh -L 8265:127.0.0.1:8265 HEAD, or kubectl port-forward)?"
        ) from None
    except RuntimeError as error:
        if isinstance(error, TargetError):
            raise
        raise TargetError(f"{address}: {error}") from None


@contextlib.contextmanager
def _address(address: str) -> Iterator[None]:
    """The client's address argument gives way to two variables of the environment; the spec must not."""
    name = "RAY_API_SERVER_ADDRESS"
    before = os.environ.get(name)
    os.environ[name] = address
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _exit_code(state: State, message: str) -> int:
    """The API tells the exit code in words only."""
    found = re.search(r"exit code (-?\d+)", message)
    code = int(found[1]) if found else int(state != "succeeded")
    return code if code >= 0 else 128 - code


def _first_line(message: str | None) -> str:
    return (message or "").partition("\n")[0].partition(", last available logs")[0]


def _entrypoint(spec: JobSpec) -> str:
    """One shell command; it names its interpreter, since `python` would be another one."""
    return "; ".join([*secret_lines(spec), package_check(spec), f"exec {shlex.join(entry(spec))}"])


def _folder(spec: JobSpec) -> Path:
    return Path(spec.environment.working_dir or ".").absolute()


def _pack(spec: JobSpec, to: Path) -> str:
    folder, root = _folder(spec), Path(spec.storage.root)
    excludes = list(spec.environment.excludes)
    if root.is_relative_to(folder) and root != folder:  # runs, and shards with reports in them
        excludes.append(f"/{root.relative_to(folder).as_posix()}")
    return pack(folder, excludes, spec.ray.max_upload_mb, to)
