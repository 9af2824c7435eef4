"""Plan rows to shard rows: faults leave, texts are cut, truth counts in the stored sentences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from medim_ray.data.encode import Facts, RowEncoder, report_text
from medim_ray.data.images import BadImageError, ImageEncoder, decode, decode_mask
from medim_ray.data.sources import SOURCES
from medim_ray.data.sources.base import Sample
from medim_ray.reports.sections import split_sentences


class Rows:
    """A source whose pixels are the row's number."""

    name = "rows"

    def plan(self) -> pa.Table:
        raise NotImplementedError

    def sample(self, row: Mapping[str, Any]) -> Sample:
        if row["row"] == 1:
            raise BadImageError("file not found")
        image = np.full((40, 60), row["row"] * 50, dtype=np.uint8)
        return Sample(image_HW=image, view="PA", report=row["report"], labels={"view": "PA", "age": "5"})


def plan(reports: list[str], split: str = "train") -> pa.Table:
    return pa.table(
        {
            "row": pa.array(range(len(reports)), pa.int64()),
            "image_id": [f"i{k}" for k in range(len(reports))],
            "patient_id": ["p"] * len(reports),
            "location": [f"/x/{k}" for k in range(len(reports))],
            "report": reports,
            "split": [split] * len(reports),
            "flags": pa.array([[]] * len(reports), pa.list_(pa.string())),
        }
    )


def test_a_bad_row_leaves_and_is_counted() -> None:
    reports = ["Heart: normal. FINDINGS: No edema. IMPRESSION: Normal.", "x", "", "COMPARISON: none."]
    table, facts = RowEncoder(Rows(), ImageEncoder(ImageEncoder.Config(format="png")))(plan(reports))
    assert table["image_id"].to_pylist() == ["i0", "i2", "i3"]
    assert facts.quarantined == [(1, "i1", "/x/1", "file not found")]
    assert table["flags"].to_pylist() == [[], ["no_report"], ["no_report"]]
    assert facts.flags == {"no_report": 2} and facts.labels == {"view": {"PA": 3}, "age": {"5": 3}}
    assert dict(table["labels"].to_pylist()[0]) == {"age": "5", "view": "PA"}
    assert decode(table["image"][1].as_py())[0, 0] == 100
    pixels = np.repeat([0.0, 100.0, 150.0], 2400) / 255
    assert facts.mean_std() == pytest.approx({"mean": pixels.mean(), "std": pixels.std()})


def test_only_training_pixels_count() -> None:
    _, facts = RowEncoder(Rows(), ImageEncoder(ImageEncoder.Config()))(plan(["a"], split="val"))
    assert facts.mean_std() == {}


def test_facts_survive_json_and_add_up() -> None:
    _, one = RowEncoder(Rows(), ImageEncoder(ImageEncoder.Config()))(plan(["a", "b", "c"]))
    total = Facts()
    total.add(Facts.from_json(one.to_json()))
    assert total == one
    total.add(one)
    assert total.intensity[0] == 2 * one.intensity[0] and len(total.quarantined) == 2


def test_the_text_is_findings_and_impression_or_the_body() -> None:
    sections = {"findings": "F.", "impression": "I.", "indication": "X.", "comparison": "Y.", "body": "B."}
    assert report_text(sections) == "F.\n\nI."
    assert report_text({**sections, "findings": "", "impression": ""}) == "B."
    assert report_text({**sections, "findings": ""}) == "I."


def test_phantom_truth_counts_in_the_stored_sentences() -> None:
    source = SOURCES["phantom"](SOURCES["phantom"].Config(num_images=16, size=64))
    rows = source.plan()
    extra = plan([""] * 16).select(["row", "split", "flags"])
    for name in extra.column_names:
        rows = (rows.drop_columns([name]) if name in rows.column_names else rows).append_column(name, extra[name])
    table, _ = RowEncoder(source, ImageEncoder(ImageEncoder.Config(longest_side=32)))(rows)
    stored = table.to_pylist()
    lesions = [(row, lesion) for row in stored for lesion in row["truth"]]
    assert len(lesions) >= 8
    for row in stored:
        assert row["sentences"] == [s.text for s in split_sentences(row["report"])]
        assert (row["height"], row["width"]) == (32, 32) == decode(row["image"]).shape
    for row, lesion in lesions:
        sample = source.sample(next(r for r in rows.to_pylist() if r["image_id"] == row["image_id"]))
        truth = next(
            t
            for t in sample.truth
            if (t.finding, t.side, t.zone) == (lesion["finding"], lesion["side"], lesion["zone"])
        )
        assert row["sentences"][lesion["sentence"]] == truth.sentence
        assert decode_mask(lesion["mask"]).shape == (32, 32)
