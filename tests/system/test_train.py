"""Whole runs through `launch`: real Ray Train and DeepSpeed on phantoms."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch

from medim_ray.config.loader import from_tree, load, to_tree
from medim_ray.config.schema import RunConfig
from medim_ray.train.checkpoint import load_weights
from medim_ray.train.launch import launch
from medim_ray.train.metrics import read_metrics
from medim_ray.train.runs import load_run, open_config
from medim_ray.train.store import CheckpointStore

pytestmark = [pytest.mark.system, pytest.mark.usefixtures("ray_session")]
RECIPES = Path(__file__).parents[2] / "configs/debug"
MAE, MEDIM = (RECIPES / f"{name}-vit_tiny-2w-z1.yaml" for name in ("mae", "medim"))
SMALL = ["encoder.depth=2", "train.cpus_per_worker=0.5", "track.aim=false"]


def config_of(recipe: Path, shards: str, run_dir: Path, *overrides: str) -> RunConfig:
    return load(RunConfig, recipe, [f"data.shards={shards}", f"run.dir={run_dir}", *SMALL, *overrides])


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    store = CheckpointStore(str(run_dir))
    newest = store.newest()
    assert newest is not None
    return load_weights(store, newest)


@pytest.mark.parametrize(("recipe", "zero"), [(MEDIM, 1), (MAE, 3)])
def test_a_stopped_run_goes_on_bit_equal(phantom_shards: str, tmp_path: Path, recipe: Path, zero: int) -> None:
    options = ["train.steps=6", f"train.zero={zero}"]
    straight = config_of(recipe, phantom_shards, tmp_path / "straight", *options)
    assert launch(straight).finished
    stopped = config_of(recipe, phantom_shards, tmp_path / "stopped", *options, "train.stop_after=3")
    first = launch(stopped)
    assert (first.step, first.finished) == (3, False)
    assert launch(stopped).step == 3, "a stop that is reached is not passed by the same command"
    goes_on = config_of(recipe, phantom_shards, tmp_path / "stopped", *options)
    assert launch(goes_on).finished
    one, other = weights(tmp_path / "straight"), weights(tmp_path / "stopped")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    records = read_metrics(str(tmp_path / "stopped"))
    assert [r["step"] for r in records] == list(range(6))
    assert [r["loss"] for r in records] == [r["loss"] for r in read_metrics(str(tmp_path / "straight"))]


def test_one_and_two_workers_agree_at_each_step(phantom_shards: str, tmp_path: Path) -> None:
    losses = []
    for num_workers in (1, 2):
        run_dir = tmp_path / f"{num_workers}w"
        config = config_of(
            MAE, phantom_shards, run_dir, "train.steps=20", f"train.num_workers={num_workers}", "train.zero=0"
        )
        launch(config)
        losses.append([record["loss"] for record in read_metrics(str(run_dir))])
    assert len(losses[0]) == 20
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert losses[0][-1] < losses[0][0]


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
    (manifest,) = (tmp_path / "run" / "checkpoints").glob("*/manifest.json")
    manifest.write_text(re.sub(r'"data_hash": "\w+"', '"data_hash": "0123456789ab"', manifest.read_text()))
    with pytest.raises(ValueError, match="was trained on other shards"):
        launch(config)
    assert (tmp_path / "aim_run").exists() or (tmp_path / "run" / "aim_run").exists()
    assert (tmp_path / ".aim").is_dir()
