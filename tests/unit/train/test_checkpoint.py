"""Checkpoints: exact at every ZeRO stage and world size, committed or absent, and damage is named."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from medim_ray.config.schema import TrainConfig
from medim_ray.models.norms import BatchNorm
from medim_ray.objectives.base import ParameterGroup, default_groups
from medim_ray.train import checkpoint, zero
from medim_ray.train.checkpoint import SavedTensors
from medim_ray.train.saver import Saver
from medim_ray.train.store import CheckpointStore
from tests.unit.train.ranks import on_ranks


class Net(nn.Module):
    """Trainable, frozen and buffer tensors, of sizes that no world size divides."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = BatchNorm(7)
        self.first = nn.Linear(7, 13)
        self.second = nn.Linear(13, 3)
        self.teacher = nn.Linear(7, 5)
        self.teacher.requires_grad_(False)
        self.register_buffer("constant", torch.arange(3), persistent=False)

    def forward(self, x_BD: Tensor) -> Tensor:
        return self.second(self.first(self.norm(x_BD)).tanh()).square().mean() + self.teacher(x_BD).mean() * 0

    def parameter_groups(self) -> list[ParameterGroup]:
        return default_groups(self)


def config(world_size: int, stage: int, precision: Literal["fp32", "bf16"] = "fp32") -> TrainConfig:
    return TrainConfig(steps=9, num_workers=world_size, zero=stage, global_batch=12, precision=precision)


def build(world_size: int, stage: int, precision: Literal["fp32", "bf16"] = "fp32") -> Any:
    torch.manual_seed(0)
    return zero.build_engine(Net(), config(world_size, stage, precision))


def step(engine: Any, number: int) -> None:
    world_size = torch.distributed.get_world_size()
    x_BD = torch.randn(12, 7, generator=torch.Generator().manual_seed(number))
    share = x_BD.chunk(world_size)[torch.distributed.get_rank()]
    engine.backward(engine(share.to(next(engine.module.parameters()).dtype)))
    engine.step()


def write_after(
    steps: int, url: str, world_size: int, stage: int, resume: bool, precision: Literal["fp32", "bf16"] = "fp32"
) -> None:
    """Continues from the newest checkpoint where asked to, trains to `steps`, saves."""
    engine, store, first = build(world_size, stage, precision), CheckpointStore(url), 0
    if resume:
        newest = store.newest()
        assert newest is not None
        checkpoint.restore(store, newest, engine)
        first = newest.step
    for number in range(first, steps):
        step(engine, number)
    save(store, engine, steps)


def save(store: CheckpointStore, engine: Any, steps: int) -> None:
    attempts = [store.next_attempt()]
    torch.distributed.broadcast_object_list(attempts)
    saver = Saver(store, attempts[0], {})
    saver.save(engine, steps)
    saver.finish()


def tensors(url: str) -> dict[str, Tensor]:
    """All saved tensors of the newest checkpoint, in full, by name and kind."""
    store = CheckpointStore(url)
    newest = store.newest()
    assert newest is not None
    with store.local_files(newest.name) as local:
        saved = SavedTensors(newest.manifest["files"], local)
        return {
            f"{name}|{kind}": saved.read(name, kind, 0, int(torch.Size(saved.shapes[name]).numel())).clone()
            for name in saved.shapes
            for kind in saved.kinds[name]
        }


STAGES = (0, 1, 2, 3)
BF16_STAGES = (0, 1, 3)


def write_stages(folder: str) -> None:
    """Two ranks, each stage: a straight run of 4 steps, and one stopped at 2 that goes on in a new engine."""
    for stage in STAGES:
        write_after(4, f"{folder}/straight-{stage}", 2, stage, False)
        write_after(2, f"{folder}/stopped-{stage}", 2, stage, False)
        write_after(4, f"{folder}/stopped-{stage}", 2, stage, True)
    for stage in BF16_STAGES:
        write_after(4, f"{folder}/bf16-straight-{stage}", 2, stage, False, "bf16")
        write_after(2, f"{folder}/bf16-stopped-{stage}", 2, stage, False, "bf16")
        write_after(4, f"{folder}/bf16-stopped-{stage}", 2, stage, True, "bf16")


def rewrite_stages(folder: str, world_size: int, pairs: list[tuple[int, int]]) -> None:
    """Restores the straight run of one stage into an engine of another one, and saves it again without a step."""
    for stage, other in pairs:
        url = f"{folder}/straight-{stage}"
        write_after(4, url, world_size, other, True)
        newest = CheckpointStore(url).newest()
        assert newest is not None and newest.manifest["world_size"] == world_size


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("stages"))
    on_ranks(2, write_stages, folder)
    return folder


@pytest.mark.parametrize("stage", STAGES)
def test_resume_is_bit_equal_to_a_straight_run(stages: str, stage: int) -> None:
    one, other = tensors(f"{stages}/straight-{stage}"), tensors(f"{stages}/stopped-{stage}")
    assert one.keys() == other.keys() and len(one) == 6 * 3 + 2 + 3
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("stage", BF16_STAGES)
def test_bf16_runs_keep_and_resume_fp32_masters(stages: str, stage: int) -> None:
    one, other = tensors(f"{stages}/bf16-straight-{stage}"), tensors(f"{stages}/bf16-stopped-{stage}")
    assert one["first.weight|param"].dtype == torch.float32
    assert not torch.equal(one["first.weight|param"], one["first.weight|param"].bfloat16().float())
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_stages_take_the_same_steps(stages: str) -> None:
    reference = tensors(f"{stages}/straight-0")
    for stage in STAGES[1:]:
        run = tensors(f"{stages}/straight-{stage}")
        assert all(torch.allclose(run[key], reference[key], atol=1e-6) for key in run)


@pytest.mark.parametrize(("world_size", "pairs"), [(1, [(1, 1), (2, 0), (3, 3)]), (3, [(3, 1), (0, 3), (1, 2)])])
def test_another_world_size_and_stage_restore_every_tensor(
    stages: str, tmp_path: Path, world_size: int, pairs: list[tuple[int, int]]
) -> None:
    for stage, _ in pairs:
        shutil.copytree(f"{stages}/straight-{stage}", tmp_path / f"straight-{stage}")
    before = {stage: tensors(str(tmp_path / f"straight-{stage}")) for stage, _ in pairs}
    on_ranks(world_size, rewrite_stages, str(tmp_path), world_size, pairs)
    for stage, _ in pairs:
        after = tensors(str(tmp_path / f"straight-{stage}"))
        assert before[stage].keys() == after.keys()
        assert all(torch.equal(before[stage][key], after[key]) for key in after)


def write_twice(url: str) -> None:
    write_after(1, url, 1, 0, False)
    write_after(2, url, 1, 0, True)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints at steps 1 and 2."""
    folder = tmp_path_factory.mktemp("written")
    on_ranks(1, write_twice, str(folder))
    return folder


def damaged(written: Path, tmp_path: Path) -> CheckpointStore:
    shutil.copytree(written, tmp_path / "run")
    return CheckpointStore(str(tmp_path / "run"))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("flip", "rank-00000.safetensors differs from its checksum"),
        ("missing", "rank-00000.safetensors is missing"),
        ("uncommitted", "it was never committed (no manifest)"),
        ("cut", "its manifest is not valid JSON"),
        (
            "newer",
            "the manifest has no checksum of rank-00000.safetensors that this package makes (xxh3_128, blake2b)",
        ),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_with_the_reason(
    written: Path, tmp_path: Path, damage: str, reason: str
) -> None:
    store = damaged(written, tmp_path)
    folder = Path(store.root) / "step-00000002-1"
    tensor_file, manifest = folder / "rank-00000.safetensors", folder / "manifest.json"
    if damage == "flip":
        content = bytearray(tensor_file.read_bytes())
        content[-5] ^= 1
        tensor_file.write_bytes(content)
    elif damage == "missing":
        tensor_file.unlink()
    elif damage == "uncommitted":
        manifest.unlink()
    elif damage == "newer":
        tree = json.loads(manifest.read_text().replace('"xxh3_128"', '"xxh4"'))
        manifest.write_text(json.dumps({key: value for key, value in tree.items() if key != "checksum"}))
    else:
        manifest.write_text(manifest.read_text()[:40])
    said: list[str] = []
    newest = store.newest(said.append)
    assert newest is not None and newest.step == 1
    assert said == [f"checkpoint step-00000002-1 is passed over: {reason}"]


def test_a_checkpoint_of_earlier_code_is_checked_by_its_own_checksum(written: Path, tmp_path: Path) -> None:
    store = damaged(written, tmp_path)
    folder = Path(store.root) / "step-00000002-1"
    file, manifest = folder / "rank-00000.safetensors", folder / "manifest.json"
    tree = json.loads(manifest.read_text())
    facts = tree["files"][file.name]
    del facts["xxh3_128"], tree["checksum"]
    facts["blake2b"] = hashlib.blake2b(file.read_bytes()).hexdigest()
    manifest.write_text(json.dumps(tree))
    assert store.problem(folder.name) is None
    file.write_bytes(file.read_bytes()[:-1])
    assert store.problem(folder.name) == "rank-00000.safetensors differs from its checksum"


def test_prune_keeps_the_newest_and_sweeps_what_was_never_committed(written: Path, tmp_path: Path) -> None:
    store = damaged(written, tmp_path)
    (Path(store.root) / "step-00000009-0").mkdir()
    store.prune(keep_last=1, current="step-00000002-1")
    assert store.names() == ["step-00000002-1"]
    assert store.next_attempt() == 2


def test_prune_leaves_what_this_attempt_is_still_writing(written: Path, tmp_path: Path) -> None:
    store = damaged(written, tmp_path)
    for name in ("step-00000001-7", "step-00000009-0", "step-00000009-1"):
        (Path(store.root) / name).mkdir()
    store.prune(keep_last=2, current="step-00000002-1", writing_attempt=1)
    assert store.names() == ["step-00000009-1", "step-00000002-1", "step-00000001-0"]


def test_prune_drops_what_was_rolled_back_and_never_the_checkpoint_just_made(written: Path, tmp_path: Path) -> None:
    store = damaged(written, tmp_path)
    tensor_file = Path(store.root) / "step-00000002-1" / "rank-00000.safetensors"
    tensor_file.write_bytes(tensor_file.read_bytes()[:-1])
    store.prune(keep_last=1, current="step-00000001-0")
    assert store.names() == ["step-00000001-0"]
    newest = store.newest()
    assert newest is not None and newest.step == 1


def _restore_into_another_model(url: str) -> None:
    torch.manual_seed(0)
    net = Net()
    net.second = nn.Linear(13, 4)
    engine = zero.build_engine(net, config(1, 0))
    store = CheckpointStore(url)
    newest = store.newest()
    assert newest is not None
    with pytest.raises(ValueError, match=r"'second.weight' has shape \[3, 13\], the model wants \[4, 13\]"):
        checkpoint.restore(store, newest, engine)


def test_a_checkpoint_of_another_model_is_refused(written: Path) -> None:
    on_ranks(1, _restore_into_another_model, str(written))
