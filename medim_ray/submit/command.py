"""`medim-ray submit` and `medim-ray jobs`: the same words for every target. What the targets do is in their modules."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from medim_ray.config.loader import from_tree, to_tree
from medim_ray.submit import state
from medim_ray.submit.base import ENDED, TARGETS, Job, Record, Status, Target, TargetError
from medim_ray.submit.spec import JobSpec, changed, load_spec

CommandCheck = Callable[[Sequence[str]], None]
DETACHED = 130
_RETRY_S = (1, 2, 4, 8, 16, 32)
_PENDING_POLL_S = 1.0
_STOP_S = 120.0


def submit(file: str, overrides: Sequence[str], check: CommandCheck, *, dry_run: bool, follow: bool) -> int:
    """Sends a job, or attaches to the one with the same name and hash; the job's exit code, 0 without `follow`.

    check: raises ValueError where the words after `medim-ray` are no command of it.
    """
    spec = load_spec(file, overrides)
    check(spec.arguments)
    target = _target(spec.target)
    if dry_run:
        print(_shown(Job(spec=spec), target), end="")
        return 0
    with state.locked() as records:
        old = records.get(spec.name)
        record = _attach(old, spec) if old is not None else None
        if record is None:
            attempt = old.attempt + 1 if old is not None and old.hash == spec.hash else 0
            record = records[spec.name] = _send(Job(spec=spec, attempt=attempt), target)
    return _follow(record) if follow else 0


def _attach(record: Record, spec: JobSpec) -> Record | None:
    """The job of this name if it is the same one; None where its name is free again.

    ValueError: a job of this name is under way with another spec.
    """
    job = _job(record)
    status = _target(record.target).status(record, job)
    if record.hash == spec.hash:
        if status.state == "lost":
            print(f"{record.name}: lost ({status.reason}); it is sent again", file=sys.stderr)
            return None
        advice = f"; `medim-ray jobs resubmit {record.name}` begins anew" if status.state in ENDED else ""
        print(f"{record.name}: already submitted as {record.handle}, {status.state}{advice}", file=sys.stderr)
        return record
    if status.state not in ENDED:
        keys = ", ".join(changed(job.spec, spec))
        raise ValueError(
            f"a job named {spec.name!r} is {status.state} on {record.target} with other {keys}: choose another "
            f"name=…, or stop it with `medim-ray jobs stop {spec.name}`"
        )
    return None


def _send(job: Job, target: Target) -> Record:
    plan = target.plan(job)
    for note in plan.notes:
        print(f"note: {note}", file=sys.stderr)
    handle = target.submit(job, plan)
    print(f"{job.spec.name}: submitted to {job.spec.target} as {handle}", file=sys.stderr)
    return Record(
        name=job.spec.name,
        hash=job.spec.hash,
        target=job.spec.target,
        attempt=job.attempt,
        handle=handle,
        submitted_at=time.time(),
        spec=_escaped(to_tree(job.spec)),
    )


def _escaped(value: Any) -> Any:
    """A plain tree whose `${…}` mean themselves when it is loaded again: they are for the command to resolve."""
    if isinstance(value, dict):
        return {key: _escaped(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_escaped(entry) for entry in value]
    return value.replace("${", "\\${") if isinstance(value, str) else value


def _shown(job: Job, target: Target) -> str:
    """The plan as it would be sent. Comments come after a script's first line, which must stay the first."""
    plan = target.plan(job)
    comments = [f"job {job.id}, target {job.spec.target}", f"sent by: {plan.how}", *plan.notes]
    header = "".join(f"# {line}\n" for line in comments)
    if plan.text.startswith("#!"):
        first, _, rest = plan.text.partition("\n")
        return f"{first}\n{header}{rest}"
    return header + plan.text


def _follow(record: Record) -> int:
    """Prints the log until the job ends; its exit code. Ctrl-C leaves the job alone."""
    target, job = _target(record.target), _job(record)
    printed, failures, reason = 0, 0, ""
    try:
        while True:
            try:
                status = target.status(record, job)
                if status.state == "pending":
                    if status.reason not in ("", reason):
                        print(f"{record.name}: pending, {status.reason}", file=sys.stderr)
                    reason, failures = status.reason, 0
                    time.sleep(_PENDING_POLL_S)
                    continue
                position = 0
                for piece in target.logs(record, job, follow=True):
                    fresh = piece[max(0, printed - position) :]
                    position += len(piece)
                    printed, failures = max(printed, position), 0
                    print(fresh, end="", flush=True)
                status = target.status(record, job)
                if status.state in ENDED:
                    return _ended(record, status)
                time.sleep(1)
            except (TargetError, ConnectionError) as error:
                if failures == len(_RETRY_S):
                    raise
                print(f"{record.name}: {error}; the job goes on, trying again", file=sys.stderr)
                time.sleep(_RETRY_S[failures])
                failures += 1
    except KeyboardInterrupt:
        print(
            f"\n{record.name} goes on; `medim-ray jobs logs {record.name} --follow` attaches, "
            f"`medim-ray jobs stop {record.name}` ends it",
            file=sys.stderr,
        )
        return DETACHED


def _ended(record: Record, status: Status) -> int:
    code = status.exit_code if status.exit_code is not None else (0 if status.state == "succeeded" else 1)
    reason = f" ({status.reason})" if status.reason else ""
    print(f"{record.name}: {status.state}, exit code {code}{reason}", file=sys.stderr)
    return code


def list_jobs() -> int:
    """One line a job, newest first; a target that can't be asked is told as such."""
    rows = sorted(state.read().values(), key=lambda r: -r.submitted_at)
    for record in rows:
        try:
            said: str = _target(record.target).status(record, _job(record)).state
        except (TargetError, OSError, ValueError) as error:
            said = f"unknown: {error}"
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(record.submitted_at))
        print(f"{record.name:{_WIDTH}} {record.target:8} {when}  {record.handle}  {said}")
    if not rows:
        print("no jobs; `medim-ray submit JOB.yaml` makes one")
    return 0


_WIDTH = 28


def show_status(name: str) -> int:
    """State, reason and exit code of a job; 0 unless it failed."""
    record = _record(name)
    status = _target(record.target).status(record, _job(record))
    code = "" if status.exit_code is None else f", exit code {status.exit_code}"
    reason = f" ({status.reason})" if status.reason else ""
    print(f"{name}: {status.state}{code}{reason}, {record.target} {record.handle}, hash {record.hash}")
    return 1 if status.state in ("failed", "lost") else 0


def show_logs(name: str, follow: bool) -> int:
    """The log; with `follow` until the end, and the job's exit code."""
    record = _record(name)
    if follow:
        return _follow(record)
    for piece in _target(record.target).logs(record, _job(record), follow=False):
        print(piece, end="")
    return 0


def stop(name: str) -> int:
    """Asks the target to end a job, and waits for its end, which may take until a checkpoint is committed."""
    record = _record(name)
    target, job = _target(record.target), _job(record)
    status = target.status(record, job)
    if status.state in ENDED:
        print(f"{name}: {status.state} already")
        return 0
    target.stop(record, job)
    until = time.monotonic() + _STOP_S
    while status.state not in ENDED and time.monotonic() < until:
        time.sleep(1)
        status = target.status(record, job)
    if status.state not in ENDED:
        print(f"{name}: asked to stop, and still {status.state}; see `medim-ray jobs status {name}`")
        return 1
    print(f"{name}: {status.state}; `medim-ray jobs resubmit {name}` goes on from its last checkpoint")
    return 0


def resubmit(name: str, follow: bool) -> int:
    """A new attempt at the same spec, which goes on from what the last one committed."""
    with state.locked() as records:
        record = _record(name)
        job, target = _job(record), _target(record.target)
        status = target.status(record, job)
        if status.state not in ENDED:
            raise ValueError(f"{name} is {status.state}: stop it first, `medim-ray jobs stop {name}`")
        record = records[name] = _send(replace(job, attempt=job.attempt + 1), target)
    return _follow(record) if follow else 0


def _record(name: str) -> Record:
    records = state.read()
    if name not in records:
        known = ", ".join(sorted(records)) or "none"
        raise ValueError(f"no job named {name!r} was submitted from here; known: {known} ({state.state_file()})")
    return records[name]


def _job(record: Record) -> Job:
    try:
        spec = from_tree(JobSpec, record.spec, where=record.name)
    except ValueError as error:
        raise ValueError(
            f"{error} ({record.target} {record.handle} was submitted by another version of medim-ray: use that one, or "
            f"take its record out of {state.state_file()})"
        ) from None
    return Job(spec=spec, attempt=record.attempt)


def _target(name: str) -> Any:
    return TARGETS[name]()
