"""What is no checkpoint, or one no more, is passed over in words; the command removes nothing that counts."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import fsspec
import pytest

from medim_ray.cli import main
from medim_ray.config.loader import load
from medim_ray.config.schema import RunConfig
from medim_ray.data.lease import Lease
from medim_ray.train.runs import LEASE, write_config
from medim_ray.train.store import SCHEMA_VERSION, CheckpointStore, checkpoint_name
from medim_ray.train.validation import BEST

FILE = "rank-00000.safetensors"


def write(run: Path, *steps: int) -> CheckpointStore:
    """Checkpoints with a file of a few bytes."""
    store = CheckpointStore(str(run))
    for step in steps:
        name, content = checkpoint_name(step, 0), memoryview(f"state {step}".encode())
        facts = {FILE: store.write(name, FILE, lambda content=content: [content])}  # type: ignore[misc]
        tree = {"schema_version": SCHEMA_VERSION, "step": step, "world_size": 1, "zero": 0, "files": facts}
        store.commit(name, tree)
    return store


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Checkpoints of the steps 2, 4, 6 and 8."""
    config = load(RunConfig, None, [f"run.dir={tmp_path}", f"data.shards={tmp_path}/shards"])
    write_config(config, "d")
    write(tmp_path, 2, 4, 6, 8)
    return tmp_path


def newest(run: Path) -> tuple[int, list[str]]:
    """The step that the run would go on from, and why not a later one."""
    said: list[str] = []
    found = CheckpointStore(str(run)).newest(said.append)
    return (0 if found is None else found.step), [line.partition("passed over: ")[2] for line in said]


def manifest_of(run: Path, step: int) -> Path:
    return run / "checkpoints" / checkpoint_name(step, 0) / "manifest.json"


def test_every_bit_of_a_manifest_counts(run: Path) -> None:
    path = manifest_of(run, 8)
    whole = path.read_bytes()
    assert newest(run) == (8, [])
    meaning = {key: value for key, value in json.loads(whole).items() if key != "checksum"}
    for at in range(0, 8 * len(whole), 7):  # every byte, and of its bits one after the other
        damaged = bytearray(whole)
        damaged[at // 8] ^= 1 << at % 8
        try:
            left = json.loads(damaged)
        except ValueError:
            left = {}
        if "checksum" not in left and meaning.items() <= left.items():
            continue  # the name of the checksum was hit, and nothing else
        if left == json.loads(whole):
            continue  # one kind of blank became another
        path.write_bytes(damaged)
        step, reasons = newest(run)
        assert step == 6, (at, bytes(damaged))
        assert reasons[0] in ("its manifest is not valid JSON", "its manifest differs from its checksum")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[]", "its manifest is not valid JSON"),
        ("7", "its manifest is not valid JSON"),
        ("{}", f"its schema version is None, this package reads {SCHEMA_VERSION}"),
        (json.dumps({"schema_version": SCHEMA_VERSION, "step": 8}), "its manifest lacks its step or its files"),
        (
            json.dumps({"schema_version": SCHEMA_VERSION, "step": 3, "files": {}}),
            "its manifest is that of step 3: it was renamed",
        ),
        (
            json.dumps({"schema_version": 1, "step": 8, "files": {}}),
            f"its schema version is 1, this package reads {SCHEMA_VERSION}",
        ),
    ],
)
def test_manifests_that_are_none(run: Path, text: str, reason: str) -> None:
    manifest_of(run, 8).write_text(text)
    assert newest(run) == (6, [reason])
    assert CheckpointStore(str(run)).committed_step() == 8, "of the names alone"


def test_what_a_newer_package_wrote_is_neither_passed_over_nor_removed(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = CheckpointStore(str(run))
    store.commit(checkpoint_name(8, 0), {"schema_version": SCHEMA_VERSION + 1, "shards": "elsewhere"})
    with pytest.raises(ValueError, match=rf"reads {SCHEMA_VERSION}: update medim-ray, or choose another run\.dir"):
        store.newest()
    assert main(["checkpoint", "prune", str(run), "--keep", "1"]) == 0
    assert "update medim-ray first" in capsys.readouterr().out and len(store.names()) == 4
    assert main(["checkpoint", "list", str(run)]) == 0 and main(["checkpoint", "verify", str(run)]) == 1


def test_a_damaged_one_of_the_same_step_is_not_kept_in_place_of_a_good_one(run: Path) -> None:
    store = CheckpointStore(str(run))
    (run / "checkpoints" / checkpoint_name(8, 0) / FILE).write_bytes(b"other bytes")
    again = {"schema_version": SCHEMA_VERSION, "step": 8, "files": {}}
    store.commit(checkpoint_name(8, 1), again)
    store.prune(2, checkpoint_name(8, 1))
    assert store.names() == [checkpoint_name(8, 1), checkpoint_name(6, 0)]


def test_of_a_link_only_the_link_goes(run: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other")
    write(other, 3)
    (run / "checkpoints" / checkpoint_name(3, 0)).symlink_to(other / "checkpoints" / checkpoint_name(3, 0))
    store = CheckpointStore(str(run))
    store.prune(1, checkpoint_name(8, 0))
    assert store.names() == [checkpoint_name(8, 0)]
    assert CheckpointStore(str(other)).problem(checkpoint_name(3, 0)) is None


def test_other_things_among_the_checkpoints(run: Path) -> None:
    (run / "checkpoints/notes.txt").write_text("x")
    (run / "checkpoints" / checkpoint_name(9, 0)).write_text("a file where a folder should be")
    (run / "checkpoints" / checkpoint_name(10, 0)).symlink_to("nowhere")
    (run / "checkpoints" / checkpoint_name(11, 0)).mkdir()
    (run / "checkpoints" / checkpoint_name(12, 0) / "manifest.json").mkdir(parents=True)
    never = "it was never committed (no manifest)"
    assert newest(run) == (8, [never] * 4)
    store = CheckpointStore(str(run))
    store.prune(1, checkpoint_name(8, 0))
    assert store.names() == [checkpoint_name(8, 0)] and (run / "checkpoints/notes.txt").exists()


def test_a_disk_that_can_not_read_a_file_is_told(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(str(run))
    opened = store._fs.open

    def bad_sector(path: str, *args: Any, **options: Any) -> Any:
        if checkpoint_name(8, 0) in path and path.endswith(FILE):
            raise OSError(5, os.strerror(5))
        return opened(path, *args, **options)

    monkeypatch.setattr(store._fs, "open", bad_sector)
    assert store.problem(checkpoint_name(8, 0)) == f"{FILE} can't be read (Input/output error)"


def test_the_command_shows_damaged_manifests(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    manifest_of(run, 8).write_text("{")
    (run / "checkpoints" / checkpoint_name(6, 0) / FILE).write_bytes(b"other bytes")
    for action, code, shown in (("list", 0, "committed"), ("verify", 1, "differs from its")):
        assert main(["checkpoint", action, str(run)]) == code
        said = " ".join(capsys.readouterr().out.split())
        assert "not valid JSON" in said and shown in said


def test_prune_keeps_what_can_be_used_and_the_best(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(run, 10)
    (run / BEST).write_text(json.dumps({"checkpoint": checkpoint_name(2, 0)}))
    (run / "checkpoints" / checkpoint_name(8, 0) / FILE).write_bytes(b"other bytes")
    assert main(["checkpoint", "prune", str(run), "--keep", "2"]) == 0
    said = capsys.readouterr().out
    assert f"{checkpoint_name(8, 0)}: {FILE} differs from its checksum" in said
    kept = [checkpoint_name(step, 0) for step in (10, 6, 2)]
    assert CheckpointStore(str(run)).names() == kept
    assert f"removed {checkpoint_name(4, 0)}" in said and f"removed {checkpoint_name(8, 0)}" in said
    assert not (run / LEASE).exists()


def test_prune_removes_nothing_where_nothing_can_be_used_or_a_job_trains(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Lease(fsspec.filesystem("file"), str(run / LEASE), what="x"):
        assert main(["checkpoint", "prune", str(run), "--keep", "1"]) == 2
        assert f"run.dir={run} is being written by another job" in capsys.readouterr().err
    for step in (2, 4, 6, 8):
        manifest_of(run, step).unlink()
    assert main(["checkpoint", "prune", str(run)]) == 0 and len(CheckpointStore(str(run)).names()) == 4
    assert "nothing is removed" in capsys.readouterr().out
    assert main(["checkpoint", "prune", str(run), "--keep", "0"]) == 2
