"""Failures are told apart, and each kind has a budget of its own."""

from __future__ import annotations

import pytest
from ray.exceptions import ActorDiedError
from ray.train import WorkerGroupError

from medim_ray.config.schema import TrainConfig
from medim_ray.train.attempts import Budgets, Failure, of_error, of_outcome
from medim_ray.train.control import Outcome


def test_a_lost_worker_is_told_before_the_errors_it_causes_in_others() -> None:
    failures = {0: RuntimeError("Connection closed by peer"), 1: ActorDiedError()}
    failure = of_error(WorkerGroupError("two workers", failures))
    assert (failure.kind, failure.rank) == ("loss", 1) and str(failure) == "worker 1: its process or node is gone"


def test_an_exception_is_an_error_with_its_last_line() -> None:
    failure = of_error(WorkerGroupError("one", {2: ValueError("Traceback\n  ...\nValueError: no such layer")}))
    assert failure == Failure("error", 2, "ValueError: no such layer")


def test_of_an_exception_of_many_lines_the_first_is_told() -> None:
    text = 'Traceback:\n  File "x.py", line 3, in f\n    g()\nValueError: no weights\n\nSee the manual.'
    assert of_error(WorkerGroupError("one", {0: ValueError(text)})).message == "ValueError: no weights"


def test_shards_that_are_gone_end_the_run_at_once() -> None:
    text = (
        'Traceback:\n  File "rows.py", line 3, in _input\n    raise\nmedim_ray.data.rows.ShardFaultError: data.shards: '
        "train/00000.parquet is missing: `medim-ray shards verify` tells what is damaged"
    )
    failure = of_error(WorkerGroupError("two", {0: ActorDiedError(), 1: RuntimeError(text)}))
    assert failure.kind == "data" and str(failure).startswith("data.shards: train/00000.parquet is missing: `medim-ray")
    assert Budgets(TrainConfig(max_errors=3)).exhausted_by(failure, 4) == "trying again would meet the same shards"


_OF_OUTCOME = [("finished", None), ("stopped", None), ("preempted", "preemption"), ("bad_step", "numbers")]


@pytest.mark.parametrize(("kind", "expected"), [*_OF_OUTCOME, ("resized", "growth"), ("broken_rows", "data")])
def test_outcomes(kind: str, expected: str | None) -> None:
    failure = of_outcome(Outcome(kind=kind, step=3, message="m"))  # type: ignore[arg-type]
    assert (failure.kind if failure else None) == expected


def test_budgets_are_separate() -> None:
    budgets = Budgets(TrainConfig(max_failures=1, max_preemptions=2, max_errors=3))
    loss, taken, error = (Failure(kind, 0, "") for kind in ("loss", "preemption", "error"))
    assert budgets.exhausted_by(loss, 4) is None
    assert budgets.exhausted_by(taken, 4) is None and budgets.exhausted_by(taken, 4) is None
    assert [budgets.exhausted_by(error, step) for step in (4, 4, 6, 6)] == [None] * 4, "progress makes it another step"
    assert "the same step failed 3 times" in str(budgets.exhausted_by(error, 6))
    assert "max_preemptions=2" in str(budgets.exhausted_by(taken, 6))
    assert "max_failures=1" in str(budgets.exhausted_by(loss, 6))
    assert Budgets(TrainConfig()).exhausted_by(Failure("numbers", None, ""), 1) == "train.on_bad_step=stop"
    going_back = Budgets(TrainConfig(on_bad_step="rewind"))
    numbers = Failure("numbers", None, "")
    assert [going_back.exhausted_by(numbers, step) for step in (1, 1, 1, 1, 1, 1, 1, 9)] == [None] * 8
    assert going_back.exhausted_by(numbers, 1) == "the run went back to step 1 8 times: it has diverged"
    for _ in range(50):
        assert Budgets(TrainConfig()).exhausted_by(taken, 1) is None
        assert Budgets(TrainConfig()).exhausted_by(Failure("growth", None, ""), 1) is None
