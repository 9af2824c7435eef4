"""Two runs compared from what their probes left: paired, on the same shards and images, or refused with the reason."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from rich.console import Console

from medim_ray.cli import main
from medim_ray.probes.classify import probe
from medim_ray.probes.compare import CompareOptions, CompareRoot, run_compare
from medim_ray.probes.regress import regress
from medim_ray.probes.results import label_results, read_scores, write_result, write_scores
from medim_ray.probes.rows import RowList
from medim_ray.probes.scoring import AnyScores, AnyTask
from medim_ray.probes.tasks import NumberTask, Task

NUM = 180
OPTIONS: dict[str, Any] = {"num_folds": 3, "num_bootstrap": 50, "seed": 0}


def _rows() -> RowList:
    names = tuple(f"image-{i:03d}" for i in range(NUM))
    return RowList(
        image_ids=names,
        patient_ids=tuple(f"p{i // 2}" for i in range(NUM)),
        splits=("train",) * NUM,
        sources=("made",) * NUM,
        labels=({},) * NUM,
        place_K3=np.zeros((NUM, 3), dtype=np.int64),
    )


def _probed(folder: Path, signal: float, labels: tuple[str, ...], data_hash: str = "d", num: int = NUM) -> str:
    """A run folder as a probe leaves it, its features knowing the labels by `signal`."""
    rng = np.random.default_rng(0)
    y, noise = rng.integers(0, 2, NUM), rng.normal(size=(NUM, 6))
    age = 50 + 10 * y + rng.normal(size=NUM)
    rows, own = _rows(), np.arange(num)
    scores: dict[str, dict[str, AnyScores]] = {}
    tasks: list[AnyTask] = []
    for label in labels:
        groups = (rows.patient_ids[:num], rows.splits[:num])
        features = noise[:num] + signal * y[:num, None]
        task: AnyTask = Task(label=label, classes=("0", "1"), rows_K=own, y_K=y[:num])
        if label == "age":
            task = NumberTask(label=label, rows_K=own, values_K=age[:num])
        tasks.append(task)
        scores[label] = dict.fromkeys(("trained", "untrained"), _scores(task, features, groups))
    run = str(folder)
    folder.mkdir(parents=True)
    facts = {"data_hash": data_hash, "run_hash": folder.name, "checkpoint": "step-1", "seed": 0, "num_folds": 3}
    write_result(run, {**facts, **label_results(tasks, scores)})
    write_scores(run, tasks, rows, scores)
    return run


def _scores(task: AnyTask, features: NDArray[np.float64], groups: tuple[Any, Any]) -> AnyScores:
    return probe(task, features, *groups, **OPTIONS) if isinstance(task, Task) else regress(
        task, features, *groups, **OPTIONS
    )  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("runs")
    return _probed(folder / "a", 0.6, ("edema", "tube", "age")), _probed(folder / "b", 0.2, ("age", "edema", "tube"))


def test_the_better_run_is_told_apart_and_the_file_says_what_the_table_says(
    runs: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "difference.json"
    assert main(["probe", "compare", *runs, "probe.num_bootstrap=200", f"out={out}"]) == 0
    printed = capsys.readouterr().out
    found = json.loads(out.read_text())
    assert list(found["labels"]) == ["age", "edema", "tube"] and "mean of the classes" in printed
    for numbers in (found["labels"]["edema"]["auroc"], found["mean"]["auprc"], found["labels"]["age"]["r2"]):
        assert 0 < numbers["a_minus_b"]["low"] < numbers["a_minus_b"]["value"] < numbers["a_minus_b"]["high"]
        assert numbers["a"]["value"] - numbers["b"]["value"] == pytest.approx(numbers["a_minus_b"]["value"])
        assert f"{numbers['a_minus_b']['value']:.3f} [" in printed
    assert found["labels"]["age"]["mae"]["a_minus_b"]["high"] < 0 and found["notes"] == []
    paired = found["labels"]["edema"]["auroc"]
    widths = [paired[key]["high"] - paired[key]["low"] for key in ("a", "b", "a_minus_b")]
    assert widths[2] < np.hypot(widths[0], widths[1]), "the difference is paired by patient"


def test_a_run_against_itself_differs_by_exactly_nothing(runs: tuple[str, str]) -> None:
    out = io.StringIO()
    options = CompareRoot(probe=CompareOptions(labels=("tube",), num_bootstrap=100))
    found = run_compare((runs[0], runs[0]), options, Console(file=out, width=160))
    assert found["labels"]["tube"]["auroc"]["a_minus_b"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert list(found["labels"]) == ["tube"] and out.getvalue().count("*") == 1, "the star of the caption only"


def test_what_cannot_be_compared_is_refused_with_the_reason(runs: tuple[str, str], tmp_path: Path) -> None:
    other_data = _probed(tmp_path / "c", 0.2, ("tube",), data_hash="e")
    other_images = _probed(tmp_path / "d", 0.2, ("tube",), num=NUM - 20)
    other_label = _probed(tmp_path / "e", 0.2, ("view",))
    (tmp_path / "f").mkdir()
    for pair, labels, message in (
        ((runs[0], other_data), (), "other shards"),
        ((runs[0], other_images), (), "judged on other images"),
        ((runs[0], other_label), (), "no probed label in common"),
        (runs, ("sex",), "was not probed for 'sex'; it has age, edema, tube"),
        ((runs[0], str(tmp_path / "f")), (), "was not probed"),
        ((runs[0],), (), "two run folders"),
    ):
        with pytest.raises(ValueError, match=message):
            run_compare(pair, CompareRoot(probe=CompareOptions(labels=labels, num_bootstrap=100)), Console(quiet=True))


def test_scores_hold_every_image_once_an_encoder_and_no_more_than_hashes(runs: tuple[str, str]) -> None:
    table = read_scores(runs[0]).to_pandas()
    assert len(table) == 3 * 2 * NUM and table.groupby(["label", "encoder", "image_id"]).size().max() == 1
    assert set(table.columns) == {"label", "encoder", "image_id", "patient_id", "class", "scores"}


def test_a_probe_without_labels_leaves_no_scores_of_an_earlier_one(tmp_path: Path) -> None:
    run = _probed(tmp_path / "run", 0.2, ("tube",))
    write_scores(run, [], _rows(), {})
    assert [file.name for file in Path(run).iterdir()] == ["result.json"]
    with pytest.raises(ValueError, match=r"has no probe_scores\.parquet"):
        read_scores(run)
