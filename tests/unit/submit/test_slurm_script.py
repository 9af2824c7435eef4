"""The sbatch script's directives, and what becomes of Slurm's own words for the state of a job."""

from __future__ import annotations

from pathlib import Path

import pytest

from medim_ray.cli import main
from medim_ray.submit.base import Job, Record
from medim_ray.submit.slurm import SlurmTarget, _clock, _status_of, _worst, directives, script
from medim_ray.submit.spec import load_spec

JOBS = Path(__file__).parents[3] / "jobs"


def job(*overrides: str, file: str = "pretrain-medim-small") -> Job:
    return Job(spec=load_spec(JOBS / f"{file}.yaml", ["target=slurm", *overrides]))


def test_resources_are_mapped_and_secrets_named_only() -> None:
    lines = directives(job("slurm.partition=gpu", "slurm.array=0-3", "environment.secrets={KEY: env, FILE: file:/k}"))
    for line in ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=3", "--mem=4096M", "--partition=gpu"):
        assert f"#SBATCH {line}" in lines
    assert "#SBATCH --export=PATH,HOME,USER,LANG,KEY" in lines, "nothing else of our environment is handed over"
    assert "#SBATCH --signal=B:USR1@120" in lines and "#SBATCH --requeue" in lines
    assert any(line.endswith("/log-%a") for line in lines), "a log a task"
    text = script(job("environment.secrets={FILE: 'file:/k'}"))
    assert 'FILE="$(cat /k)"' in text and "--num-cpus=3 --num-gpus=0" in text


def test_tasks_of_an_array_are_told_apart_where_they_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    word = r"seed=\${oc.decode:\${oc.env:SLURM_ARRAY_TASK_ID}}"
    assert f"`- {word}`" in (JOBS.parent / "cluster/README.md").read_text()
    monkeypatch.chdir(JOBS.parent)
    file = tmp_path / "array.yaml"
    file.write_text(f"inherits: {JOBS}/pretrain-medim-small.yaml\nargs:\n  - {word}\n")
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    assert main(["submit", str(file), "target=slurm", "slurm.array=0-3", "--dry-run"]) == 0
    sent = word.replace("\\", "")
    assert f"'{sent}')" in capsys.readouterr().out
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert main(["config", "--config", "configs/debug/medim-vit_tiny-2w-z1.yaml", sent]) == 0
    assert "\nseed: 3\n" in "\n" + capsys.readouterr().out


@pytest.mark.parametrize("override", ["storage.root=/a b", "storage.root=/a/%j", "environment.working_dir=/it's"])
def test_paths_that_sbatch_would_read_in_its_own_way_are_refused(override: str) -> None:
    with pytest.raises(ValueError, match="sbatch reads white space"):
        directives(job(override))


def test_nodes_of_another_kind_are_a_second_component() -> None:
    lines = directives(job(file="pretrain-rad_dino-large"))
    at = lines.index("#SBATCH hetjob")
    assert "#SBATCH --gpus-per-node=8" in lines[:at] and "#SBATCH --nodes=8" in lines[:at]
    assert "#SBATCH --nodes=4" in lines[at:] and not any("gpus" in line for line in lines[at:])
    text = script(job(file="pretrain-rad_dino-large"))
    assert "num_nodes=12" in text and "decode_nodes=4" in text


@pytest.mark.parametrize(
    ("container", "expected"),
    [
        ("none", "inside=(env)"),
        ("apptainer", "inside=(apptainer exec --bind=/shared --bind="),
        ("pyxis", "step_options=(--container-image=m.sif --container-mounts=/shared:/shared,"),
    ],
)
def test_containers(container: str, expected: str) -> None:
    text = script(job(f"slurm.container={container}", "environment.image=m.sif", "storage.root=/shared"))
    assert expected in text


@pytest.mark.parametrize(("seconds", "clock"), [(59, "0-00:00:59"), (3_600, "0-01:00:00"), (90_061, "1-01:01:01")])
def test_time_limits(seconds: int, clock: str) -> None:
    assert _clock(seconds) == clock


@pytest.mark.parametrize(
    ("line", "state", "code"),
    [
        ("JobId=3 JobState=PENDING Reason=Resources ExitCode=0:0", "pending", None),
        ("JobId=3 JobState=COMPLETING Reason=None ExitCode=0:0", "running", None),
        ("JobId=3 JobState=COMPLETED Reason=None ExitCode=0:0", "succeeded", 0),
        ("JobId=3 JobState=FAILED Reason=NonZeroExitCode ExitCode=78:0", "failed", 78),
        ("JobId=3 JobState=NODE_FAIL Reason=None ExitCode=0:9", "failed", 137),
        ("JobId=3 JobState=TIMEOUT Reason=TimeLimit ExitCode=0:0", "failed", 1),
        ("JobId=3 JobState=CANCELLED Reason=None ExitCode=0:15", "stopped", 143),
    ],
)
def test_states_and_exit_codes(line: str, state: str, code: int | None) -> None:
    status = _status_of(line)
    assert (status.state, status.exit_code) == (state, code)


def test_an_array_is_as_good_as_its_worst_task() -> None:
    done, failed = (
        _status_of(f"JobState={name} ExitCode={code}") for name, code in (("COMPLETED", "0:0"), ("FAILED", "3:0"))
    )
    running = _status_of("JobState=RUNNING ExitCode=0:0")
    assert _worst([done, running, failed], job()) is running
    assert _worst([done, failed], job()) is failed and _worst([done, done], job()) is done
    assert _worst([], job()).state == "lost"


@pytest.mark.parametrize(("state", "asked"), [("PENDING", ["7"]), ("RUNNING", ["--batch --signal=TERM 7", "7"])])
def test_only_a_job_that_runs_is_asked_before_it_is_cancelled(
    state: str, asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The real one tries for more than a minute to signal a job that has not begun (seen on two nodes); this one
    # notes what it was told.
    (tmp_path / "state").write_text(f"JobState={state} Reason=None ExitCode=0:0")
    for name, lines in {
        "scontrol": f"cat {tmp_path}/state",
        "scancel": f'echo "$*" >>{tmp_path}/asked; echo JobState=CANCELLED >{tmp_path}/state',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{lines}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    held = job(f"storage.root={tmp_path}")
    held.folder.mkdir(parents=True)
    record = Record(name="x", hash="x", target="slurm", attempt=0, handle="7", submitted_at=0.0, spec={})
    SlurmTarget().stop(record, held)
    assert (tmp_path / "asked").read_text().splitlines() == asked
