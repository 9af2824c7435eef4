"""The line of a step that a user sees."""

from __future__ import annotations

from medim_ray.train.progress import describe


def test_the_line_tells_loss_rate_and_terms_and_leaves_seconds_and_details_out() -> None:
    record = {"step": 1, "loss": 2.0, "samples_per_s": 3.0, "data_wait_ratio": 0.01, "step_s": 1.0, "stream_cpu_s": 0.1}
    assert describe({**record, "acc1": 0.5, "maps/kdm/map_auroc": 0.6, "broken_rows": 0}) == (
        "loss 2 3.0 samples/s wait 1% acc1 0.5"
    )
    assert describe({"step": 1, "omitted": "loss is nan"}) == "left out: loss is nan"
