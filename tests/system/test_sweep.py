"""Sweeps and studies with real Ray Tune, Ray Train and DeepSpeed: what fails, what is repeated, what a kill costs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from medim_ray.studies.ablate import StudyConfig, check_study
from medim_ray.studies.execute import execute
from medim_ray.studies.outcome import Number
from medim_ray.studies.page import read_study
from medim_ray.studies.pbt import LINEAGES, POINTER
from medim_ray.studies.results import Table
from medim_ray.studies.sweep import check_sweep, load_sweep
from medim_ray.studies.trials import Record, Report, read_records, write_record
from medim_ray.train.runs import write_config
from medim_ray.train.store import SCHEMA_VERSION, CheckpointStore, checkpoint_name
from tests.system.runs import MAE, SMALL, assert_same_weights

pytestmark = pytest.mark.system
OVERRIDES = [*SMALL, "train.num_workers=1", "train.zero=0", "train.steps=4", "train.max_errors=1"]


def _file(folder: Path, shards: str, **more: Any) -> Path:
    """A sweep of the smallest MAE, by its loss: no probe."""
    tree = {"recipe": str(MAE), "shards": shards, "out": str(folder / "out"), "overrides": OVERRIDES, "metric": "loss"}
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump({**tree, **more}, sort_keys=False))
    return path


def _run(file: Path) -> Table:
    table, signal_number = execute(check_sweep(load_sweep(str(file), [])), Console(file=sys.stderr))
    assert not signal_number
    return table


def _record(run: str) -> Record:
    """That of the one probe, or of none, that these sweeps ask for."""
    records = read_records(run)
    assert len(records) < 2
    return records[0] if records else Record()


def _attempts(table: Table, folder: Path) -> dict[str, int]:
    names = [run.name for cell in table.cells for run in cell.runs]
    return {name: _record(str(folder / "out/runs" / name)).attempts for name in names}


def test_a_sweep_ranks_what_ran_shows_what_failed_and_repeats_nothing(
    ray_session: None, phantom_shards: str, tmp_path: Path
) -> None:
    (tmp_path / "broken.pth").write_text("no weights")
    starts = {"random": [], "broken": [f"encoder.init={tmp_path / 'broken.pth'}"]}
    space = {"start": {"choices": starts}, "train.lr": [1e-3]}
    table = _run(_file(tmp_path, phantom_shards, space=space, runner={"retries": 0}))
    assert [(cell.values["start"], cell.rank, cell.verdict) for cell in table.cells] == [
        ("random", 1, ""),
        ("broken", None, "failed"),
    ]
    (failed,) = [run for cell in table.cells for run in cell.runs if run.state == "failed"]
    assert "use a .safetensors file" in failed.error
    stored = read_study(str(tmp_path / "out"))
    assert stored is not None and stored[1] == table

    before = _attempts(table, tmp_path)
    again = _run(_file(tmp_path, phantom_shards, space={"train.lr": [1e-3, 1e-6]}, max_steps=4))
    assert [cell.numbers for cell in again.cells] == [table.cells[0].numbers], "the second is over the budget of steps"
    assert {name: before[name] for name in _attempts(again, tmp_path)} == _attempts(again, tmp_path) != {}


@pytest.mark.chaos
def test_optuna_with_early_stopping_goes_on_from_what_it_began(
    ray_session: None, phantom_shards: str, tmp_path: Path
) -> None:
    space = {"train.lr": {"loguniform": [1e-6, 1e-2]}, "train.betas": [[0.9, 0.95], [0.9, 0.999]]}
    settings: dict[str, Any] = {"space": space, "search": "optuna", "asha": {"first": 1, "reduction": 2}}
    few = _run(_file(tmp_path, phantom_shards, num_trials=2, **settings))
    attempts = _attempts(few, tmp_path)
    assert len(attempts) == 2 and few.count("finished") + few.count("stopped") == 2
    more = _run(_file(tmp_path, phantom_shards, num_trials=4, **settings))
    assert {run.name for cell in few.cells for run in cell.runs} < {run.name for c in more.cells for run in c.runs}
    assert more.count("finished") + more.count("stopped") == len(_attempts(more, tmp_path)) == 4
    for cell in few.cells:
        (run,) = cell.runs
        (same,) = [r for c in more.cells for r in c.runs if r.name == run.name]
        # in another order of the replays the one that was stopped may go on, from where it was
        assert same.step >= run.step and same.at(run.step).numbers == run.numbers, "replayed, not repeated"


def test_equal_points_of_optuna_are_one_run_after_the_other_and_no_new_one_when_asked_again(
    ray_session: None, phantom_shards: str, tmp_path: Path
) -> None:
    """A space of one point: the second trial waits for the first, and finds what it reported."""
    asked: dict[str, Any] = {"space": {"train.lr": [1e-3]}, "search": "optuna", "num_trials": 2}
    file = _file(tmp_path, phantom_shards, runner={"max_concurrent": 2, "retries": 0}, **asked)
    for attempts in (2, 2):
        table = _run(file)
        assert table.count("finished") == 1 and [cell.rank for cell in table.cells] == [1]
        assert list(_attempts(table, tmp_path).values()) == [attempts], "replayed once, then nothing is left to do"
        assert len(json.loads((tmp_path / "out/begun.json").read_text())) == 2


def _one_ended_the_next_begun(runs: Path) -> bool:
    return {_record(str(run)).is_done for run in runs.glob("[!.]*")} == {True, False}


def _any_again(runs: Sequence[Path]) -> bool:
    return any(_record(str(run)).attempts > 1 for run in runs)


def _wait_until(condition: Callable[[], bool], child: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + 300
    while not condition():
        assert child.poll() is None, f"the sweep ended with {child.returncode}"
        assert time.monotonic() < until
        time.sleep(0.2)


@pytest.mark.chaos
def test_a_sweep_whose_driver_is_killed_ends_as_one_that_was_not(phantom_shards: str, tmp_path: Path) -> None:
    space = {"seed": [0, 1, 2]}
    tables = {}
    for name in ("straight", "killed"):
        (tmp_path / name).mkdir()
        file = _file(tmp_path / name, phantom_shards, space=space, runner={"max_concurrent": 1})
        command = [str(Path(sys.executable).parent / "medim-ray"), "sweep", "--config", str(file)]
        if name == "killed":
            child = subprocess.Popen(command, start_new_session=True)
            runs = tmp_path / name / "out/runs"
            _wait_until(partial(_one_ended_the_next_begun, runs), child)
            os.kill(child.pid, signal.SIGUSR1)  # as Slurm does ahead of a time limit
            assert child.wait(timeout=60) == os.EX_TEMPFAIL
            assert not (runs.parent / ".lease").exists()
            begun = [run for run in runs.glob("[!.]*") if not _record(str(run)).is_done]
            child = subprocess.Popen(command, start_new_session=True)
            _wait_until(partial(_any_again, begun), child)
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            done = {run.name: _record(str(run)) for run in runs.glob("[!.]*") if _record(str(run)).is_done}
            assert 0 < len(done) < 3, "killed too late to tell"
        subprocess.run(command, check=True, timeout=600)
        tables[name] = json.loads((tmp_path / name / "out/sweep.json").read_text())
    for name, record in done.items():
        assert _record(str(runs / name)) == record, "no finished trial is touched again"
    cells = [tree["cells"][0] for tree in tables.values()]
    assert [run["numbers"]["loss"] for run in cells[0]["runs"]] == [run["numbers"]["loss"] for run in cells[1]["runs"]]
    for run in cells[0]["runs"]:
        assert_same_weights(tmp_path / "straight/out/runs" / run["name"], runs / run["name"])


@pytest.mark.chaos
def test_a_population_goes_on_from_its_best_checkpoint_killed_or_not(phantom_shards: str, tmp_path: Path) -> None:
    """Two members, one exchange after two of four steps; the driver of the second sweep is killed right after it."""
    asked: dict[str, Any] = {
        "space": {"train.lr": [0.0, 1e-3]}, "search": "pbt", "num_trials": 2, "pbt": {"every": 2},
        "runner": {"max_concurrent": 1},
    }  # fmt: skip
    tables: dict[str, Any] = {}
    for name in ("straight", "killed"):
        (tmp_path / name).mkdir()
        command = [str(Path(sys.executable).parent / "medim-ray"), "sweep", "--config"]
        command.append(str(_file(tmp_path / name, phantom_shards, **asked)))
        if name == "killed":
            child = subprocess.Popen(command, start_new_session=True)
            until = time.monotonic() + 300
            while not (tmp_path / name / "out" / LINEAGES).exists() and time.monotonic() < until:
                time.sleep(0.1)
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            tree = json.loads((tmp_path / name / "out" / LINEAGES).read_text())
            runs = tmp_path / name / "out/runs"
            assert any(not _record(str(runs / member["run"])).at(4) for member in tree["generations"][1])
        subprocess.run(command, check=True, timeout=600)
        tables[name] = json.loads((tmp_path / name / "out/sweep.json").read_text())
    runs = tmp_path / "straight/out/runs"
    first, last = json.loads((tmp_path / "straight/out" / LINEAGES).read_text())["generations"]
    scores = [_record(str(runs / member["run"])).at(2) for member in first]
    losses = [float(score.numbers["loss"].value or 0) for score in scores if score is not None]
    worst = losses.index(max(losses))
    assert last[worst]["donor"] == first[1 - worst]["run"] and last[1 - worst] == first[1 - worst]
    donor, heir = (runs / folder for folder in (last[worst]["donor"], last[worst]["run"]))
    pointer = json.loads((heir / POINTER).read_text())
    files = [run / "checkpoints" / pointer["checkpoint"] / "rank-00000.safetensors" for run in (donor, heir)]
    assert files[0].read_bytes() == files[1].read_bytes(), "the heir stood where the donor stood"
    newest = CheckpointStore(str(heir)).newest()
    assert newest is not None and newest.step == 4, "and went on from there"
    assert [json.loads(line)["step"] for line in (heir / "metrics.jsonl").read_text().splitlines()] == [0, 1, 2, 3]
    cells = [{cell["runs"][0]["name"]: cell["numbers"]["loss"] for cell in tree["cells"]} for tree in tables.values()]
    assert cells[0] == cells[1] and len(cells[0]) == 2
    for member in last:
        assert_same_weights(runs / member["run"], tmp_path / "killed/out/runs" / member["run"])


def _of_two_waves(folder: Path, shards: str) -> StudyConfig:
    return StudyConfig(
        recipe=str(MAE),
        shards=shards,
        out=str(folder / "out"),
        overrides=tuple(OVERRIDES),
        arms={"first": [], "second": ["encoder.init=run:first", "train.lr=0"]},
        seeds=(0,),
        metric="loss",
        reference="first",
    )


@pytest.mark.parametrize("is_exported", [True, False])
def test_a_study_whose_arms_begin_from_others_is_checked_again_once_they_ran(
    phantom_shards: str, tmp_path: Path, is_exported: bool
) -> None:
    """Also where somebody removed the exported encoder, which is made again."""
    config = _of_two_waves(tmp_path, phantom_shards)
    _, (second,) = check_study(config).waves
    run = second.config
    if is_exported:
        Path(run.encoder.init).mkdir(parents=True)
    write_config(run, "d")
    store = CheckpointStore(run.run.dir)
    store.commit(checkpoint_name(2, 0), {"schema_version": SCHEMA_VERSION, "step": 2, "files": {}})
    assert store.names()
    (again,) = check_study(config).waves[1]
    assert again == second


@pytest.mark.chaos
def test_an_arm_begins_from_the_run_of_another(ray_session: None, phantom_shards: str, tmp_path: Path) -> None:
    config = _of_two_waves(tmp_path, phantom_shards)
    table, _ = execute(check_study(config), Console(file=sys.stderr))
    losses = {cell.values["arm"]: cell.numbers["loss"].value for cell in table.cells}
    assert losses["second"] is not None and losses["first"] is not None and losses["second"] != losses["first"]
    stored = read_study(str(tmp_path / "out"))
    assert stored is not None
    assert stored[0].differences(table)["loss"]["arm=second"].value == pytest.approx(losses["second"] - losses["first"])
    attempts = _attempts(table, tmp_path)
    assert _attempts(execute(check_study(config), Console(file=sys.stderr))[0], tmp_path) == attempts, "nothing is left"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"space": {"data.shards": ["a", "b"]}}, "learn from one shard set"),
        ({"space": {"train.keep_last": [1, 2]}}, r"space\.train\.keep_last: its values change nothing"),
        ({"max_steps": 3}, r"max_steps=3: not one trial fits, they take up to 4 steps"),
        ({"asha": {"first": 50}}, r"asha\.first=50: must be at most train\.steps=4"),
        ({"metric": "dice.pneumothorax", "probe": {"tasks": ["labels"]}}, "has no 'segment'"),
        ({"metric": "auroc.nosuch"}, r"auroc\.nosuch is asked for, but what is probed .* has mean, findings,"),
        ({"metric": "auroc@0.05.view"}, r"has auroc\.view, auroc@tuned\.view, auroc@0\.01\.view"),
        ({"metric": "dice@upernet.pneumothorax"}, r"what is probed has dice\.pneumothorax$"),
        ({"metric": "auroc.view", "report": ["mae.sex"]}, r"mae\.sex is asked for, but .* has age"),
        ({"metric": "auroc.mean", "probe": {"labels": ["nosuch"]}}, "no image of .* has a label 'nosuch'"),
    ],
)  # fmt: skip
def test_what_no_trial_can_report_is_refused_before_any_starts(
    phantom_shards: str, tmp_path: Path, more: dict[str, Any], message: str
) -> None:
    file = _file(tmp_path, phantom_shards, **{"space": {"masking.ratio": [0.5, 0.75]}, **more})
    with pytest.raises(ValueError, match=message):
        check_sweep(load_sweep(str(file), []))


def test_what_optuna_began_counts_within_its_space_and_its_budget(phantom_shards: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    noted = [{"train.lr": 1e-3}, {"train.lr": 0.5}, {"train.lr": 1e-3, "masking.ratio": "0.5"}]
    (tmp_path / "out/begun.json").write_text(json.dumps(noted))
    space: dict[str, Any] = {"train.lr": {"loguniform": [1e-5, 1e-2]}}
    options = {"search": "optuna", "num_trials": 10, "max_steps": 120}
    one = check_sweep(load_sweep(str(_file(tmp_path, phantom_shards, space=space, **options)), []))
    assert one.begun.values == noted[:1] and len(one.trials()) == 1
    one.began({"train.lr": 1e-4})
    assert json.loads((tmp_path / "out/begun.json").read_text()) == [*noted[1:], noted[0], {"train.lr": 1e-4}]
    space = {"train.steps": [4, 60]}
    assert check_sweep(load_sweep(str(_file(tmp_path, phantom_shards, space=space, **options)), [])).num_optuna == 2
    (tmp_path / "out/begun.json").write_text("[1")
    with pytest.raises(ValueError, match=r"begun\.json is damaged: remove it"):
        check_sweep(load_sweep(str(_file(tmp_path, phantom_shards, space=space, **options)), []))


def test_a_child_waits_for_its_parent_to_end(phantom_shards: str, tmp_path: Path) -> None:
    """A budget may have cut the parent; a number from a part of it would stand for good."""
    overrides = [text for text in OVERRIDES if not text.startswith("train.steps")]
    config = StudyConfig(
        recipe=str(MAE), shards=phantom_shards, out=str(tmp_path / "out"), overrides=(*overrides, "train.steps=4"),
        arms={"parent": [], "child": ["encoder.init=run:parent"]}, seeds=(0,), metric="loss",
    )  # fmt: skip
    study = check_study(config)
    parent, child = study.trials()
    report = Report(2, {"loss": Number(1.0)}, {})
    write_record(parent.config.run.dir, Record(data_hash=study.job.data_hash, reports=(report,), attempts=1))
    assert [[trial.name for trial in search.trials] for search in study.searches()] == [[parent.name], []]
    done = Record(data_hash=study.job.data_hash, reports=(replace(report, step=4),), attempts=1, state="finished")
    write_record(parent.config.run.dir, done)
    assert [[trial.name for trial in search.trials] for search in study.searches()] == [[parent.name], [child.name]]
    with pytest.raises(ValueError, match=r"begins from another arm's run, .* runs=s3://bucket/x is none"):
        check_study(replace(config, runs="s3://bucket/x"))


def test_a_plain_sweep_goes_on_with_what_another_one_stopped(
    ray_session: None, phantom_shards: str, tmp_path: Path
) -> None:
    """Of two points successive halving stops the one that learns nothing."""
    space, one_by_one = {"train.lr": [1e-2, 1e-9]}, {"max_concurrent": 1}
    halving = _run(_file(tmp_path, phantom_shards, space=space, asha={"first": 3, "reduction": 2}, runner=one_by_one))
    assert [(run.values["train.lr"], run.step) for run in halving.runs if run.state == "stopped"] == [(1e-9, 3)]
    plain = _run(_file(tmp_path, phantom_shards, space=space, runner=one_by_one))
    assert plain.count("finished") == len(plain.runs) == 2 and {run.step for run in plain.runs} == {4}
    assert [run.steps for run in plain.runs] == [{3, 4}, {3, 4}]
