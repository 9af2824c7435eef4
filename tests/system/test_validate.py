"""Checkpoints validated while the run goes on: what is written, that the best is kept, that a failure ends nothing."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from medim_ray.data.shards import ShardSet
from medim_ray.probes.rows import list_rows
from medim_ray.probes.validate import VALIDATE, _sample, validate
from medim_ray.train.launch import launch
from medim_ray.train.metrics import read_metrics
from medim_ray.train.runs import find_checkpoint
from medim_ray.train.store import CheckpointStore
from medim_ray.train.validation import BEST, read_best, read_validation
from tests.system.runs import MAE, config_of

pytestmark = [pytest.mark.system, pytest.mark.usefixtures("ray_session")]
ONE = ["train.num_workers=1", "train.zero=0", "train.keep_last=1", "validate.num_cpus=0.5"]


def test_every_checkpoint_is_validated_and_the_best_is_kept(phantom_shards: str, tmp_path: Path) -> None:
    options = ["train.steps=4", "train.checkpoint_every=4", "validate.labels=[view]", *ONE]
    config = config_of(MAE, phantom_shards, tmp_path / "run", *options, "train.stop_after=2")
    assert launch(config, Console(file=io.StringIO()), VALIDATE).step == 2
    (first,) = read_validation(config.run.dir)
    assert first["step"] == 2 and 0.0 <= first["view"] == first["mean"] <= 1.0
    assert 0.0 <= first["knn_view"] == first["knn_mean"] <= 1.0
    assert first["view"] == validate(config.run.dir, first["checkpoint"], config.validate)["view"]

    # A later checkpoint beats it only by its own number: an impossible one keeps the first as the best.
    line = {**first, "mean": 2.0, "view": 2.0}
    (tmp_path / "run/validation.jsonl").write_text(json.dumps(line) + "\n")
    again = config_of(MAE, phantom_shards, tmp_path / "run", *options)
    assert launch(again, Console(file=io.StringIO()), VALIDATE).finished
    rows = read_validation(again.run.dir)
    assert [row["step"] for row in rows] == [2, 4] and "error" not in rows[1]
    assert read_best(again.run.dir) == first["checkpoint"] == find_checkpoint(again.run.dir, "best")
    assert json.loads((tmp_path / "run" / BEST).read_text())["value"] == 2.0
    assert first["checkpoint"] in CheckpointStore(again.run.dir).names(), "train.keep_last=1 has not pruned the best"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["validate.labels=[vieww]"], r"validate\.labels, among .* did you mean 'view'\?"),
        (["validate.labels=[age]"], r"best_by='mean': what is validated has r2_age$"),
        (["validate.labels=[age]", "validate.best_by=age"], "what is validated has r2_age$"),
        (["validate.retrieve=true", "validate.best_by=recall_at_10"], r"name=mae of this run embeds no reports"),
    ],
)
def test_what_can_not_be_validated_is_refused_before_the_run(
    phantom_shards: str, tmp_path: Path, options: list[str], message: str
) -> None:
    config = config_of(MAE, phantom_shards, tmp_path / "run", "train.steps=2", *options, *ONE)
    with pytest.raises(ValueError, match=message):
        launch(config, Console(file=io.StringIO()), VALIDATE)
    assert not (tmp_path / "run").exists()


@pytest.mark.chaos
def test_a_part_of_a_validation_that_fails_is_told_and_the_others_and_the_run_go_on(
    phantom_shards: str, tmp_path: Path
) -> None:
    parts = ["validate.labels=[view]", "validate.segment=[rib fracture]"]  # no image of the phantoms shows one
    config = config_of(MAE, phantom_shards, tmp_path / "run", "train.steps=2", *parts, *ONE)
    said = Console(file=io.StringIO(), width=300)
    assert launch(config, said, VALIDATE).finished and len(read_metrics(config.run.dir)) == 2
    (row,) = read_validation(config.run.dir)
    assert "'rib fracture'" in row["error"] and row["error"] in said.file.getvalue()  # type: ignore[attr-defined]
    assert 0.0 <= row["view"] <= 1.0 and read_best(config.run.dir) == row["checkpoint"]


def test_what_a_killed_command_left_is_validated_by_the_next_and_never_on_the_test_split(
    phantom_shards: str, tmp_path: Path
) -> None:
    """The first command asks for none, as if it had died right behind its last step."""
    run = tmp_path / "run"
    assert launch(config_of(MAE, phantom_shards, run, "train.steps=2", *ONE), Console(file=io.StringIO())).finished
    asked = config_of(MAE, phantom_shards, run, "train.steps=2", "validate.labels=[view]", *ONE)
    said = io.StringIO()
    assert launch(asked, Console(file=said, width=300), VALIDATE).finished
    (row,) = read_validation(asked.run.dir)
    assert row["step"] == 2 and read_best(asked.run.dir) == row["checkpoint"] and "validating" in said.getvalue()
    assert launch(asked, Console(file=said), VALIDATE).finished and len(read_validation(asked.run.dir)) == 1
    every = list_rows(ShardSet.open(phantom_shards))
    looked = _sample(ShardSet.open(phantom_shards), len(every))
    assert set(every.splits) - set(looked.splits) == {"test"} and len(looked) < len(every)
