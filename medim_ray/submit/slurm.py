"""Target `slurm`: an sbatch script that makes a Ray cluster of its own in the allocation, and the commands of Slurm.

The script is shell, so that `--dry-run` shows all of it and sites can change it. Ports come from the job id, the token
is made per job, and nothing here calls `ray stop`, which would end a user's other clusters on a shared node.
"""

from __future__ import annotations

import importlib.resources
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence

from medim_ray.submit.base import (
    NO_PACKAGE,
    STOPPED,
    TARGETS,
    UNFINISHED,
    Job,
    Plan,
    Record,
    Status,
    TargetError,
    interpreter,
    notes_outside_kubernetes,
    words,
)
from medim_ray.submit.local import LOG, environment, file_status, new_folder, tail, working_dir

# Reasons to wait that do not pass by themselves.
_FIXES = {
    "PartitionTimeLimit": "time_limit_s is over what the partition allows; give less, or another slurm.partition",
    "PartitionNodeLimit": "resources.nodes is over what the partition allows; give fewer, or another slurm.partition",
    "AssocMaxWallDurationPerJobLimit": "time_limit_s is over what slurm.account allows",
    "QOSMaxWallDurationPerJobLimit": "time_limit_s is over what the quality of service allows",
}
_PENDING = (
    "PENDING",
    "CONFIGURING",
    "REQUEUED",
    "REQUEUE_HOLD",
    "REQUEUE_FED",
    "SUSPENDED",
    "SPECIAL_EXIT",
    "RESIZING",
)
_RUNNING = ("RUNNING", "COMPLETING", "SIGNALING", "STAGE_OUT", "STOPPED")
_TIMEOUT_S = 60
_PASSED_ON = ("PATH", "HOME", "USER", "LANG")
_OBJECT_STORE_RATIO = 0.3
_DOWN = "Ask `scontrol ping`; nothing was sent, and submitting again is safe"


@TARGETS.register("slurm")
class SlurmTarget:
    """Jobs of a Slurm cluster whose login node this is; the handle is the job number."""

    def plan(self, job: Job) -> Plan:
        notes = tuple(notes_outside_kubernetes(job.spec))
        return Plan(text=script(job), how=f"sbatch {job.folder}/job.sh", notes=notes)

    def submit(self, job: Job, plan: Plan) -> str:
        known = _run(["squeue", "--noheader", "--format=%A", f"--name={job.id}"], job)
        if known.split():
            return known.split()[0]
        folder = new_folder(job)
        (folder / "job.sh").write_text(plan.text)
        # Slurm takes jobs that no partition can ever run, and lets them wait: asked first, it refuses.
        _run(["sbatch", "--test-only", str(folder / "job.sh")], job)
        answer = _run(["sbatch", "--parsable", str(folder / "job.sh")], job)
        return answer.strip().partition(";")[0]

    def status(self, record: Record, job: Job) -> Status:
        try:
            text = _run(["scontrol", "show", "job", "--oneliner", record.handle], job)
        except ValueError:
            ended = file_status(job.folder)  # Slurm forgets jobs after MinJobAge, 5 minutes by default
            return ended or Status(state="lost", reason="Slurm knows it no more, and it left no exit code")
        return _worst([_status_of(line) for line in text.splitlines() if line.strip()], job)

    def logs(self, record: Record, job: Job, follow: bool) -> Iterator[str]:
        asked = [0.0, True]

        def is_running() -> bool:  # squeue every few seconds, the file twice a second
            if follow and asked[1] and time.monotonic() - asked[0] > 2:
                asked[:] = time.monotonic(), self.status(record, job).state in ("pending", "running")
            return follow and bool(asked[1])

        if not job.spec.slurm.array:
            yield from tail(job.folder / LOG, is_running)
            return
        while is_running():  # the tasks of an array write at once: each log is told whole, at the end
            time.sleep(0.5)
        for path in sorted(job.folder.glob(f"{LOG}-*")):
            yield f"== task {path.name.removeprefix(f'{LOG}-')}\n{path.read_text(errors='replace')}"

    def stop(self, record: Record, job: Job) -> None:
        (job.folder / STOPPED).touch()
        if self.status(record, job).state == "running":  # scancel tries for minutes to signal what has not begun
            # The batch shell hands the signal on, so that a checkpoint is committed; what is left at the end is killed.
            _run(["scancel", "--batch", "--signal=TERM", record.handle], job)
            deadline = time.monotonic() + job.spec.slurm.signal_s
            while time.monotonic() < deadline and self.status(record, job).state == "running":
                time.sleep(1)
        _run(["scancel", record.handle], job)


def _status_of(line: str) -> Status:
    """The status behind one line of `scontrol show job --oneliner`."""
    values = dict(re.findall(r"(\w+)=(\S*)", line))
    name = values.get("JobState", "")
    code, _, number = values.get("ExitCode", "0:0").partition(":")
    exit_code = int(code) or (128 + int(number) if int(number) else 0)
    reason = values.get("Reason", "None")
    shown = name if reason in ("None", "") else f"{name}, {reason}"
    if name in _PENDING:
        fix = f": {_FIXES[reason]}" if reason in _FIXES else ""
        return Status(state="pending", reason="" if shown == "PENDING" else f"{shown}{fix}")
    if name in _RUNNING:
        return Status(state="running", reason=shown)
    if name == "COMPLETED":
        return Status(state="succeeded", exit_code=0)
    return Status(state="stopped" if name == "CANCELLED" else "failed", exit_code=exit_code or 1, reason=shown)


def _worst(tasks: Sequence[Status], job: Job) -> Status:
    """One status for the tasks of an array: running while one runs, then the first that did not succeed."""
    if not tasks:
        return Status(state="lost", reason="Slurm shows no such job")
    for state in ("running", "pending", "failed", "stopped"):
        for task in tasks:
            if task.state == state:
                stopped = state == "failed" and (job.folder / STOPPED).exists()
                return Status(state="stopped", exit_code=task.exit_code, reason=task.reason) if stopped else task
    return tasks[0]


def _run(command: Sequence[str], job: Job) -> str:
    """A command of Slurm; ValueError for what the spec can mend, TargetError where Slurm can't be asked."""
    if shutil.which(command[0]) is None:
        raise TargetError(
            f"{command[0]} is not on this machine: submit from a login node of the cluster, or look at the script with "
            "--dry-run"
        )
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise TargetError(f"Slurm is down: {command[0]} had no answer in {_TIMEOUT_S} s. {_DOWN}") from None
    if done.returncode == 0:
        return done.stdout
    said = " ".join(done.stderr.split())
    if re.search(
        r"[Uu]nable to contact slurm controller|Connection refused|configuration (source|file)|auth.*munge", said
    ):
        raise TargetError(f"Slurm is down: {said}. {_DOWN}")
    if re.search(r"Socket timed out|Zero Bytes|Connection timed out", said):
        raise TargetError(f"Slurm does not answer: {said}. Try again")
    if "partition" in said:
        known = subprocess.run(["sinfo", "--noheader", "--format=%R"], capture_output=True, text=True, check=False)
        partitions = ", ".join(sorted(set(known.stdout.split()))) or "none"
        raise ValueError(f"slurm.partition={job.spec.slurm.partition!r}: {said}; this cluster has {partitions}")
    if command[0] == "sbatch":
        raise ValueError(f"sbatch refuses the job: {said}. See resources.*, time_limit_s and slurm.*, and `sinfo -Nel`")
    raise ValueError(f"{command[0]}: {said}")


def script(job: Job) -> str:
    """The whole script, which `sbatch` needs nothing beside: directives, values, and slurm_job.sh as it is."""
    spec = job.spec
    resources = spec.resources
    inside, step_options = container(job)
    values: dict[str, str | int | list[str]] = {
        "job": job.id,
        "folder": str(job.folder),
        "python": interpreter(spec),
        "command": words(spec),
        "retries": spec.retries,
        "unfinished": UNFINISHED,
        "no_package": NO_PACKAGE,
        "inside": inside,
        "step_options": step_options,
        "num_nodes": resources.nodes + resources.decode_nodes,
        "decode_nodes": resources.decode_nodes,
        "cpus": resources.cpus,
        "decode_cpus": resources.decode_cpus,
        "sizes": _sizes(resources.cpus, resources.gpus, resources.memory_gb),
        "decode_sizes": _sizes(resources.decode_cpus, 0, resources.decode_memory_gb),
        "symmetric": int(spec.slurm.symmetric),
        "start_timeout_s": spec.slurm.start_timeout_s,
    }
    body = (importlib.resources.files("medim_ray.submit") / "slurm_job.sh").read_text(encoding="utf-8")
    lines = [_assignment(name, value) for name, value in values.items()]
    return "\n".join(["#!/bin/bash", *directives(job), *lines, *environment(job), body])


def directives(job: Job) -> list[str]:
    """The #SBATCH lines; a second kind of node is a second component of a heterogeneous job."""
    spec, slurm, resources = job.spec, job.spec.slurm, job.spec.resources
    for path in (job.folder, working_dir(job)):
        if re.search(r"[\s%\"'\\]", str(path)):
            raise ValueError(
                f"{str(path)!r}: sbatch reads white space, %, \\ and quotes in its own way: give a storage.root and an "
                "environment.working_dir without them"
            )
    names = [*_PASSED_ON, *(name for name, ref in spec.environment.secrets.items() if ref == "env")]
    lines = [
        f"--job-name={job.id}",
        f"--chdir={working_dir(job)}",
        f"--output={job.folder}/{LOG}" + ("-%a" if slurm.array else ""),
        "--open-mode=append",
        f"--export={','.join(names)}",  # names only: values never stand in a file
        f"--time={_clock(spec.time_limit_s)}",
        f"--signal=B:USR1@{slurm.signal_s}",
        "--requeue",
        *([f"--array={slurm.array}"] if slurm.array else []),
        *slurm.options,
    ]
    shared = {"partition": slurm.partition, "account": slurm.account, "qos": slurm.qos}
    common = [f"--{key}={value}" for key, value in shared.items() if value]
    lines += [*common, *_nodes(resources.nodes, resources.cpus, resources.memory_gb)]
    lines += [f"--gpus-per-node={resources.gpus}"] if resources.gpus else []
    lines += [f"--constraint={slurm.constraint}"] if slurm.constraint else []
    lines += ["--exclusive"] if slurm.exclusive else []
    text = [f"#SBATCH {line}" for line in lines]
    if resources.decode_nodes:
        more = [*common, *_nodes(resources.decode_nodes, resources.decode_cpus, resources.decode_memory_gb)]
        text += ["#SBATCH hetjob", *(f"#SBATCH {line}" for line in more)]
    return text


def container(job: Job) -> tuple[list[str], list[str]]:
    """What stands before a program inside a step, and the options that put a step itself into a container."""
    spec = job.spec
    image, root = spec.environment.image, spec.storage.root
    mounts = list(dict.fromkeys([*([] if "://" in root else [root]), str(working_dir(job)), "/tmp"]))
    if spec.slurm.container == "apptainer":
        binds = [f"--bind={mount}" for mount in mounts]
        return ["apptainer", "exec", *(["--nv"] if spec.resources.gpus else []), *binds, image], []
    if spec.slurm.container == "pyxis":
        pairs = ",".join(f"{mount}:{mount}" for mount in mounts)
        return ["env"], [f"--container-image={image}", f"--container-mounts={pairs}"]
    return ["env"], []


def _assignment(name: str, value: str | int | list[str]) -> str:
    """`name=value` in shell; a list is an array."""
    return f"{name}=({shlex.join(value)})" if isinstance(value, list) else f"{name}={shlex.quote(str(value))}"


def _nodes(num: int, cpus: int, memory_gb: float) -> list[str]:
    return [f"--nodes={num}", "--ntasks-per-node=1", f"--cpus-per-task={cpus}", f"--mem={round(memory_gb * 1024)}M"]


def _sizes(cpus: int, gpus: int, memory_gb: float) -> list[str]:
    """Options of `ray start`: what the job has, not what the machine has."""
    store = int(memory_gb * 2**30 * _OBJECT_STORE_RATIO)
    return [f"--num-cpus={cpus}", f"--num-gpus={gpus}", f"--object-store-memory={store}"]


def _clock(seconds: int) -> str:
    """D-HH:MM:SS."""
    minutes, s = divmod(seconds, 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    return f"{days}-{h:02}:{m:02}:{s:02}"
