"""Planted secrets, report text and patient names, looked for in everything that a prepare, a run and its jobs write."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest

from medim_ray.cli import main

pytestmark = [pytest.mark.system, pytest.mark.chaos]
ROOT = Path(__file__).parents[2]
SECRETS = {
    "MEDIM_RAY_SALT": "planted-salt-51c7",
    "AWS_SECRET_ACCESS_KEY": "planted-key-e2b8",
    "MY_KEY": "planted-file-77aa",
}
NAME, WORD = "Quartermain-Zebulon", "xylographically"
SENTENCE = f"Mr. {NAME} {WORD} presents with a small left pleural effusion."


def corpus(folder: Path) -> Path:
    """48 images with reports of as many patients; one report names its patient, every patient id does."""
    rng = np.random.default_rng(3)
    rows = []
    for i in range(48):
        name = f"{folder}/{i}.png"
        cv2.imwrite(name, rng.integers(0, 255, (64, 64), dtype=np.uint8))
        report = SENTENCE if i == 7 else "The heart is normal in size. There is a small left pleural effusion."
        rows.append(
            {"file": name, "notes": report, "image_id": f"i{i}", "patient_id": f"{NAME}-{i}", "view": "frontal"}
        )
    with (folder / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder / "table.csv"


def files(*folders: Path) -> Iterator[tuple[Path, bytes]]:
    for folder in folders:
        for path in folder.rglob("*"):
            if path.is_file() and not path.is_symlink():
                yield path, path.read_bytes()


def test_what_was_planted_is_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "raw").mkdir()
    table = corpus(tmp_path / "raw")
    (tmp_path / "key").write_text(SECRETS["MY_KEY"])
    for name in ("MEDIM_RAY_SALT", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, SECRETS[name])
    ray_logs = Path(f"/tmp/mr-{tmp_path.name[-8:]}")
    monkeypatch.setenv("RAY_TMPDIR", str(ray_logs))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MEDIM_RAY_JOBS", str(tmp_path / "written/jobs.json"))
    monkeypatch.chdir(ROOT)
    root = tmp_path / "written"
    references = (
        "environment.secrets={MEDIM_RAY_SALT: env, AWS_SECRET_ACCESS_KEY: env, MY_KEY: 'file:"
        + str(tmp_path)
        + "/key'}"
    )
    common = [f"storage.root={root}", references]
    source = [f"source.path={table}", "'source.label_columns=[]'", "shards.row_group_rows=8"]
    prepare = f"command=[prepare, --config, configs/sources/csv.yaml, {', '.join(source)}, out={root}/shards/phantom]"
    assert main(["submit", "jobs/prepare-small.yaml", prepare, *common]) == 0
    assert main(["submit", "jobs/pretrain-medim-small.yaml", "args=[train.steps=4, track.aim=true]", *common]) == 0
    assert main(["report", f"{root}/runs/pretrain-medim-small", "--no-text"]) == 0
    said = capsys.readouterr()
    printed = (Path("what was printed"), (said.out + said.err).encode())
    everything = [printed, *files(root, ray_logs)]
    assert len(everything) > 30
    for secret in SECRETS.values():
        assert not [str(path) for path, data in everything if secret.encode() in data], "a secret was written"
    outside = [(path, data) for path, data in everything if root / "shards" not in path.parents]
    for text in (NAME, WORD):
        assert not [str(path) for path, data in outside if text.encode() in data], f"{text!r} left the shards"
    vocabulary = [data for path, data in files(root / "shards/phantom/tokenizer")]
    assert vocabulary and all(WORD.encode() not in data and b"quartermain" not in data.lower() for data in vocabulary)
