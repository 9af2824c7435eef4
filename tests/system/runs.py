"""Small runs for the system tests, and what they left behind."""

from __future__ import annotations

from pathlib import Path

import torch

from medim_ray.config.loader import load
from medim_ray.config.schema import RunConfig
from medim_ray.data.plan import StreamPlan
from medim_ray.data.shards import ShardSet
from medim_ray.draws import name_key
from medim_ray.train.build import stream_plan
from medim_ray.train.checkpoint import load_weights
from medim_ray.train.store import CheckpointStore

RECIPES = Path(__file__).parents[2] / "configs/debug"
MAE, MEDIM, RAD_DINO = (RECIPES / f"{name}-vit_tiny-2w-z1.yaml" for name in ("mae", "medim", "rad_dino"))
SMALL = ["encoder.depth=2", "train.cpus_per_worker=0.5", "track.aim=false"]


def config_of(recipe: Path, shards: str, run_dir: Path | str, *overrides: str) -> RunConfig:
    """A debug recipe, smaller still."""
    return load(RunConfig, recipe, [f"data.shards={shards}", f"run.dir={run_dir}", *SMALL, *overrides])


def weights(run_dir: Path | str) -> dict[str, torch.Tensor]:
    """Every parameter and buffer of the newest checkpoint."""
    store = CheckpointStore(str(run_dir))
    newest = store.newest()
    assert newest is not None
    return load_weights(store, newest)


def assert_same_weights(one: Path | str, other: Path | str) -> None:
    """Bit for bit."""
    left, right = weights(one), weights(other)
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def planned_keys(config: RunConfig, num_steps: int) -> list[int]:
    """What metrics.jsonl must tell of each step's samples, from the plan and the shards alone."""
    shards = ShardSet.open(config.data.shards)
    plan: StreamPlan = stream_plan(config, shards)
    ids = shards.read_rows("train", ["image_id"])["image_id"].to_pylist()
    keys = [0] * num_steps
    for index in range(plan.num_blocks(0, num_steps)):
        block = plan.block(index, 0)
        for step, row in zip(block.steps_K, block.rows_K, strict=True):
            if step < num_steps:
                keys[step] += name_key(ids[row]) >> 32
    return keys
