"""Where a run's wall time went, over attempts that were lost, restarted and launched again; MFU by a known peak."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from medim_ray.plan import probe
from medim_ray.plan.constants import gpu
from medim_ray.train.metrics import METRICS, JsonLinesFile, read_metrics, read_records
from medim_ray.train.throughput import ATTEMPTS, Meter, Pace, throughput


def pace(launched_at: float, num_workers: int = 2) -> Pace:
    return Pace(
        launched_at=launched_at, flops_per_image=1e9, num_workers=num_workers, peak_flops=1e11, peak_source="a test"
    )


class Life:
    """A run's files as rank 0 writes them, by a clock that the test sets."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.now = str(folder), 0.0
        monkeypatch.setattr("medim_ray.train.throughput.time.time", lambda: self.now)

    def start(self, at: float, launched_at: float, first_step: int) -> None:
        self.now = at
        records = read_metrics(self.folder)
        kept = [record for record in records if record["step"] < first_step]
        self.meter = Meter(self.folder, pace(launched_at), first_step, kept, records[len(kept) :])
        self.file = JsonLinesFile(self.folder, METRICS, kept)

    def step(self, step: int, seconds: float, **more: Any) -> dict[str, Any]:
        self.now += seconds
        record = {"step": step, "step_s": seconds, "samples_per_s": 8 / seconds, "data_wait_ratio": 0.25, **more}
        full = self.meter.add(record, with_block=step % 2 == 1)
        self.file.write(full)
        return full

    def save(self, seconds: float) -> None:
        self.now += seconds
        self.meter.checkpointed(seconds)


def test_wall_time_is_told_by_what_it_was_spent_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Life(tmp_path, monkeypatch)
    run.start(at=110.0, launched_at=100.0, first_step=0)
    for step in (0, 1):
        run.step(step, 1.0)
    run.save(0.5)
    run.step(2, 1.0)  # at 113.5; the worker is killed, and this step is made again
    run.start(at=133.5, launched_at=100.0, first_step=2)
    run.step(2, 2.0)
    last = run.step(3, 2.0)
    run.save(0.25)
    run.meter.end(4)  # at 137.75: stopped; the same command an hour later
    run.start(at=3805.0, launched_at=3800.0, first_step=4)
    run.step(4, 1.0, omitted="loss is nan")
    run.step(5, 1.0)

    found = throughput(run.folder, read_metrics(run.folder))
    assert found is not None
    assert found["wall_s"] == pytest.approx(37.75 + 7.0)
    assert found["launch_s"] == pytest.approx(10.0 + 5.0) and found["restart_s"] == pytest.approx(20.0)
    assert found["checkpoint_s"] == pytest.approx(0.5 + 0.25), "0.5 s were told with a step that was lost"
    assert found["lost_s"] == pytest.approx(1.0) and found["num_attempts"] == 3
    assert found["goodput"] == pytest.approx((1 + 1 + 2 + 2 + 1) / 44.75), "a step that was left out does not count"
    assert found["num_steps"] == 6 and found["step_s_p50"] == 1.0 and found["step_s_p99"] == pytest.approx(2.0, rel=0.1)
    assert found["samples_per_s"] == pytest.approx(48 / 8) and found["data_wait_ratio"] == pytest.approx(0.25)
    # 8 images a second of 1 GFLOP on two workers of 100 GFLOPS.
    assert read_metrics(run.folder)[0]["mfu"] == pytest.approx(8 * 1e9 / 2e11)
    assert last["throughput"]["wall_s"] == pytest.approx(37.5) and "throughput" not in read_metrics(run.folder)[2]
    assert [event["event"] for event in read_records(run.folder, ATTEMPTS)] == ["start", "start", "end", "start"]


def test_runs_of_older_versions_have_no_block(tmp_path: Path) -> None:
    JsonLinesFile(str(tmp_path), METRICS, [{"step": 0, "step_s": 1.0, "samples_per_s": 8, "data_wait_ratio": 0.1}])
    assert throughput(str(tmp_path), read_metrics(str(tmp_path))) is None
    assert throughput(str(tmp_path), []) is None


def test_without_a_model_of_the_run_there_is_no_utilisation() -> None:
    unknown = Pace(launched_at=0.0, flops_per_image=None, num_workers=1, peak_flops=1.0, peak_source="")
    assert unknown.mfu(10.0) is None


def test_the_peak_is_measured_on_a_cpu_and_looked_up_for_known_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    rate, source = probe.worker_peak(torch.device("cpu"), "fp32")
    assert 1e9 < rate < 1e13 and "measured at the start" in source
    for name in probe.TORCH_NAMES.values():
        assert gpu(name).peak_bf16 > gpu(name).peak_fp32
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    assert probe.worker_peak(torch.device("cuda"), "bf16") == (312e12, "device table, a100-80gb-sxm")
    by_wall_time = probe._device_rate(torch.device("cpu"), "fp32", side=512, seconds=0.05)
    assert 0.02 < by_wall_time / probe.measure_peak_flops("fp32") < 20
