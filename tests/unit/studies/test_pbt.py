"""Who takes over whose checkpoint, what a lineage is called, and what a run folder holds that began from another."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medim_ray.config.loader import load, to_tree
from medim_ray.config.schema import RunConfig
from medim_ray.studies.outcome import Number
from medim_ray.studies.pbt import (
    LINEAGES,
    POINTER,
    Member,
    PbtConfig,
    Population,
    explored,
    inherit,
    lineage,
    next_members,
)
from medim_ray.studies.space import Choices, Range, SearchSpace
from medim_ray.studies.sweep import SweepConfig
from medim_ray.studies.trials import Record, Report, TrialJob, asked, write_record
from medim_ray.train.store import SCHEMA_VERSION, CheckpointStore, checkpoint_name

SPACE = {"train.lr": {"loguniform": [1e-4, 1e-2]}, "masking.ratio": [0.25, 0.5, 0.75]}


def _job(folder: Path, **space: Any) -> TrialJob:
    base = to_tree(load(RunConfig, None, ["train.steps=30"]))
    return TrialJob(
        base=base, space=SearchSpace.parse(space or SPACE), runs=str(folder / "runs"), data_hash="d", rungs=(),
        probe=None, metric="loss",
    )  # fmt: skip


def _population(folder: Path, size: int = 4, **pbt: Any) -> Population:
    return Population(_job(folder), PbtConfig(**{"every": 10, **pbt}), size, 0, str(folder / "out"))


def _ran(population: Population, losses: list[float | None]) -> None:
    """Every member of the generation reports at its rung and leaves a checkpoint there."""
    rung = population.rungs[len(population.generations) - 1]
    for trial, loss in zip(population.trials(), losses, strict=True):
        folder = trial.config.run.dir
        record = asked(folder, "d", None)
        if loss is not None:
            reports = (*record.reports, Report(rung, {"loss": Number(loss)}, {}))
            record = replace(record, reports=reports, state="finished")
        else:
            record = replace(record, state="failed")
        write_record(folder, replace(record, data_hash="d", attempts=1))
        store = CheckpointStore(folder)
        file, name = "rank-00000.safetensors", checkpoint_name(rung, store.next_attempt())
        content = memoryview(f"{trial.name} {rung}".encode())
        facts = {file: store.write(name, file, lambda content=content: [content])}  # type: ignore[misc]
        store.commit(name, {"schema_version": SCHEMA_VERSION, "step": rung, "files": facts})
        for older in store.names()[1:]:
            store.remove(older)
        old = Path(folder, "metrics.jsonl")
        before = old.read_text() if old.exists() else ""
        seen = before.count("\n")
        old.write_text(before + "".join(json.dumps({"step": step, "loss": loss}) + "\n" for step in range(seen, rung)))


def test_the_worst_go_on_from_the_best_checkpoint_and_the_others_stay_where_they_are(tmp_path: Path) -> None:
    population = _population(tmp_path)
    searches = population.searches()
    first = next(searches)
    assert first.rungs == (10,) and len(first.trials) == 4
    _ran(population, [3.0, 1.0, 9.0, 2.0])
    best, worst = (population.trials()[i] for i in (1, 2))
    second = next(searches)
    assert second.rungs == (10, 20)
    old, new = population.generations
    assert [o.run == n.run for o, n in zip(old, new, strict=True)] == [True, True, False, True]
    assert (new[2].donor, new[2].step) == (old[1].run, 10) and new[2].values != old[2].values
    child = second.trials[2]
    assert child.point.values["member"] == 2 and child.config.run.dir.endswith(new[2].run)
    assert child.name == lineage(child_hash(population, new[2]), old[1].run, 10, 2)
    # what the folder holds is what the donor held
    pointer = json.loads(Path(child.config.run.dir, POINTER).read_text())
    assert pointer["donor"] == best.config.run.dir and pointer["step"] == 10
    newest = CheckpointStore(child.config.run.dir).newest()
    assert newest is not None and newest.step == 10 and newest.name == pointer["checkpoint"]
    stored = Path(child.config.run.dir, "checkpoints", newest.name, "rank-00000.safetensors").read_bytes()
    assert stored == f"{best.name} 10".encode()
    record = asked(child.config.run.dir, "d", None)
    assert [r.numbers["loss"].value for r in record.reports] == [1.0] and record.attempts == 0 and not record.is_done
    assert len(Path(child.config.run.dir, "metrics.jsonl").read_text().splitlines()) == 10
    assert asked(worst.config.run.dir, "d", None).reports[0].numbers["loss"].value == 9.0, "the run that was left stays"
    # a trial that ended at the first rung is not done with the second
    one, two = (replace(population.job, rungs=population.rungs[:n]) for n in (1, 2))
    assert one.is_done(best.config) and not two.is_done(best.config)
    # nor is it for a search that shares its runs and goes to their end
    plain = population.job.record(worst.config)
    assert plain.state == "running" and not population.job.is_done(worst.config)


def test_a_generation_that_was_cut_decides_nothing(tmp_path: Path) -> None:
    population = _population(tmp_path)
    searches = population.searches()
    next(searches)
    _ran(population, [3.0, 1.0, 9.0, 2.0])
    cut = population.trials()[0].config.run.dir
    write_record(cut, Record(data_hash="d", attempts=1, state="running"))
    assert list(searches) == [] and len(population.generations) == 1
    assert not Path(tmp_path, "out", LINEAGES).exists()


def child_hash(population: Population, member: Member) -> str:
    """The run hash of a member's values, in the folder of no lineage."""
    values = {key: str(v) if key == "masking.ratio" else v for key, v in member.values.items()}
    return population.job.trial(population.job.space.point(values)).name


def test_a_second_life_goes_on_from_the_file_and_decides_nothing_again(tmp_path: Path) -> None:
    population = _population(tmp_path)
    searches = population.searches()
    next(searches)
    _ran(population, [3.0, 1.0, 9.0, None])
    next(searches)
    assert population.generations[1][3].donor == population.generations[0][1].run, "a member that failed is replaced"
    again = _population(tmp_path)
    assert again.generations == population.generations
    for member in again.generations[0]:  # whatever the records say now
        write_record(f"{tmp_path}/runs/{member.run}", Record())
    latest = next(iter(again.searches()))
    assert latest.rungs == (10, 20), "what was exchanged is not run again, also where it was never probed so"
    assert [trial.name for trial in latest.trials] == [member.run for member in population.generations[1]]
    with pytest.raises(ValueError, match="holds another population"):
        _population(tmp_path, every=15)
    with pytest.raises(ValueError, match="holds another population"):
        _population(tmp_path, size=3)
    Path(tmp_path, "out", LINEAGES).unlink()
    assert len(_population(tmp_path).generations) == 1


def test_copying_a_checkpoint_is_done_again_where_it_was_cut_and_refused_where_it_is_gone(tmp_path: Path) -> None:
    population = _population(tmp_path)
    _ran(population, [1.0, 2.0, 3.0, 4.0])
    donor = population.trials()[0].config.run.dir
    (name,) = CheckpointStore(donor).names()
    cut = tmp_path / "child/checkpoints" / name
    cut.mkdir(parents=True)
    (cut / "rank-00000.safetensors").write_bytes(b"half")
    (cut / "rank-00009.safetensors").write_bytes(b"left over")
    inherit(donor, 10, str(tmp_path / "child"))
    assert CheckpointStore(str(tmp_path / "child")).problem(name) is None
    assert {path.name for path in cut.iterdir()} == {"rank-00000.safetensors", "manifest.json"}
    inherit(str(tmp_path / "nowhere"), 10, str(tmp_path / "child"))  # it stands: nothing is asked of the donor
    with pytest.raises(ValueError, match="no checkpoint of step 20"):
        inherit(donor, 20, str(tmp_path / "other"))


@settings(deadline=None, max_examples=12)  # a configuration is built for every member that is replaced
@given(st.lists(st.one_of(st.none(), st.floats(0, 10)), min_size=2, max_size=9), st.booleans(), st.integers(0, 99))
def test_only_the_worst_are_replaced_only_by_the_best_inside_the_space(
    scores: list[float | None], higher: bool, seed: int
) -> None:
    job = _job(Path("/nowhere"))
    space = [{"train.lr": 1e-3 * (1 + i / 10), "masking.ratio": 0.5} for i in range(len(scores))]
    members = [Member(values=values, run=f"r{i}") for i, values in enumerate(space)]
    after = next_members(members, scores, 10, job, PbtConfig(), seed, higher)
    assert after == next_members(members, scores, 10, job, PbtConfig(), seed, higher)
    changed = [i for i in range(len(scores)) if after[i] is not members[i]]
    known = [score for score in scores if score is not None]
    if not known:
        assert not changed
        return
    num = max(1, len(scores) // 4, scores.count(None))
    assert len(changed) <= num and all(i in changed for i, score in enumerate(scores) if score is None)
    for i in changed:
        donor = scores[int(after[i].donor[1:])]
        own = scores[i]
        assert donor is not None and (own is None or (donor >= own if higher else donor <= own))
        assert 1e-4 <= after[i].values["train.lr"] <= 1e-2 and after[i].values["masking.ratio"] in (0.25, 0.5, 0.75)
        assert after[i].run not in {member.run for member in members} and after[i].step == 10


def test_values_go_to_a_neighbour_or_are_drawn_anew() -> None:
    never, always = PbtConfig(resample_ratio=0.0), PbtConfig(resample_ratio=1.0)
    ratio, lr = Choices("r", {"0.25": (), "0.5": (), "0.75": ()}), Range("lr", "loguniform", 1e-4, 1e-2)
    assert [explored(ratio, 0.5, (0.0, 0.0, side), never) for side in (0.1, 0.9)] == ["0.25", "0.75"]
    assert explored(ratio, 0.75, (0.0, 0.0, 0.9), never) == "0.75", "the last has no neighbour above"
    assert explored(ratio, 0.5, (0.0, 0.99, 0.9), always) == "0.75"
    assert explored(lr, 1e-3, (0.0, 0.0, 0.1), never) == pytest.approx(8e-4)
    assert explored(lr, 9.9e-3, (0.0, 0.0, 0.9), never) == 1e-2
    assert explored(lr, 1e-3, (0.0, 0.5, 0.9), always) == pytest.approx(1e-3)
    assert explored(Range("n", "randint", 1, 9), 5, (0.0, 0.0, 0.9), never) == 6


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"asha": {"first": 5}}, "search=pbt has generations of its own"),
        ({"search": "random", "pbt": {"every": 5}}, "pbt is set, but search=random"),
        ({"num_trials": None}, "search=pbt needs num_trials"),
        ({"pbt": {"exploit_ratio": 0.8}}, "exploit_ratio=0.8"),
    ],
)
def test_options_that_do_not_go_together_are_refused(asked: dict[str, Any], message: str) -> None:
    import yaml

    tree = {"recipe": "x.yaml", "out": "out", "space": SPACE, "search": "pbt", "num_trials": 4, **asked}
    with pytest.raises(ValueError, match=message):
        load(
            SweepConfig,
            None,
            [
                f"{key}={yaml.safe_dump(value, default_flow_style=True).partition(chr(10))[0]}"
                for key, value in tree.items()
            ],
        )


def test_a_population_needs_members_that_differ(tmp_path: Path) -> None:
    for space, size, message in (
        ({"seed": [0, 1]}, 2, "space.seed: members"), ({"masking.ratio": [0.5, 0.75]}, 3, "space has 2 points"),
        (SPACE, 1, "of 2 or more"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            Population(_job(tmp_path, **space), PbtConfig(every=10), size, 0, str(tmp_path))


def test_a_population_that_was_bred_for_something_else_is_refused(tmp_path: Path) -> None:
    population = _population(tmp_path)
    searches = population.searches()
    next(searches)
    _ran(population, [3.0, 1.0, 9.0, 2.0])
    next(searches)
    assert len(_population(tmp_path).generations) == 2
    with pytest.raises(ValueError, match=r"another population .* by loss\): give another out"):
        _population(tmp_path, exploit_ratio=0.5)
    other = replace(_job(tmp_path), metric="samples_per_s")
    with pytest.raises(ValueError, match="another population"):
        Population(other, PbtConfig(every=10), 4, 0, str(tmp_path / "out"))
    (tmp_path / "out" / LINEAGES).write_text('{"rungs": [10')
    with pytest.raises(ValueError, match=r"lineages\.json is damaged: give another out"):
        _population(tmp_path)


def test_a_population_without_an_exchange_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"pbt\.every=30: no exchange within train\.steps=30"):
        _population(tmp_path, every=30)
