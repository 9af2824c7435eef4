"""Small runs for the system tests, and what they left behind."""

from __future__ import annotations

from pathlib import Path

import torch

from medim_ray.config.loader import load
from medim_ray.config.schema import RunConfig
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
