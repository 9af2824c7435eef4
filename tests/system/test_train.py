"""Whole runs through `launch`: real Ray Train and DeepSpeed on phantoms, ended early in several ways."""

from __future__ import annotations

import dataclasses
import io
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console
from transformers import AutoModel

from medim_ray.cli import main
from medim_ray.config.loader import from_tree, to_tree
from medim_ray.config.schema import RunConfig
from medim_ray.data.shards import ShardSet
from medim_ray.objectives.rad_dino import RadDino
from medim_ray.probes.watch import MapWatch
from medim_ray.studies.gallery import write_gallery
from medim_ray.train.build import stream_bytes
from medim_ray.train.feed import read_quarantine
from medim_ray.train.launch import Watch, launch, look_at_resources
from medim_ray.train.metrics import read_lines, read_metrics
from medim_ray.train.runs import load_run, open_config
from medim_ray.train.snapshot_store import SnapshotStore
from medim_ray.train.store import CheckpointStore
from medim_ray.train.throughput import throughput
from tests.system.runs import MAE, MEDIM, RAD_DINO, assert_same_weights, config_of, planned_keys, weights

pytestmark = [pytest.mark.system, pytest.mark.usefixtures("ray_session")]


def after_steps(run_dir: Path, num_steps: int, do: Callable[[], None]) -> threading.Thread:
    """Does it once, as soon as metrics.jsonl has that many lines."""

    def watch() -> None:
        while len(read_lines(str(run_dir))) < num_steps:
            time.sleep(0.005)
        do()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def test_an_object_store_that_starves_the_stream_is_told(phantom_shards: str, tmp_path: Path) -> None:
    """The Ray of the tests has 150 MB."""
    sizes = ["train.num_workers=1", "train.global_batch=64", "encoder.image_size=518"]
    for options, is_told in (([], False), (sizes, True)):
        said = io.StringIO()
        config = config_of(RAD_DINO, phantom_shards, tmp_path / "run", *options)
        look_at_resources(config, Console(file=said, width=400))
        told = re.search(
            r"holds 150 MiB, the stream has up to (\d+) MiB .*--object-store-memory=(\d+)", said.getvalue()
        )
        assert bool(told) == is_told
        if told:
            assert int(told[2]) == stream_bytes(config) and int(told[1]) > 150


def train_workers() -> list[psutil.Process]:
    """Ray Train's workers below this process, by rank of their start."""
    found = [p for p in psutil.Process().children(recursive=True) if "RayTrainWorker" in " ".join(p.cmdline())]
    return sorted(found, key=lambda process: process.pid)


def test_a_stopped_run_goes_on_bit_equal(phantom_shards: str, tmp_path: Path) -> None:
    assert_goes_on(phantom_shards, tmp_path, None)


@pytest.mark.chaos
def test_masks_by_snapshots_go_on_bit_equal_with_looks_at_the_maps(phantom_shards: str, tmp_path: Path) -> None:
    """The second half takes its masks from snapshots of the first; maps are looked at in one of the two runs only."""
    options = ["masking.attention=snapshot", "masking.snapshot_every=2", "data.window_steps=2"]
    assert_goes_on(phantom_shards, tmp_path, MapWatch.of_run, *options, "maps.every=2", "maps.num_images=4")
    assert 4 in SnapshotStore(str(tmp_path / "stopped")).steps()
    records = read_metrics(str(tmp_path / "stopped"))
    assert [r["step"] for r in records if "maps/kdm/map_auroc" in r] == [0, 2, 4]


@pytest.mark.chaos
def test_rad_dino_masks_its_crops_by_the_attention_of_a_finished_medim_run(phantom_shards: str, tmp_path: Path) -> None:
    medim, encoder = tmp_path / "medim", "encoder.name=vit_tiny_patch16_224"
    assert launch(config_of(MEDIM, phantom_shards, medim, "train.steps=2", encoder)).finished
    guided = [encoder, "crop.local_size=48", "train.steps=2", "masking.name=dinov2_report"]
    guided += [f"masking.snapshot_run={medim}", "train.zero=3"]
    wrong = [*guided, "encoder.image_size=128"]
    with pytest.raises(ValueError, match=r"masking\.snapshot_run=.*another image size"):
        launch(config_of(RAD_DINO, phantom_shards, tmp_path / "wrong", *wrong))
    with pytest.raises(ValueError, match=r"crop\.local_size=56: must be a multiple of the patch size 16"):
        launch(config_of(RAD_DINO, phantom_shards, tmp_path / "wrong", *guided, "crop.local_size=56"))
    assert launch(config_of(RAD_DINO, phantom_shards, tmp_path / "dino", *guided)).finished
    records = read_metrics(str(tmp_path / "dino"))
    assert [record["mask/ibot/fallback_ratio"] < 0.5 for record in records] == [True, True], "guided, not blocks"
    page = write_gallery(str(tmp_path / "dino"), num=2, out=str(tmp_path / "masks.html"))
    words = Path(page).read_text()
    assert all(title in words for title in ("global0 hides", "global1 hides", "Mentions ("))
    assert_exported(tmp_path / "dino", tmp_path / "hf")


def assert_exported(run_dir: Path, out: Path) -> None:
    """A ZeRO-3 run goes out by the command; transformers sees what we see, and its mask token is the trained one."""
    assert main(["export", f"run={run_dir}", "format=hf", f"out={out}"]) == 0
    peer, run = AutoModel.from_pretrained(out).eval(), load_run(str(run_dir))
    images = torch.rand(2, 1, 112, 112, generator=torch.Generator().manual_seed(0))
    encoder = run.objective.encoder
    pixels = (images - encoder.config.mean) / encoder.config.std
    with torch.no_grad():
        tokens = peer(pixels.expand(-1, 3, -1, -1)).last_hidden_state
        features = encoder(images)
    torch.testing.assert_close(tokens[:, 0], features.global_BD, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tokens[:, 1:], features.patches_BND, rtol=1e-4, atol=1e-5)
    assert isinstance(run.objective, RadDino)
    assert torch.equal(peer.embeddings.mask_token.detach(), run.objective.mask_token().detach()[None])
    assert "## Configuration" in (out / "README.md").read_text()


def assert_goes_on(phantom_shards: str, tmp_path: Path, watch: Watch | None, *more: str) -> None:
    """A run that was stopped after three of six steps ends like one that was not; `watch` is of the first only."""
    options = ["train.steps=6", "train.zero=1", *more]
    assert launch(config_of(MEDIM, phantom_shards, tmp_path / "straight", *options)).finished
    stopped = config_of(MEDIM, phantom_shards, tmp_path / "stopped", *options, "train.stop_after=3")
    first = launch(stopped, watch=watch)
    assert (first.step, first.finished) == (3, False)
    assert launch(stopped).step == 3, "a stop that is reached is not passed by the same command"
    assert launch(config_of(MEDIM, phantom_shards, tmp_path / "stopped", *options), watch=watch).finished
    assert_same_weights(tmp_path / "straight", tmp_path / "stopped")
    records = read_metrics(str(tmp_path / "stopped"))
    assert [r["step"] for r in records] == list(range(6))
    assert [r["loss"] for r in records] == [r["loss"] for r in read_metrics(str(tmp_path / "straight"))]


def test_a_killed_worker_costs_no_sample_and_changes_no_bit(phantom_shards: str, tmp_path: Path) -> None:
    options = ["train.steps=8", "train.zero=3", "train.checkpoint_every=2"]
    straight = config_of(MAE, phantom_shards, tmp_path / "straight", *options)
    assert launch(straight).finished
    killed: list[int] = []

    def kill() -> None:
        worker = train_workers()[-1]
        killed.append(worker.pid)
        worker.kill()

    after_steps(tmp_path / "killed", 3, kill)
    assert launch(config_of(MAE, phantom_shards, tmp_path / "killed", *options)).finished
    assert killed, "the run was over before its worker was killed"
    assert len({attempt.name for attempt in (tmp_path / "killed" / "ray").glob("launch-*")}) == 2
    assert_same_weights(tmp_path / "straight", tmp_path / "killed")
    keys = [record["samples_key"] for record in read_metrics(str(tmp_path / "killed"))]
    assert keys == planned_keys(straight, 8), "other samples than planned went into the weights"
    told = throughput(str(tmp_path / "killed"), read_metrics(str(tmp_path / "killed")))
    assert told is not None and told["num_attempts"] == 2 and told["restart_s"] > 1 and told["checkpoint_s"] > 0
    assert 0 < told["goodput"] < 1 and told["wall_s"] > told["launch_s"] + told["restart_s"] and 0 < told["mfu"] < 1


@pytest.mark.chaos
def test_a_signal_commits_a_checkpoint_and_the_sharded_float32_teacher_goes_on_bit_equal(
    phantom_shards: str, tmp_path: Path
) -> None:
    options = ["train.steps=6", "train.zero=3", "train.precision=bf16"]
    assert launch(config_of(RAD_DINO, phantom_shards, tmp_path / "straight", *options)).finished
    warned = config_of(RAD_DINO, phantom_shards, tmp_path / "warned", *options)
    after_steps(tmp_path / "warned", 1, lambda: os.kill(os.getpid(), signal.SIGUSR1))
    first = launch(warned)
    assert first.signal == signal.SIGUSR1 and 1 <= first.step < 6
    assert len(read_metrics(str(tmp_path / "warned"))) == first.step, "steps after the checkpoint are lost"
    assert launch(warned).finished
    assert_same_weights(tmp_path / "straight", tmp_path / "warned")
    teacher = {key: value for key, value in weights(tmp_path / "warned").items() if key.startswith("encoder.")}
    assert all(value.dtype == torch.float32 for value in teacher.values())
    assert any((value != value.bfloat16().float()).any() for value in teacher.values()), "rounded to bf16"


def flip_a_bit(shards: ShardSet) -> dict[str, Any]:
    """Damages one stored image of the training split; where it lies."""
    file = shards.files("train")[-1]
    path = Path(shards.path(file))
    row = pq.read_table(path).to_pylist()[3]
    data = bytearray(path.read_bytes())
    data[data.index(row["image"]) + len(row["image"]) // 2] ^= 16
    path.write_bytes(bytes(data))
    return {"shard": file.path, "row": 3, "image_id": row["image_id"], "reason": "its checksum does not fit"}


def test_one_and_two_workers_agree_at_each_step_also_about_a_broken_row(phantom_shards: str, tmp_path: Path) -> None:
    shutil.copytree(phantom_shards, tmp_path / "shards")
    broken = flip_a_bit(ShardSet.open(str(tmp_path / "shards")))
    options = ["train.steps=20", "train.zero=0", "data.max_broken_ratio=0.02"]
    runs, quarantined = [], []
    for num_workers in (1, 2):
        run_dir = tmp_path / f"{num_workers}w"
        launch(config_of(MAE, str(tmp_path / "shards"), run_dir, *options, f"train.num_workers={num_workers}"))
        runs.append(read_metrics(str(run_dir)))
        quarantined.append(read_quarantine(str(run_dir)))
    losses = [[record["loss"] for record in records] for records in runs]
    assert len(losses[0]) == 20
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert losses[0][-1] < losses[0][0]
    for name in ("samples_key", "broken_rows"):
        assert [record[name] for record in runs[0]] == [record[name] for record in runs[1]]
    assert 1 <= sum(record["broken_rows"] for record in runs[0]) <= 3, "once an epoch"
    first = next(record["step"] for record in runs[0] if record["broken_rows"])
    assert quarantined == [[{**broken, "step": first}]] * 2
    seconds = [name for name in runs[0][0] if name.startswith("stream_")]
    assert len(seconds) == 6 and all(record[name] >= 0 for record in runs[0] for name in seconds)


@pytest.mark.chaos
def test_a_loss_that_is_not_finite_ends_the_run_and_is_named(phantom_shards: str, tmp_path: Path) -> None:
    options = ["train.steps=8", "train.lr=1e30", "train.warmup_ratio=0", "train.num_workers=1"]
    with pytest.raises(RuntimeError, match=r"step \d: .*(loss|grad_norm).* is (nan|inf).*train.on_bad_step=stop"):
        launch(config_of(MAE, phantom_shards, tmp_path / "run", *options))
    (record,) = (tmp_path / "run" / "bad_steps.jsonl").read_text().splitlines()
    assert '"omitted": false' in record and '"samples_key": ' in record
    assert list((tmp_path / "run" / "bad_steps").glob("step-*-rank-00000.npz"))


def test_a_run_folder_reloads_and_refuses_another_run(
    phantom_shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["train.steps=2", "train.num_workers=1", "track.aim=true"]
    (tmp_path / "shards").symlink_to(phantom_shards)
    monkeypatch.chdir(tmp_path)
    launch(config_of(MEDIM, "shards", Path("run"), *options))
    config = config_of(MEDIM, str(tmp_path / "shards"), tmp_path / "run", *options)
    assert open_config(str(tmp_path / "run")) == config == from_tree(RunConfig, to_tree(config))
    trained, untrained = load_run(str(tmp_path / "run")), load_run(str(tmp_path / "run"), trained=False)
    assert trained.step == 2
    name = "encoder.backbone.blocks.0.attn.qkv.weight"
    assert not torch.equal(trained.objective.state_dict()[name], untrained.objective.state_dict()[name])  # type: ignore[attr-defined]
    other = dataclasses.replace(config, seed=7)
    with pytest.raises(ValueError, match="seed was 42, is 7"):
        launch(other)
    (tmp_path / "copy").symlink_to(phantom_shards)
    assert launch(config_of(MEDIM, "copy", Path("run"), *options)).finished, "the same shards at another place"
    store = CheckpointStore(str(tmp_path / "run"))
    (checkpoint,) = store.names()
    store.commit(checkpoint, store.manifest(checkpoint) | {"data_hash": "0123456789ab"})
    with pytest.raises(ValueError, match="was trained on other shards"):
        launch(config)
    assert (tmp_path / "aim_run").exists() or (tmp_path / "run" / "aim_run").exists()
    assert (tmp_path / ".aim").is_dir()
