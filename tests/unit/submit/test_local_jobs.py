"""Jobs on this machine with real processes: exit codes, attaching, two submits at once, stop, retries, time limit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from medim_ray.cli import main
from medim_ray.submit import state
from medim_ray.submit.base import UNFINISHED
from medim_ray.submit.entry import run

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDIM_RAY_JOBS", str(tmp_path / "jobs.json"))
    monkeypatch.chdir(tmp_path)


def spec(tmp_path: Path, command: list[str], name: str = "quick") -> str:
    file = tmp_path / f"{name}.yaml"
    file.write_text(json.dumps({"name": name, "command": command, "storage": {"root": str(tmp_path / "storage")}}))
    return str(file)


def tagging(tmp_path: Path) -> list[str]:
    """A command that takes a second."""
    (tmp_path / "reports.csv").write_text("uid,findings,impression\n1,Small left pleural effusion.,None\n")
    return ["tag", str(tmp_path / "reports.csv"), "--out", str(tmp_path / "tags.csv")]


def test_exit_code_log_and_attaching(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = spec(tmp_path, tagging(tmp_path))
    assert main(["submit", good]) == 0
    said = capsys.readouterr()
    assert "1 reports" in said.out and "quick: succeeded, exit code 0" in said.err
    assert main(["submit", good]) == 0
    said = capsys.readouterr()
    assert "already submitted" in said.err and "1 reports" in said.out
    assert len(list((tmp_path / "storage/jobs").iterdir())) == 1
    assert main(["jobs", "resubmit", "quick"]) == 0
    assert len(list((tmp_path / "storage/jobs").iterdir())) == 2
    bad = spec(tmp_path, ["shards", "verify", str(tmp_path / "none")], "bad")
    assert main(["submit", bad]) == 1
    assert main(["jobs", "status", "bad"]) == 1 and main(["jobs", "logs", "bad", "--follow"]) == 1
    capsys.readouterr()
    assert main(["jobs", "list"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert "bad" in listed[0] and "failed" in listed[0] and "succeeded" in listed[1]


def test_a_free_name_takes_another_spec_and_an_unknown_name_lists_the_known(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["submit", spec(tmp_path, tagging(tmp_path))]) == 0
    assert main(["submit", spec(tmp_path, tagging(tmp_path)), "retries=1"]) == 0
    assert main(["jobs", "status", "quik"]) == 2
    assert "no job named 'quik' was submitted from here; known: quick" in capsys.readouterr().err


def test_two_submits_at_once_are_one_job(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "medim_ray.cli", "submit", spec(tmp_path, tagging(tmp_path))]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sorted("already submitted" in err for _, err in said) == [False, True]
    assert len(list((tmp_path / "storage/jobs").iterdir())) == 1


def test_a_job_that_goes_on_is_not_doubled_under_another_spec_and_can_be_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = spec(tmp_path, ["tag", str(tmp_path / "pipe"), "--out", str(tmp_path / "tags.csv")])
    os.mkfifo(tmp_path / "pipe")  # it reads what never comes
    assert main(["submit", long, "--detach"]) == 0
    assert main(["submit", long, "retries=1"]) == 2
    assert "a job named 'quick' is running on local with other retries" in capsys.readouterr().err
    assert main(["jobs", "resubmit", "quick"]) == 2
    assert "stop it first" in capsys.readouterr().err
    time.sleep(2)
    assert main(["jobs", "stop", "quick"]) == 0
    assert main(["jobs", "status", "quick"]) == 0
    assert "quick: stopped" in capsys.readouterr().out


def test_a_job_without_process_and_exit_code_is_lost_and_sent_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = spec(tmp_path, tagging(tmp_path))
    assert main(["submit", file]) == 0
    (folder,) = (tmp_path / "storage/jobs").iterdir()
    (folder / "exit_code").unlink()
    assert main(["jobs", "status", "quick"]) == 1
    assert "lost" in capsys.readouterr().out
    assert main(["submit", file]) == 0
    assert "it is sent again" in capsys.readouterr().err and state.read()["quick"].attempt == 1


@pytest.mark.parametrize("delay_s", [0.0, 0.3])
def test_a_job_that_is_stopped_before_it_began_is_stopped_and_begins_anew_without_that_mark(
    delay_s: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / "pipe")
    long = spec(tmp_path, ["tag", str(tmp_path / "pipe"), "--out", str(tmp_path / "tags.csv")])
    assert main(["submit", long, "--detach"]) == 0
    time.sleep(delay_s)
    assert main(["jobs", "stop", "quick"]) == 0 and main(["jobs", "status", "quick"]) == 0
    assert capsys.readouterr().out.count("quick: stopped") == 2
    (folder,) = (tmp_path / "storage/jobs").iterdir()
    state.state_file().unlink()  # as another spec of this name would: the next one is attempt 0 again
    assert main(["submit", long, "--detach"]) == 0
    assert not (folder / "stopped").exists() and not (folder / "exit_code").exists()
    assert main(["jobs", "stop", "quick"]) == 0


def test_a_job_whose_record_is_lost_while_it_runs_is_found_not_doubled(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    long = spec(tmp_path, ["tag", str(tmp_path / "pipe"), "--out", str(tmp_path / "tags.csv")])
    assert main(["submit", long, "--detach"]) == 0
    handle = state.read()["quick"].handle
    state.state_file().unlink()
    assert main(["submit", long, "--detach"]) == 0
    assert state.read()["quick"].handle == handle
    assert main(["jobs", "stop", "quick"]) == 0


@pytest.mark.parametrize("key", ["working_dir", "wheel"])
def test_what_the_job_needs_and_is_not_here_is_told_before_it_is_sent(
    key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["submit", spec(tmp_path, ["doctor"]), f"environment.{key}=/none"]) == 2
    assert f"environment.{key}=/none: no such f" in capsys.readouterr().err
    assert state.read() == {} and not (tmp_path / "storage").exists()


def test_an_interpreter_without_the_package_is_told_as_such(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", spec(tmp_path, ["doctor"]), "environment.python=/usr/bin/python3"]) == 78
    assert "/usr/bin/python3 has no medim_ray" in capsys.readouterr().out


def test_secrets_come_from_files_and_the_environment_and_stay_out_of_all_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "key").write_text("planted-file\n")
    monkeypatch.setenv("OURS", "planted-variable")
    overrides = ["environment.secrets={OURS: env, THEIRS: 'file:" + str(tmp_path / "key") + "'}"]
    command = ["config", "run.dir=${storage.root}-\\${oc.env:OURS}-\\${oc.env:THEIRS}"]
    assert main(["submit", spec(tmp_path, command), *overrides]) == 0
    out = capsys.readouterr().out
    assert "planted-variable-planted-file" in out, "the command has both"
    (folder,) = (tmp_path / "storage/jobs").iterdir()
    for file in (folder / "job.sh", tmp_path / "jobs.json"):
        assert "planted" not in file.read_text()
    assert main(["submit", spec(tmp_path, ["doctor"], "none"), "environment.secrets={NOWHERE: env}"]) != 0
    assert "NOWHERE: is not set where the job runs" in capsys.readouterr().out


def test_a_state_file_of_another_kind_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    state.state_file().write_text("[1, 2]")
    assert main(["jobs", "list"]) == 2
    assert "is no file of jobs" in capsys.readouterr().err


def test_damaged_records_and_places_that_hold_no_file_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = spec(tmp_path, tagging(tmp_path))
    assert main(["submit", file]) == 0
    whole = json.loads(state.state_file().read_text())

    def said(**changed: object) -> str:
        state.state_file().write_text(json.dumps({"quick": {**whole["quick"], **changed}}))
        capsys.readouterr()
        main(["jobs", "list"])
        main(["submit", file, "retries=1", "--dry-run"])  # needs no record
        return "".join(capsys.readouterr())

    assert "is no file of jobs" in said(submitted_at=None) and "is no file of jobs" in said(handle=3)
    assert "succeeded" in said(handle="damaged")
    assert "unknown: quick: unknown key 'gone'" in said(spec={**whole["quick"]["spec"], "gone": 1})
    assert main(["submit", file]) == 2
    assert "submitted by another version of medim-ray" in capsys.readouterr().err
    monkeypatch.setenv("MEDIM_RAY_JOBS", str(tmp_path))
    assert main(["jobs", "list"]) == 2
    monkeypatch.setenv("MEDIM_RAY_JOBS", f"{file}/jobs.json")
    assert main(["submit", file]) == 2
    err = capsys.readouterr().err
    assert "is no file of jobs" in err and "can't be written (File exists): set MEDIM_RAY_JOBS" in err


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_unfinished_work_is_begun_again_as_often_as_allowed(tmp_path: Path) -> None:
    count = (
        f"import pathlib, sys; p = pathlib.Path({str(tmp_path / 'n')!r}); n = len(p.read_text()) if p.exists() else 0; "
    )
    count += "p.write_text('x' * (n + 1)); "
    again = python(count + f"sys.exit({UNFINISHED} if n < 2 else 0)")
    assert run(again, retries=1, time_limit_s=30) == UNFINISHED
    (tmp_path / "n").unlink()
    assert run(again, retries=5, time_limit_s=30, folder=tmp_path) == 0
    assert (tmp_path / "n").read_text() == "xxx" and (tmp_path / "exit_code").read_text() == "0\n"
    (tmp_path / "n").unlink()
    assert run(python(count + "sys.exit(3)"), retries=5, time_limit_s=30) == 3, "a failure is no reason to go on"
    assert (tmp_path / "n").read_text() == "x"


def test_the_time_limit_asks_first_and_what_commits_in_time_is_begun_again(tmp_path: Path) -> None:
    polite = "import signal, sys, time; signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75)); time.sleep(30)"
    started = time.monotonic()
    assert run(python(polite), retries=1, time_limit_s=1.0) == UNFINISHED
    assert time.monotonic() - started < 10
    deaf = "import time; time.sleep(30)"  # the default action of the signal ends it
    assert run(python(deaf), retries=0, time_limit_s=0.5) == UNFINISHED


@pytest.mark.parametrize("target", ["local", "ray"])
def test_what_a_target_does_not_heed_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str], target: str) -> None:
    words = ["submit", spec(tmp_path, tagging(tmp_path)), f"target={target}", "--dry-run"]
    for more, says in (([], False), (["resources.memory_gb=8"], True)):
        assert main([*words, *more]) == 0
        assert ("resources.*:" in capsys.readouterr().out) is says
