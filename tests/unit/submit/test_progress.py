"""Progress of a followed job, out of its run's metrics."""

from __future__ import annotations

import json
import time
from pathlib import Path

from medim_ray.submit.progress import ProgressTail, run_dir_of, shown
from medim_ray.submit.spec import load_spec

SMALL = Path(__file__).parents[3] / "jobs/pretrain-medim-small.yaml"


def log(run: Path, step: int) -> None:
    run.mkdir(parents=True, exist_ok=True)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "loss": 1.5 - step / 10, "samples_per_s": 8.0}) + "\n")


def test_each_step_is_told_once_and_a_half_written_line_is_passed_over(tmp_path: Path) -> None:
    tail = ProgressTail(str(tmp_path / "run"))
    assert tail.line() == ""
    for step in range(300):
        log(tmp_path / "run", step)
    assert tail.line() == "step 300: loss -28.4, 8.0 samples/s" and tail.line() == ""
    with (tmp_path / "run/metrics.jsonl").open("a") as file:
        file.write('{"step": 300, "lo')
    assert tail.line() == ""


def test_only_what_is_new_since_the_follower_came_is_told(tmp_path: Path) -> None:
    spec = load_spec(SMALL, [f"storage.root={tmp_path}"])
    run = Path(run_dir_of(spec))
    assert run == tmp_path / "runs/pretrain-medim-small"
    log(run, 0)
    said: list[str] = []
    with shown(spec, said.append, every_s=0.05):
        time.sleep(0.2)
        assert said == []
        log(run, 1)
        deadline = time.monotonic() + 5
        while not said and time.monotonic() < deadline:
            time.sleep(0.02)
    assert said == ["step 2: loss 1.4, 8.0 samples/s"]
    assert run_dir_of(load_spec(SMALL, ["command=[doctor]"])) == ""
