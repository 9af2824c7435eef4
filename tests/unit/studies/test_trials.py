"""A trial's record: rungs, what is kept, what is replayed without training, and when it is forgotten."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from medim_ray.config.loader import load, to_tree
from medim_ray.config.probe import ProbeConfig
from medim_ray.config.schema import RunConfig
from medim_ray.studies.outcome import Number
from medim_ray.studies.trials import Record, Report, life, read_record, rung_steps, write_record

REPORTS = tuple(
    Report(
        step, {"loss": Number(3.0 / step), "auroc.mean": Number(0.7, 0.6, 0.8)}, {"auroc.mean": Number(0.1, 0.0, 0.2)}
    )
    for step in (50, 150)
)


def _config(run_dir: Path) -> RunConfig:
    return load(RunConfig, None, [f"run.dir={run_dir}", "train.steps=150"])


def test_rungs_grow_by_the_reduction_and_end_with_the_last_step() -> None:
    assert rung_steps(300, 20, 3) == (20, 60, 180, 300)
    assert rung_steps(180, 20, 3) == (20, 60, 180)
    assert rung_steps(10, 20, 3) == (10,)


def test_a_record_reads_back_as_it_was_written(tmp_path: Path) -> None:
    record = Record(state="stopped", data_hash="abc", probe={"seed": 0}, reports=REPORTS, seconds=12.5, attempts=2)
    write_record(str(tmp_path / "run"), record)
    assert read_record(str(tmp_path / "run")) == record
    assert read_record(str(tmp_path / "none")) == Record()


def test_what_was_reported_is_replayed_and_never_trained_again(tmp_path: Path) -> None:
    """There are no shards: training would fail."""
    config = _config(tmp_path)
    write_record(config.run.dir, Record(data_hash="abc", reports=REPORTS, attempts=1, seconds=99.0))
    assert list(life(config, (50, 150), None, "abc")) == list(REPORTS)
    record = read_record(config.run.dir)
    assert (record.state, record.attempts, record.seconds) == ("finished", 2, 99.0)


def test_other_shards_are_refused(tmp_path: Path) -> None:
    config = _config(tmp_path)
    write_record(config.run.dir, Record(data_hash="abc", reports=REPORTS))
    with pytest.raises(ValueError, match=r"trained on other shards \(content abc, now def\)"):
        next(life(config, (50, 150), None, "def"))


def test_other_probes_forget_the_reports_and_not_the_time() -> None:
    probe = to_tree(ProbeConfig(labels=("view",)))
    record = Record(data_hash="abc", probe=probe, reports=REPORTS, seconds=9.0, state="finished", attempts=1)
    assert record.asked("run", "abc", probe) == record
    older = {key: value for key, value in probe.items() if key != "finetune"}
    assert replace(record, probe=older).asked("run", "abc", probe).reports == REPORTS, "later options had defaults"
    again = record.asked("run", "abc", to_tree(ProbeConfig(labels=("sex",))))
    assert (again.reports, again.is_done, again.attempts, again.seconds) == ((), False, 0, 9.0)
    assert record.asked("run", "abc", {}) == record, "who asks no probe takes a run that has one"
    with pytest.raises(ValueError, match="trained on other shards"):
        record.asked("run", "def", probe)
