"""A run folder, read and written: its configuration, and its objective with trained or untrained weights. No Ray here.

RUN/config.yaml   RUN/metrics.jsonl   RUN/checkpoints/step-SSSSSSSS-A/{rank-RRRRR.safetensors, manifest.json}
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.metadata import version

import fsspec
from torch import nn

from medim_ray.config.loader import from_tree, parse_yaml, run_hash, to_yaml
from medim_ray.config.schema import RunConfig
from medim_ray.data.shards import ShardSet
from medim_ray.data.storage import committed
from medim_ray.objectives.base import Objective
from medim_ray.train.build import HEADS, build_objective
from medim_ray.train.checkpoint import load_weights
from medim_ray.train.store import CheckpointStore
from medim_ray.train.validation import read_best

CONFIG = "config.yaml"
LEASE = ".lease"  # in the run folder, while a job trains there


def write_config(config: RunConfig, data_hash: str) -> None:
    """RUN/config.yaml, the resolved tree, headed by the hashes of run and data and the versions that wrote it."""
    packages = ("medim-ray", "ray", "torch", "deepspeed", "timm", "transformers")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    fs, root = fsspec.core.url_to_fs(config.run.dir)
    fs.makedirs(root, exist_ok=True)
    text = f"# run_hash {run_hash(config)}\n# data_hash {data_hash}\n# {versions}\n{to_yaml(config)}"
    with committed(fs, f"{root.rstrip('/')}/{CONFIG}", scratch=root) as file:
        file.write(text.encode())


def read_config(run_dir: str) -> RunConfig | None:
    """The configuration of a run folder, or None where there is none."""
    fs, root = fsspec.core.url_to_fs(run_dir)
    path = f"{root.rstrip('/')}/{CONFIG}"
    if not fs.exists(path):
        return None
    return from_tree(RunConfig, parse_yaml(fs.cat_file(path).decode()), where=f"{run_dir}/{CONFIG}")


@dataclass(frozen=True, kw_only=True)
class LoadedRun:
    """A run's objective in evaluation mode, on the CPU. step: optimizer steps behind the weights, 0 = untrained."""

    config: RunConfig
    shards: ShardSet
    objective: Objective
    step: int
    checkpoint: str


def open_config(run_dir: str) -> RunConfig:
    """The configuration of a run folder; ValueError where there is no run."""
    config = read_config(run_dir)
    if config is None:
        raise ValueError(f"{run_dir} is not a run folder (no {CONFIG} in it): give run=PATH of a `medim-ray pretrain`")
    return config


def find_checkpoint(run_dir: str, which: str) -> str:
    """The name of a checkpoint of a run: `latest` ('': the newest that can be used), `best` (by validation during the
    run) or a step. ValueError that names those there are."""
    if which == "latest":
        return ""
    store = CheckpointStore(run_dir)
    names = [name for name in store.names() if store.is_committed(name)]
    if which == "best":
        best = read_best(run_dir)
        if best in names:
            return best
        why = "it was removed" if best else "no checkpoint was validated during the run (options validate.*)"
        raise ValueError(f"checkpoint=best: {run_dir} has none: {why}; there are {', '.join(names) or 'none'}")
    if not which.isdecimal():
        raise ValueError(f"checkpoint={which!r}: latest, best or a step")
    found = store.committed_at(int(which))
    if not found:
        raise ValueError(f"checkpoint={which}: {run_dir} has no checkpoint of this step; there are {', '.join(names)}")
    return found


def without_first_weights(config: RunConfig) -> RunConfig:
    """The same model, begun at random."""
    none = {key: "" for key in HEADS if hasattr(config.objective, key)}
    encoder, objective = replace(config.encoder, init="random"), replace(config.objective, **none)
    return replace(config, encoder=encoder, objective=objective)


def load_run(run_dir: str, trained: bool = True, checkpoint: str = "") -> LoadedRun:
    """The objective with the weights of the newest valid checkpoint (or of the one named, which is not verified), or
    with those the run began with.

    ValueError where there is no run or, with `trained`, no checkpoint that can be used; FileNotFoundError where the one
    named is gone.
    """
    config = open_config(run_dir)
    shards = ShardSet.open(config.data.shards)
    # The files of the first weights may be gone: a checkpoint holds every tensor.
    objective = build_objective(without_first_weights(config) if trained else config, shards)
    assert isinstance(objective, nn.Module)
    step, name = 0, ""
    if trained:
        problems: list[str] = []
        store = CheckpointStore(run_dir)
        newest = store.open(checkpoint) if checkpoint else store.newest(problems.append)
        if newest is None:
            why = "; ".join(problems) or "none was committed"
            raise ValueError(f"{run_dir} has no checkpoint that can be used: {why}. Run `medim-ray pretrain` on it")
        objective.load_state_dict(load_weights(store, newest))
        step, name = newest.step, newest.name
    objective.eval()
    return LoadedRun(config=config, shards=shards, objective=objective, step=step, checkpoint=name)
