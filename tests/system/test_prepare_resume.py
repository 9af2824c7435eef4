"""`prepare` killed, run twice at once, out of space, given more rows: the set is what an undisturbed job writes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
from PIL import Image

from medim_ray.data.images import ImageEncoder
from medim_ray.data.ingest import PrepareConfig, ShardConfig, prepare
from medim_ray.data.shards import DUPLICATES, MANIFEST, WORK, ShardSet, verify
from medim_ray.data.sources import SOURCES

pytestmark = pytest.mark.system
NUM, OLD = 120, 100
COPIES = {31: 30, 62: 5, 110: 7}  # image -> the one that it is a copy of, of another patient


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 images of 60 patients, some of them copies or broken; first.csv lists 100 of them."""
    root = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    lines = ["image_id,patient_id,file,view,sex,age,notes"]
    images = [Image.fromarray(rng.integers(0, 256, (400, 500), dtype=np.uint8)) for _ in range(NUM)]
    for k in range(NUM):
        images[COPIES.get(k, k)].save(root / f"{k}.png", compress_level=k % 9)
        lines.append(f"i{k},p{k // 2},{k}.png,PA,F,{k},Heart size {k} is normal. No effusion.")
    (root / "11.png").unlink()
    (root / "105.png").write_text("no image")
    (root / "all.csv").write_text("\n".join(lines) + "\n")
    (root / "first.csv").write_text("\n".join(lines[: OLD + 1]) + "\n")
    return root


OPTIONS = {"image.longest_side": 160, "shards.rows_per_file": 8, "shards.row_group_rows": 4, "salt": "pepper"}


def config(corpus: Path, out: Path, table: str = "all.csv", **options: Any) -> PrepareConfig:
    return PrepareConfig(
        source=SOURCES["csv"].Config(path=str(corpus / table)),
        out=str(out),
        image=ImageEncoder.Config(longest_side=160),
        shards=ShardConfig(rows_per_file=8, row_group_rows=4),
        salt="pepper",
        **options,
    )


def start(corpus: Path, out: Path, address: str) -> subprocess.Popen[str]:
    """The same job in a process of its own; address: the Ray that it joins, '' for one of its own."""
    options = [f"{key}={value}" for key, value in OPTIONS.items()]
    command = [
        sys.executable,
        "-m",
        "medim_ray.cli",
        "prepare",
        f"source.path={corpus}/all.csv",
        f"out={out}",
        *options,
    ]
    env = {**os.environ, **({"RAY_ADDRESS": address} if address else {})}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def files_of(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def wait_for(what: Callable[[], bool], job: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not what():
        assert job.poll() is None and time.monotonic() < deadline, job.communicate()[0]
        time.sleep(0.002)


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    prepare(config(corpus, out))
    return out


def test_killed_while_encoding_and_while_writing_it_goes_on_to_the_same_bytes(
    corpus: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out, address = tmp_path / "out", ray.get_runtime_context().gcs_address
    parts, entries = out / WORK / "parts", out / WORK / "files"
    with start(corpus, out, address) as job:
        wait_for(lambda: len(list(parts.glob("*.json"))) >= 5, job)
        with pytest.raises(ValueError, match=rf"being written by another job \(process {job.pid} on"):
            prepare(config(corpus, out))
        job.kill()
    assert not (out / MANIFEST).exists()
    encoded = {path: path.stat().st_mtime_ns for path in parts.glob("*.json")}
    with pytest.raises(
        ValueError, match=r"unfinished `prepare` with other options \(duplicates was 'keep', is 'skip'\)"
    ):
        prepare(config(corpus, out, duplicates="skip"))
    text = (corpus / "all.csv").read_text()
    try:
        (corpus / "all.csv").write_text(text.replace("Heart size 3 is", "Heart size 3 was"))
        with pytest.raises(ValueError, match="unfinished `prepare` of the same options, but the rows"):
            prepare(config(corpus, out))
    finally:
        (corpus / "all.csv").write_text(text)
    with start(corpus, out, address) as job:
        wait_for(lambda: len(list(entries.glob("*.json"))) >= 2, job)
        job.kill()
    assert all(path.stat().st_mtime_ns == encoded[path] for path in encoded)
    listed = {path.stem.replace("-", "/") for path in entries.glob("*.json")}  # others are written anew
    written = {out / f"{name}.parquet": (out / f"{name}.parquet").stat().st_mtime_ns for name in listed}
    torn = min((out / WORK / "parts").glob("*.arrow"))
    torn.write_bytes(torn.read_bytes()[:100])  # as a disk might after a power cut
    summary = prepare(config(corpus, out))
    assert any(f"went on with an unfinished job: {NUM} of {NUM} rows" in notice for notice in summary.notices)
    assert len(written) >= 2 and all(path.stat().st_mtime_ns == before for path, before in written.items())
    assert files_of(out) == files_of(undisturbed)


def test_copies_lie_in_one_split_and_every_row_is_counted_once(corpus: Path, undisturbed: Path, tmp_path: Path) -> None:
    rows = {row["image_id"]: row for row in ShardSet.open(str(undisturbed)).read_rows().to_pylist()}
    groups = json.loads((undisturbed / DUPLICATES).read_text())["exact"]
    expected = sorted(sorted((f"i{a}", f"i{b}")) for a, b in COPIES.items())
    assert sorted(sorted(group["images"]) for group in groups) == expected
    for copy, original in COPIES.items():
        assert rows[f"i{copy}"]["split"] == rows[f"i{original}"]["split"]
        assert rows[f"i{copy}"]["pixel_hash"] == rows[f"i{original}"]["pixel_hash"]
    assert len({(row["patient_id"], row["split"]) for row in rows.values()}) == NUM // 2
    summary = prepare(config(corpus, tmp_path / "out", duplicates="skip"))
    assert (sum(summary.splits.values()), sum(summary.quarantine.values()), summary.skipped) == (115, 2, 3)
    assert summary.lines()[-1].startswith("120 rows in = 115 in shards (train ")
    assert summary.lines()[-1].endswith(" + 2 in quarantine + 3 skipped as duplicates")
    table = ShardSet.open(str(tmp_path / "out")).read_rows()
    assert len(set(table["pixel_hash"].to_pylist())) == table.num_rows == 115


@pytest.mark.parametrize("rule", ["skip", pytest.param("keep", marks=pytest.mark.chaos)])
def test_added_rows_make_new_files_only(corpus: Path, tmp_path: Path, ray_session: None, rule: Any) -> None:
    out = tmp_path / "out"
    (tmp_path / "all.csv").write_text((corpus / "first.csv").read_text())
    source = SOURCES["csv"].Config(path=str(tmp_path / "all.csv"), image_root=str(corpus))
    job = PrepareConfig(
        source=source, out=str(out), shards=ShardConfig(rows_per_file=8, row_group_rows=4), salt="x", duplicates=rule
    )
    first = prepare(job)
    assert first.rows_in == OLD
    before = files_of(out)
    (tmp_path / "all.csv").write_text((corpus / "all.csv").read_text())
    second = prepare(job)
    after = files_of(out)
    shared = {name for name in before if name.endswith(".parquet") and "/" in name}
    assert (
        all(after[name] == before[name] for name in shared)
        and before["tokenizer/vocab.txt"] == after["tokenizer/vocab.txt"]
    )
    assert any(notice.startswith(f"added 20 new rows to the {OLD} that were there: ") for notice in second.notices)
    assert second.rows_in == NUM and sum(second.quarantine.values()) == 2 and second.skipped == 3 * (rule == "skip")
    assert verify(str(out)) == [] and prepare(job).already_prepared
    rows = {row["image_id"]: row for row in ShardSet.open(str(out)).read_rows().to_pylist()}
    groups = json.loads((out / DUPLICATES).read_text())["exact"]
    assert len(groups) == 3 and sorted(name for g in groups for name in g["skipped"]) == (
        [] if rule == "keep" else sorted({name for g in groups for name in g["images"]} - rows.keys())
    )
    assert len({row["patient_id"] for row in rows.values()}) == len(
        {(r["patient_id"], r["split"]) for r in rows.values()}
    )
    intensity = ShardSet.open(str(out)).manifest.intensity
    assert (
        intensity["mean"] == pytest.approx(0.5, abs=0.01) and intensity["pixels"] == 500 * 400 * second.splits["train"]
    )
    text = (tmp_path / "all.csv").read_text()
    (tmp_path / "all.csv").write_text(text.replace("Heart size 3 is", "Heart size 3 was"))
    with pytest.raises(ValueError, match="rows of the source have changed"):
        prepare(job)
    min(out.glob("train/*.parquet")).unlink()
    (tmp_path / "all.csv").write_text(text)
    with pytest.raises(ValueError, match=r"train/00000.parquet is missing.*medim-ray shards verify"):
        prepare(job)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of half a megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)], capture_output=True)
    if made.returncode:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_said_so_and_with_space_it_goes_on(corpus: Path, undisturbed: Path, small_disk: Path) -> None:
    out = small_disk / "out"
    with pytest.raises(RuntimeError, match=r"can't be used: No space left on device; what was done is kept: .*go on"):
        prepare(config(corpus, out))
    assert not (out / MANIFEST).exists()
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    summary = prepare(config(corpus, out))
    assert any("went on with an unfinished job" in notice for notice in summary.notices)
    assert files_of(out) == files_of(undisturbed)


@pytest.mark.chaos
def test_killed_at_any_moment_with_everything_that_it_started(corpus: Path, undisturbed: Path, tmp_path: Path) -> None:
    moments = random.Random(0)
    for number in range(6):
        out, kills = tmp_path / f"out{number}", 0
        while not (out / MANIFEST).exists() and kills < 12:
            with start(corpus, out, address="") as job:
                time.sleep(moments.uniform(4, 14))
                everything = [psutil.Process(job.pid), *psutil.Process(job.pid).children(recursive=True)]
                for process in everything:
                    if process.is_running():
                        process.send_signal(signal.SIGKILL)
                psutil.wait_procs(everything[1:], timeout=20)
            kills += 1
        prepare(config(corpus, out))
        assert files_of(out) == files_of(undisturbed), f"{kills} kills"
