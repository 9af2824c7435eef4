"""The quick start of cluster/README.md, line by line: one spec here, on Ray and on Slurm, the same weights."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from medim_ray.train.checkpoint import load_weights
from medim_ray.train.store import CheckpointStore

pytestmark = [pytest.mark.system, pytest.mark.chaos]
ROOT = Path(__file__).parents[2]
MISSING = [name for name in ("munged", "slurmctld", "slurmd", "curl") if shutil.which(name) is None]


def lines() -> str:
    """The indented lines of the chapter."""
    text = (ROOT / "cluster/README.md").read_text()
    chapter = text.partition("## Quick start")[2].partition("\n## ")[0]
    return "".join(f"{line[4:]}\n" for line in chapter.splitlines() if line.startswith("    "))


@pytest.mark.skipif(bool(MISSING) or os.geteuid() != 0, reason=f"needs root, and {MISSING or 'nothing'} is missing")
def test_one_spec_on_three_targets_gives_the_same_weights_bit_for_bit(tmp_path: Path) -> None:
    work = tmp_path / "work"  # a checkout of its own: the lines write into the current folder
    work.mkdir()
    for name in ("medim_ray", "configs", "jobs", "cluster"):
        shutil.copytree(ROOT / name, work / name, ignore=shutil.ignore_patterns("__pycache__"))
    (work / ".venv").symlink_to(ROOT / ".venv")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "SLURM_", "MEDIM_"))}
    environment = {**kept, "HOME": str(tmp_path), "RAY_TMPDIR": "/tmp/quick-start"}
    script = (
        "set -e\ntrap 'kill $head 2>/dev/null || true; cluster/slurm/two-nodes stop /tmp/two-nodes' EXIT\n" + lines()
    )
    try:
        done = subprocess.run(["bash", "-c", script], cwd=work, env=environment, capture_output=True, text=True)
    finally:
        shutil.rmtree("/tmp/two-nodes", ignore_errors=True)
        shutil.rmtree("/tmp/quick-start", ignore_errors=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    found = {}
    for name in ("on-local", "on-ray", "on-slurm"):
        store = CheckpointStore(str(work / "storage/runs" / name))
        newest = store.newest()
        assert newest is not None and newest.step == 12, name
        found[name] = load_weights(store, newest)
    for name in ("on-ray", "on-slurm"):
        assert found[name].keys() == found["on-local"].keys()
        assert all(torch.equal(found[name][key], found["on-local"][key]) for key in found[name]), name
    sums = {line.split()[0] for line in done.stdout.splitlines() if line.endswith(".safetensors")}
    assert len(sums) == 2, "one checksum a rank"
