"""What is sent with a job: excludes, .gitignore, a stable archive, and a limit that names the largest files."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest

from medim_ray.submit.ray_jobs import _pack
from medim_ray.submit.spec import load_spec
from medim_ray.submit.upload import files_to_send, pack


def folder(tmp_path: Path) -> Path:
    work = tmp_path / "work"
    for name in ("a.py", "sub/b.py", "sub/big.bin", "sub/.gitignore", ".git/HEAD", "runs/r/x", "keep.log", "drop.log"):
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_text(name)
    (work / ".gitignore").write_text("*.log\n!keep.log\n")
    (work / "sub/.gitignore").write_text("big.bin\n")
    return work


def test_excludes_and_ignore_files_hold_at_every_level(tmp_path: Path) -> None:
    work = folder(tmp_path)
    names = [path.relative_to(work).as_posix() for path in files_to_send(work, [".git", "runs"])]
    assert names == [".gitignore", "a.py", "keep.log", "sub/.gitignore", "sub/b.py"]
    with pytest.raises(ValueError, match="no such folder"):
        files_to_send(tmp_path / "none", [])


def test_storage_inside_the_folder_and_files_of_keys_stay_here(tmp_path: Path) -> None:
    work = folder(tmp_path)
    (work / ".env").write_text("KEY=planted")
    (work / "mine").mkdir()
    (work / "mine/reports.parquet").write_text("planted")
    spec = load_spec(
        Path(__file__).parents[3] / "jobs/doctor.yaml",
        ["target=ray", f"environment.working_dir={work}", f"storage.root={work / 'mine'}"],
    )
    assert "5 files of" in _pack(spec, tmp_path / "x.zip")
    assert not {".env", "mine/reports.parquet"} & set(zipfile.ZipFile(tmp_path / "x.zip").namelist())


def test_the_same_files_are_the_same_archive(tmp_path: Path) -> None:
    work = folder(tmp_path)
    lines = [pack(work, [".git"], 1, tmp_path / f"{i}.zip") for i in range(2)]
    assert lines[0] == lines[1] and (tmp_path / "0.zip").read_bytes() == (tmp_path / "1.zip").read_bytes()
    assert zipfile.ZipFile(tmp_path / "0.zip").read("sub/b.py") == b"sub/b.py"


@pytest.mark.parametrize("num_bytes", [1_500_000, 6_000_000])
def test_over_the_limit_names_the_largest_files(tmp_path: Path, num_bytes: int) -> None:
    work = folder(tmp_path)
    (work / "weights.bin").write_bytes(np.random.default_rng(0).bytes(num_bytes))
    with pytest.raises(ValueError, match=r"over ray.max_upload_mb=1. The largest files: weights.bin \(") as refused:
        pack(work, [], 1, tmp_path / "x.zip")
    assert "environment.excludes" in str(refused.value)
    pack(work, ["weights.bin"], 1, tmp_path / "x.zip")
    (work / "zeros.bin").write_bytes(bytes(3_000_000))
    pack(work, ["weights.bin"], 1, tmp_path / "x.zip")  # what counts is what is sent
