"""Rows of a source's plan to rows of a shard: read, resize, encode, split the report, keep the faults. Knows no Ray.

One `RowEncoder` call makes one row group and the facts about it; the same plan rows give the same bytes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import cv2
import numpy as np
import pyarrow as pa

from medim_ray.data.images import BadImageError, Gray, ImageEncoder
from medim_ray.data.shards import SCHEMA, SECTIONS
from medim_ray.data.sources.base import Sample, Source
from medim_ray.reports.sections import split_sections, split_sentences

NO_REPORT, NO_PATIENT = "no_report", "no_patient_id"


@dataclass(kw_only=True)
class Facts:
    """What a run of rows added up to. quarantined: (row of the source, image id, location, reason).

    intensity: [pixels, sum, sum of squares] of training pixels on the scale [0, 1].
    """

    quarantined: list[tuple[int, str, str, str]] = field(default_factory=list)
    labels: dict[str, Counter[str]] = field(default_factory=dict)
    flags: Counter[str] = field(default_factory=Counter)
    intensity: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])

    def add(self, other: Facts) -> None:
        """Adds what `other` counted, in place."""
        self.quarantined += other.quarantined
        for name, counts in other.labels.items():
            self.labels.setdefault(name, Counter()).update(counts)
        self.flags.update(other.flags)
        self.intensity = [a + b for a, b in zip(self.intensity, other.intensity, strict=True)]

    def to_json(self) -> str:
        """Text for `from_json`; numbers survive exactly."""
        return json.dumps(vars(self))

    @classmethod
    def from_json(cls, text: str) -> Facts:
        """The facts that `to_json` wrote."""
        tree = json.loads(text)
        tree["quarantined"] = [tuple(entry) for entry in tree["quarantined"]]
        tree["labels"] = {name: Counter(counts) for name, counts in tree["labels"].items()}
        tree["flags"] = Counter(tree["flags"])
        return cls(**tree)

    def mean_std(self) -> dict[str, float]:
        """Mean and standard deviation of all training pixels; {} where there are none."""
        num, total, squares = self.intensity
        if not num:
            return {}
        return {"mean": total / num, "std": max(squares / num - (total / num) ** 2, 0.0) ** 0.5}


class RowEncoder:
    """Callable: plan rows -> shard rows and facts. Pickled into Ray tasks."""

    def __init__(self, source: Source, image: ImageEncoder) -> None:
        self._source, self._image = source, image

    def __call__(self, plan: pa.Table) -> tuple[pa.Table, Facts]:
        """plan: PLAN_COLUMNS with hashed patients, final splits, `row` (place in the source) and `flags`."""
        cv2.setNumThreads(1)  # one CPU a task is what Ray was asked for
        facts, rows = Facts(), []
        for row in plan.to_pylist():
            try:
                sample = self._source.sample(row)
            except BadImageError as error:
                facts.quarantined.append((row["row"], row["image_id"], row["location"], str(error)))
                continue
            image_HW = self._image.prepare(sample.image_HW)
            if row["split"] == "train":
                _count_pixels(facts, image_HW)
            rows.append(self._shard_row(row, sample, image_HW))
            facts.flags.update(rows[-1]["flags"])
            for name, value in rows[-1]["labels"]:
                facts.labels.setdefault(name, Counter())[value] += 1
        return pa.Table.from_pylist(rows, schema=SCHEMA), facts

    def _shard_row(self, row: Mapping[str, Any], sample: Sample, image_HW: Gray) -> dict[str, Any]:
        sections = asdict(split_sections(sample.report))
        report = report_text(sections)
        sentences = [sentence.text for sentence in split_sentences(report)]
        flags = [*row["flags"], *sample.flags, *([] if report else [NO_REPORT])]
        encoded = self._image.encode(image_HW)
        truth = [
            {
                "finding": lesion.finding,
                "side": lesion.side,
                "zone": lesion.zone,
                "sentence": sentences.index(lesion.sentence) if lesion.sentence else -1,
                "mask": self._image.encode_mask(lesion.mask_HW),
            }
            for lesion in sample.truth
        ]
        return {
            "image_id": row["image_id"],
            "patient_id": row["patient_id"],
            "split": row["split"],
            "source": self._source.name,
            "view": sample.view,
            "image": encoded.data,
            "height": encoded.height,
            "width": encoded.width,
            "bits": encoded.bits,
            "report": report,
            "sections": {name: sections[name] for name in SECTIONS},
            "sentences": sentences,
            "labels": sorted(sample.labels.items()),
            "truth": truth,
            "flags": sorted(set(flags)),
        }


def report_text(sections: Mapping[str, str]) -> str:
    """What a text encoder reads: findings and impression (MedIM's choice), or the body where neither has a heading."""
    parts: Iterable[str] = (sections["findings"], sections["impression"])
    text = "\n\n".join(part for part in parts if part)
    return text or sections["body"]


def _count_pixels(facts: Facts, image_HW: Gray) -> None:
    top = float(np.iinfo(image_HW.dtype).max)
    values = image_HW.astype(np.uint64)  # sums stay exact: 2**32 pixels of 16 bits fit
    num, total, squares = values.size, int(values.sum()), int((values * values).sum())
    facts.intensity = [a + b for a, b in zip(facts.intensity, (num, total / top, squares / top**2), strict=True)]
