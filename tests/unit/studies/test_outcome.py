"""What a run came to: the numbers of metrics.jsonl and result.json by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from medim_ray.studies.outcome import check_metric, needs_probe, outcome_of


def test_the_numbers_of_a_run_have_names(tmp_path: Path) -> None:
    records = [
        {
            "step": i,
            "loss": 20.0 - i,
            "step_s": 0.5,
            "samples_per_s": 16.0,
            "data_wait_ratio": 0.0,
            "peak_bytes": 1e9 + i,
        }
        for i in range(20)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    estimate = {"value": 0.7, "low": 0.6, "high": 0.8}
    gain = {"value": 0.1, "low": 0.0, "high": 0.2}
    linear = {"auroc": estimate, "auprc": estimate}
    facts: dict[str, Any] = {
        "encoders": {"trained": linear},
        "trained_minus_untrained": {"auroc": gain, "auprc": estimate},
    }
    facts["fractions"] = [{"fraction": 0.01, **facts}]
    facts["knn"] = {"encoders": {"trained": linear}, "trained_minus_untrained": {"auroc": gain, "auprc": gain}}

    def named(metric: str) -> dict[str, Any]:
        return {"encoders": {"trained": {metric: estimate}}, "trained_minus_untrained": {metric: gain}}

    maps = {
        "trained": {"map_auroc": estimate, "lesion_lift": estimate},
        "both": {"map_auroc": estimate, "lesion_lift": estimate},
    }
    result = {
        "labels": {"view": facts},
        "mean": facts,
        "regression": {"age": named("mae")},
        "segmentation": {"targets": {"pneumothorax": named("dice")}},
        "retrieval": {"directions": {"image_to_report": named("recall_at_10")}},
        "zero_shot": {"labels": {"edema": named("auroc")}, "mean": None},
        "localisation": {"strategies": {"kdm": maps}},
    }
    (tmp_path / "result.json").write_text(json.dumps(result))
    outcome = outcome_of(str(tmp_path), 20, probed=True)
    assert outcome.numbers["loss"].value == pytest.approx(1.5), "the last tenth of the steps"
    assert outcome.numbers["peak_gb"].value == pytest.approx(1.0, rel=1e-6)
    assert outcome.numbers["lesion_lift.kdm.both"].low == 0.6 and outcome.gains["auroc.mean"].high == 0.2
    beyond = {"auroc@0.01.view", "knn_auroc.mean", "mae.age", "dice.pneumothorax", "recall_at_10.image_to_report"}
    assert beyond | {"zero_shot_auroc.edema"} <= outcome.numbers.keys()
    assert outcome.gains["dice.pneumothorax"].value == 0.1
    assert "auroc.mean" not in outcome_of(str(tmp_path), 20, probed=False).numbers
    for name in outcome.numbers:
        check_metric(name, "metric")


def test_a_metric_that_no_run_reports_is_refused() -> None:
    with pytest.raises(ValueError, match=r"metric='aucroc.mean'.*did you mean 'auroc.mean'"):
        check_metric("aucroc.mean", "metric")
    assert needs_probe(["loss", "lesion_lift.kdm"]) and not needs_probe(["loss", "samples_per_s"])
