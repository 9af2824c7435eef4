"""The steps of `prepare` without Ray: stopped after any of them, another process goes on to the same bytes."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pytest

from medim_ray.data.encode import PartFacts, RowEncoder
from medim_ray.data.finish import Encoded, Identity, Plan, finish, plan_files
from medim_ray.data.images import BadImageError, ImageEncoder
from medim_ray.data.layout import ShardConfig
from medim_ray.data.listing import final_rows
from medim_ray.data.output import keep_stored, read_stored
from medim_ray.data.shards import DUPLICATES, MANIFEST, QUARANTINE, WORK, ShardSet, verify
from medim_ray.data.sources.base import Sample, plan_table
from medim_ray.data.splits import SplitConfig
from medim_ray.data.vocabulary import VocabularyConfig
from medim_ray.data.work import WorkFolder

NUM, PART = 50, 4
CONFIG = ShardConfig(rows_per_file=8, row_group_rows=4)
IDENTITY = Identity(
    source="rows",
    config_hash="c",
    input_hash="i",
    salt_mark="s",
    rule="keep",
    vocabulary=VocabularyConfig(min_patients=2),
)


class Rows:
    """50 images of 25 patients; number 7 can't be read, 30 is a copy of 3."""

    name = "rows"

    def plan(self) -> pa.Table:
        names = [f"i{k}" for k in range(NUM)]
        patients = [f"p{k // 2}" for k in range(NUM)]
        text = [f"Heart size {k % 4} is normal. No effusion." for k in range(NUM)]
        empty = [""] * NUM
        return plan_table(
            image_id=names, patient_id=patients, location=names, view=empty, report=text, split=empty, labels={}
        )

    def sample(self, row: Mapping[str, Any]) -> Sample:
        number = int(row["image_id"][1:])
        if number == 7:
            raise BadImageError("file not found")
        image = np.random.default_rng(3 if number == 30 else number).integers(0, 256, (24, 20), dtype=np.uint8)
        return Sample(image_HW=image, view="PA", report=row["report"], labels={"age": str(number)})


ROWS = final_rows(Rows().plan(), SplitConfig(), "salt")
NUM_PARTS = -(-NUM // PART)


def encode(work: WorkFolder, numbers: list[int]) -> None:
    encoder = RowEncoder(Rows(), ImageEncoder(ImageEncoder.Config(format="png")))
    for number in numbers:
        work.write_part(number, *encoder(ROWS.slice(number * PART, PART)))


def planned(facts: Mapping[int, PartFacts]) -> Plan:
    return plan_files(Encoded(rows=ROWS, part_rows=PART, facts=facts, is_bound_N=None), "keep", CONFIG, None)


def files_of(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("out")
    work = WorkFolder(fsspec.filesystem("file"), str(root))
    encode(work, list(range(NUM_PARTS)))
    plan = planned(work.parts()[0])
    finish(IDENTITY, plan, {f.path: work.write_file(f, *plan.rows_of(f)) for f in plan.files}, None, work)
    work.remove()
    return root


@pytest.mark.parametrize("seed", range(6))
def test_stopped_at_any_step_it_goes_on_to_the_same_bytes(undisturbed: Path, tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    order = rng.permutation(NUM_PARTS).tolist()
    work = WorkFolder(fsspec.filesystem("file"), str(tmp_path))
    encode(work, order[:5])
    parts = tmp_path / WORK / "parts"
    torn = parts / f"{order[0]:07d}.arrow"
    torn.write_bytes(torn.read_bytes()[:50])
    (parts / f"{order[1]:07d}.json").unlink()  # killed between the rows and the word that they are there

    facts, whole = WorkFolder(work.fs, work.root).parts()
    assert set(facts) == {order[0], *order[2:5]} and whole == set(order[2:5])
    encode(work, sorted(set(range(NUM_PARTS)) - set(facts)))
    facts, whole = work.parts()
    plan = planned(facts)
    encode(work, sorted(plan.parts_of(plan.files) - whole))
    first = [file for file in plan.files if rng.random() < 0.5]
    for file in first:
        work.write_file(file, *plan.rows_of(file))
    rest = [file for file in plan.files if file not in first]
    work.drop_parts(plan.parts_of(first) - plan.parts_of(rest))
    gone = tmp_path / (first[0].path if first else "none")
    if first:
        gone.unlink()  # a file whose entry is there, and which is not

    facts, whole = WorkFolder(work.fs, work.root).parts()
    again = planned(facts)
    assert [file.path for file in again.files] == [file.path for file in plan.files] and len(facts) == NUM_PARTS
    written = work.files(again.files)
    assert set(written) == {file.path for file in first[1:]}
    lost = [file for file in again.files if file.path not in written]
    encode(work, sorted(again.parts_of(lost) - whole))
    written |= {file.path: work.write_file(file, *again.rows_of(file)) for file in lost}
    manifest = finish(IDENTITY, again, written, None, work)
    work.remove()
    assert files_of(tmp_path) == files_of(undisturbed) and verify(str(tmp_path)) == []
    assert (manifest.rows_in, manifest.rows_out, manifest.rows_quarantined) == (50, 49, 1)
    assert (
        manifest.labels["age"] == dict.fromkeys((str(k) for k in range(NUM) if k != 7), 1)
        and (tmp_path / MANIFEST).exists()
    )


def test_lists_that_were_written_anew_before_a_kill_are_read_as_the_manifest_knows_them(
    undisturbed: Path, tmp_path: Path
) -> None:
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    fs, root = fsspec.filesystem("file"), str(tmp_path)
    manifest = ShardSet.open(root).manifest
    stored = read_stored(root, fs, root, manifest)
    assert stored.quarantine["image_id"].to_pylist() == ["i7"] and len(stored.copies) == 1
    keep_stored(WorkFolder(fs, root), stored)
    for name in (QUARANTINE, DUPLICATES):
        (tmp_path / name).write_text("the lists of the rows that were being added")
    again = read_stored(root, fs, root, manifest)
    assert again.quarantine.equals(stored.quarantine) and again.copies == stored.copies
    WorkFolder(fs, root).remove()
    with pytest.raises(ValueError, match=r"quarantine.parquet was changed: restore it"):
        read_stored(root, fs, root, manifest)
