"""A trial's record: rungs, what is kept, what is replayed without training, and when it is forgotten."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from medim_ray.config.loader import load, to_tree
from medim_ray.config.probe import ProbeConfig
from medim_ray.config.schema import RunConfig
from medim_ray.studies.outcome import Number
from medim_ray.studies.space import SearchSpace
from medim_ray.studies.trials import Record, Report, TrialJob, asked, life, read_records, rung_steps, write_record

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
    assert read_records(str(tmp_path / "run")) == [record]
    assert read_records(str(tmp_path / "none")) == []


def test_what_was_reported_is_replayed_and_never_trained_again(tmp_path: Path) -> None:
    """There are no shards: training would fail."""
    config = _config(tmp_path)
    write_record(config.run.dir, Record(data_hash="abc", reports=REPORTS, attempts=1, seconds=99.0))
    assert list(life(config, (50, 150), None, "abc")) == list(REPORTS)
    (record,) = read_records(config.run.dir)
    assert (record.state, record.attempts, record.seconds) == ("finished", 2, 99.0)


def test_other_shards_are_refused(tmp_path: Path) -> None:
    config = _config(tmp_path)
    write_record(config.run.dir, Record(data_hash="abc", reports=REPORTS))
    with pytest.raises(ValueError, match=r"trained on other shards \(content abc, now def\)"):
        next(life(config, (50, 150), None, "def"))


def test_a_replay_that_is_cut_leaves_a_finished_trial_finished(tmp_path: Path) -> None:
    """As where ASHA stops it this time, since others were better by then."""
    config = _config(tmp_path)
    for state in ("finished", "stopped"):
        write_record(config.run.dir, Record(data_hash="abc", reports=REPORTS, attempts=1, state=state))
        assert next(life(config, (50, 150), None, "abc")) == REPORTS[0]
        assert read_records(config.run.dir)[0].state == state


def test_each_probe_has_its_own_reports_beside_the_others(tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    view, sex = ProbeConfig(labels=("view",)), ProbeConfig(labels=("sex",))
    record = Record(data_hash="abc", probe=to_tree(view), reports=REPORTS, seconds=9.0, state="finished", attempts=1)
    write_record(run, record)
    assert asked(run, "abc", view) == record
    assert asked(run, "abc", replace(view, cache="elsewhere")) == record, "where features are cached changes nothing"
    other = asked(run, "abc", sex)
    assert (other.reports, other.is_done, other.attempts, other.seconds) == ((), False, 0, 9.0)
    write_record(run, replace(other, state="finished", reports=REPORTS[:1], attempts=1))
    assert asked(run, "abc", view) == record and asked(run, "abc", sex).reports == REPORTS[:1], "both stay"
    bare = asked(run, "abc", None)
    assert bare.reports == REPORTS and bare.is_done and not bare.probe, "who asks no probe takes a run that has one"
    with pytest.raises(ValueError, match="trained on other shards"):
        asked(run, "def", view)


def test_records_of_earlier_code_are_read_and_probed_anew(tmp_path: Path) -> None:
    """Options that were not there yet had their defaults, also nested ones; what reports lacked is not made up."""
    probe = ProbeConfig(labels=("view",))
    tree = to_tree(probe)
    older = {**tree, "segment": {k: v for k, v in tree["segment"].items() if k != "tune"}}
    del older["finetune"]
    record = Record(data_hash="abc", probe=older, reports=REPORTS, seconds=9.0, state="finished", attempts=1)
    write_record(str(tmp_path), record)
    assert asked(str(tmp_path), "abc", probe).reports == REPORTS
    flat = json.loads((tmp_path / "trial.json").read_text())["records"][0]
    del flat["version"]
    (tmp_path / "trial.json").write_text(json.dumps(flat))
    again = asked(str(tmp_path), "abc", probe)
    assert (again.is_done, again.reports, again.seconds) == (False, (), 9.0)
    write_record(str(tmp_path), replace(again, attempts=1))
    assert len(read_records(str(tmp_path))) == 1, "in the place of the old one"


def test_what_another_sweep_stopped_early_is_not_done_where_nothing_is_stopped(tmp_path: Path) -> None:
    """Nor is a member of a population whose place another one took, which says that it is finished in older files."""
    config = _config(tmp_path)
    plain = TrialJob(
        base={}, space=SearchSpace(()), runs=str(tmp_path), data_hash="abc", rungs=(), probe=None, metric="loss"
    )
    halving = replace(plain, rungs=(50, 150), may_stop=True)
    early = Record(data_hash="abc", reports=REPORTS[:1], attempts=1, state="stopped")
    write_record(config.run.dir, early)
    assert halving.record(config) == early and halving.is_done(config)
    assert plain.record(config).state == "running" and not plain.is_done(config)
    write_record(config.run.dir, replace(early, state="finished"))
    assert plain.record(config).state == "running" and not plain.is_done(config)
    assert replace(plain, rungs=(50,)).is_done(config), "for a generation that ends there it is"
    whole = replace(early, reports=REPORTS, state="finished")
    write_record(config.run.dir, whole)
    assert plain.record(config) == whole and plain.is_done(config)
    write_record(config.run.dir, replace(whole, state="failed"))
    assert not plain.is_done(config), "a metric that was not reported"


@pytest.mark.parametrize(
    "text", ["", '{"records": [{"state": "fin', "[]", '{"records": [{"colour": 1, "reports": []}]}']
)
def test_a_damaged_record_is_told_and_its_trial_done_again(
    tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "trial.json").write_text(text)
    assert read_records(str(tmp_path)) == [] and asked(str(tmp_path), "abc", None).attempts == 0
    assert f"{tmp_path}/trial.json is damaged" in caplog.text
    write_record(str(tmp_path), Record(data_hash="abc", reports=REPORTS))
    assert read_records(str(tmp_path))[0].reports == REPORTS
