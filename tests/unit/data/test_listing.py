"""The rows of a job: in the order of a hash, told apart from changed ones, and a million of them in little memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from medim_ray.data.listing import final_rows, image_keys, rows_hash
from medim_ray.data.sources.base import plan_table
from medim_ray.data.splits import SPLITS, SplitConfig, hash_patient

MEASURE = """
import json, resource, sys, time
import pyarrow as pa
from medim_ray.data.listing import final_rows, little_memory, rows_hash
from medim_ray.data.sources import SOURCES
from medim_ray.data.splits import SplitConfig
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before, start = peak(), time.process_time()
with little_memory():
    source = SOURCES["csv"](SOURCES["csv"].Config(path=sys.argv[1], image_root="/data"))
    rows = final_rows(source.plan(), SplitConfig(), "salt")
    rows_hash(rows)
print(json.dumps([rows.num_rows, time.process_time() - start, peak() - before]))
"""


def plan(names: list[str], **columns: Any) -> pa.Table:
    empty = [""] * len(names)
    default = dict.fromkeys(("patient_id", "location", "view", "report", "split"), empty)
    labels = {"age": [None if k % 2 else str(k) for k in range(len(names))], "none": [None] * len(names)}
    return plan_table(**{"image_id": names, **default, "labels": labels, **columns})


def test_rows_lie_by_split_and_key_and_keep_what_the_source_said() -> None:
    names = [f"Bild {k} ü" for k in range(300)]
    patients = [f"p{k // 3}" if k < 270 else "" for k in range(300)]
    table = final_rows(plan(names, patient_id=patients, report=[f"r{k}" for k in range(300)]), SplitConfig(), "salt")
    splits = [SPLITS.index(split) for split in table["split"].to_pylist()]
    assert splits == sorted(splits) and set(splits) == {0, 1, 2}
    keys = table["key"].to_numpy()
    assert all((np.diff(keys[np.array(splits) == s].astype(object)) > 0).all() for s in range(3))
    assert (keys == image_keys(table["image_id"])).all()
    for row in table.to_pylist():
        k = row["row"]
        assert (row["image_id"], row["report"]) == (names[k], f"r{k}")
        assert row["patient_id"] == hash_patient(patients[k] or f"image {names[k]}", "salt")
        assert row["flags"] == ([] if patients[k] else ["no_patient_id"]) and not row["is_given"]


def test_ids_that_are_there_twice_are_named() -> None:
    with pytest.raises(ValueError, match=r"2 image ids are not unique: 'a' \(2 rows\), 'b' \(3 rows\)\. Remove"):
        final_rows(plan(["a", "b", "a", "b", "c", "b"]), SplitConfig(), "")


def test_the_hash_knows_content_not_order_places_or_empty_labels() -> None:
    names = [f"i{k}" for k in range(20)]
    same = rows_hash(final_rows(plan(names), SplitConfig(), ""))
    longer = final_rows(plan([*names, "z"]), SplitConfig(), "")
    assert rows_hash(longer.filter(pa.compute.not_equal(longer["image_id"], "z"))) == same
    assert rows_hash(longer) != same
    turned = plan(names).take(pa.array(range(19, -1, -1)))
    assert rows_hash(final_rows(turned, SplitConfig(), "")) == same
    for change in ({"report": ["x", *[""] * 19]}, {"view": [*[""] * 19, "PA"]}, {"location": ["x"] * 20}):
        assert rows_hash(final_rows(plan(names, **change), SplitConfig(), "")) != same


def test_a_million_rows_take_seconds_and_less_than_300_mb(tmp_path: Path) -> None:
    path = tmp_path / "million.csv"
    with path.open("w") as file:
        file.write("image_id,patient_id,file,view,sex,age,notes\n")
        for k in range(1_000_000):
            file.write(
                f"i{k:07d},p{k // 3:07d},images/p{k // 3:07d}/i{k:07d}.png,PA,F,{k % 90},No finding {k % 999}.\n"
            )
    found = subprocess.run([sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, check=True)
    num_rows, cpu_s, peak_mb = json.loads(found.stdout)
    assert num_rows == 1_000_000 and cpu_s < 10 and peak_mb < 300
