"""Plan rows to shard rows: faults leave, texts are cut, truth counts in the stored sentences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from medim_ray.data.encode import PartFacts, RowCounts, RowEncoder, mean_std, pixel_sums, pooled, report_text
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
    assert table["image_id"].to_pylist() == ["i0", "i2", "i3"] and facts.places == [0, 2, 3]
    assert facts.quarantined == [(1, "i1", "/x/1", "file not found")]
    assert table["flags"].to_pylist() == [[], ["no_report"], ["no_report"]]
    assert dict(table["labels"].to_pylist()[0]) == {"age": "5", "view": "PA"}
    assert decode(table["image"][1].as_py())[0, 0] == 100
    assert table["pixel_hash"].to_pylist() == facts.pixel_hash and len(set(facts.pixel_hash)) == 3
    counts = RowCounts()
    counts.count(table)
    counts.add({"no_report": 1}, {"age": {"6": 2}})
    assert counts.flags == {"no_report": 3} and counts.labels == {"view": {"PA": 3}, "age": {"5": 3, "6": 2}}


def test_facts_survive_json() -> None:
    _, facts = RowEncoder(Rows(), ImageEncoder(ImageEncoder.Config()))(plan(["a", "b", "c"]))
    again = PartFacts.from_json(facts.to_json())
    assert again.quarantined == facts.quarantined and [tuple(sums) for sums in again.pixel_sums] == facts.pixel_sums


def test_mean_and_deviation_are_those_of_all_pixels_of_both_depths() -> None:
    rng = np.random.default_rng(0)
    images: list[Any] = [rng.integers(0, 256, (40, 50 + k), dtype=np.uint8) for k in range(3)]
    images += [rng.integers(0, 65536, (60, 40), dtype=np.uint16)]
    sums = np.array([pixel_sums(image) for image in images])
    pixels = np.concatenate([image.ravel() / np.iinfo(image.dtype).max for image in images])
    expected = {"mean": pixels.mean(), "std": pixels.std(), "pixels": pixels.size}
    assert mean_std(sums) == pytest.approx(expected) and mean_std(sums) == mean_std(sums[::-1])
    assert pooled([mean_std(sums[:2]), {}, mean_std(sums[2:])]) == pytest.approx(expected)
    assert mean_std(sums[:0]) == {} == pooled([])


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
