"""Target `local`: a process of its own session on this machine, which outlives the terminal. Also the log and exit-code
files that every target with a shared filesystem uses.
"""

from __future__ import annotations

import contextlib
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from medim_ray.submit.base import (
    EXIT_CODE,
    GRACE_S,
    STOPPED,
    TARGETS,
    Job,
    Plan,
    Record,
    Status,
    entry,
    exports,
    interpreter,
    notes_outside_kubernetes,
    package_check,
)
from medim_ray.submit.spec import Resources

LOG = "log"
_HANDLE = "process"
_BY_US = "stopped by `medim-ray jobs stop`"


@TARGETS.register("local")
class LocalTarget:
    """Jobs on this machine; the handle is PID@START_TIME."""

    def plan(self, job: Job) -> Plan:
        notes = notes_outside_kubernetes(job.spec)
        if job.spec.resources != Resources():
            notes.append(
                "resources.*: this machine takes the place of all nodes, and is neither asked nor bound; as many "
                "workers as train.num_workers says"
            )
        lines = [
            "#!/bin/bash",
            f"trap 'echo $? >{shlex.quote(str(job.folder / EXIT_CODE))}' EXIT",
            "trap 'exit 143' TERM INT HUP # else the code would be that of the last line that ended, 0",
            f"cd {shlex.quote(str(working_dir(job)))} || exit 1",
            "unset RAY_ADDRESS # a Ray of its own",
            *environment(job),
            package_check(job.spec),
            f"exec {shlex.join(entry(job.spec, job.folder))}",
        ]
        return Plan(
            text="\n".join(lines) + "\n", how=f"bash {job.folder}/job.sh, in a session of its own", notes=tuple(notes)
        )

    def submit(self, job: Job, plan: Plan) -> str:
        handle = job.folder / _HANDLE
        if handle.is_file() and _process(handle.read_text()) is not None:
            return handle.read_text()  # our record of it is gone, it is not
        folder = new_folder(job)
        (folder / "job.sh").write_text(plan.text)
        with (folder / LOG).open("wb") as log:
            process = subprocess.Popen(
                ["bash", str(folder / "job.sh")],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        handle.write_text(f"{process.pid}@{psutil.Process(process.pid).create_time():.2f}")
        return handle.read_text()

    def status(self, record: Record, job: Job) -> Status:
        if _process(record.handle) is not None:
            return Status(state="running")
        return file_status(job.folder) or Status(
            state="lost", reason="its process is gone without an exit code: killed, or a restart"
        )

    def logs(self, record: Record, job: Job, follow: bool) -> Iterator[str]:
        return tail(job.folder / LOG, lambda: follow and self.status(record, job).state == "running")

    def stop(self, record: Record, job: Job) -> None:
        process = _process(record.handle)
        if process is None:
            return
        (job.folder / STOPPED).touch()
        children = process.children(recursive=True)
        process.send_signal(signal.SIGTERM)
        _, alive = psutil.wait_procs([process], timeout=GRACE_S)
        for left in [*alive, *children]:
            with contextlib.suppress(psutil.NoSuchProcess):
                left.kill()


def _process(handle: str) -> psutil.Process | None:
    """The job's process; None where it ended, or where its number now belongs to another."""
    pid, _, started = handle.partition("@")
    try:
        process = psutil.Process(int(pid))
        same = abs(process.create_time() - float(started)) < 0.5
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except (psutil.NoSuchProcess, ValueError):
        return None


def working_dir(job: Job) -> Path:
    """The folder that the command runs in."""
    return Path(job.spec.environment.working_dir or ".").absolute()


def environment(job: Job) -> list[str]:
    """Shell lines that set variables and secrets, and put `environment.wheel` before what the interpreter has."""
    lines = exports(job.spec)
    if job.spec.environment.wheel:
        site = shlex.quote(str(job.folder / "site"))
        wheel = shlex.quote(job.spec.environment.wheel)
        python = shlex.quote(interpreter(job.spec))
        lines.append(f"{python} -m pip install --quiet --no-deps --upgrade --target {site} {wheel} || exit 1")
        lines.append(f"export PYTHONPATH={site}")
    return lines


def new_folder(job: Job) -> Path:
    """The job's folder, for us alone to read, without what an earlier job of this id said of its end.

    ValueError where it can't be written, or what the job needs is gone.
    """
    wheel = job.spec.environment.wheel
    if not working_dir(job).is_dir():
        raise ValueError(f"environment.working_dir={working_dir(job)}: no such folder")
    if wheel and "://" not in wheel and not Path(wheel).is_file():
        raise ValueError(f"environment.wheel={wheel}: no such file; `pip wheel --no-deps .` makes one")
    try:
        job.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise ValueError(
            f"storage.root={job.spec.storage.root}: {error.strerror}: give a folder that you can write"
        ) from None
    for said in (*job.folder.glob(f"{EXIT_CODE}*"), job.folder / STOPPED):
        said.unlink(missing_ok=True)  # it was stopped, the name was used for another spec, and it is sent again
    return job.folder


def file_status(folder: Path) -> Status | None:
    """What the files of a job's folder say; None while no exit code is there. Of an array's tasks, the worst."""
    codes = []
    for path in folder.glob(f"{EXIT_CODE}*"):
        with contextlib.suppress(FileNotFoundError, ValueError):
            codes.append(int(path.read_text()))
    if not codes:  # it may have been stopped before it could write one
        return Status(state="stopped", exit_code=143, reason=_BY_US) if (folder / STOPPED).exists() else None
    code = max(codes)
    if (folder / STOPPED).exists() and code != 0:
        return Status(state="stopped", exit_code=code, reason=_BY_US)
    return Status(state="succeeded" if code == 0 else "failed", exit_code=code)


def tail(path: Path, is_running: Callable[[], bool], poll_s: float = 0.5) -> Iterator[str]:
    """Pieces of a file from its beginning, as long as `is_running`, then what is left of it."""
    while not path.exists():
        if not is_running():
            return
        time.sleep(poll_s)
    with path.open(encoding="utf-8", errors="replace") as file:
        while True:
            more = is_running()
            piece = file.read()
            if piece:
                yield piece
            elif not more:
                return
            else:
                time.sleep(poll_s)
