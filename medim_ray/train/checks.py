"""What can be known of a run before Ray is asked for anything: its paths, its shards, what its folder holds already."""

from __future__ import annotations

import math
import os
import shutil
from dataclasses import replace
from pathlib import Path

from medim_ray.config.loader import leaves
from medim_ray.config.schema import RunConfig
from medim_ray.data.shards import ShardSet
from medim_ray.data.sources.base import absolute
from medim_ray.data.storage import storage_faults
from medim_ray.models.vit import INITS, check_init
from medim_ray.train.build import HEADS, build_crop, build_masking, stream_plan
from medim_ray.train.runs import read_config
from medim_ray.train.snapshots import check_snapshots, snapshot_run
from medim_ray.train.store import CheckpointStore


def absolute_paths(config: RunConfig) -> RunConfig:
    """Local paths from the root: workers have working folders of their own, and a run folder outlives this one."""
    init, path = config.encoder.init, config.text.path
    masking, of_run = config.masking, snapshot_run(config)
    heads = {key: absolute(file) for key in HEADS if Path(file := getattr(config.objective, key, "")).is_file()}
    return replace(
        config,
        masking=replace(masking, snapshot_run=absolute(of_run)) if of_run else masking,
        objective=replace(config.objective, **heads),
        data=replace(config.data, shards=absolute(config.data.shards)),
        run=replace(config.run, dir=absolute(config.run.dir)),
        track=replace(config.track, aim_repo=config.track.aim_repo and absolute(config.track.aim_repo)),
        encoder=replace(config.encoder, init=init if init in INITS or not Path(init).exists() else absolute(init)),
        text=replace(
            config.text,
            path=absolute(path) if path is not None and Path(path).exists() else path,
            mesh=config.text.mesh and absolute(config.text.mesh),
        ),
    )


def check(config: RunConfig) -> ShardSet:
    """What can be known in a moment, before Ray is asked for anything; ValueError with the fix."""
    if not config.run.dir:
        raise ValueError("run.dir is empty: give the folder or URL of the run, e.g. run.dir=runs/first")
    if not config.data.shards:
        raise ValueError("data.shards is empty: give what `medim-ray prepare` wrote, e.g. data.shards=shards/cxr")
    check_init(config.encoder.init)
    for key in HEADS:
        if (file := getattr(config.objective, key, "")) and not Path(file).exists():
            raise ValueError(f"objective.{key}={file}: there is no such file; give one such as dino_head.safetensors")
    check_numbers(config)
    with storage_faults(f"data.shards={config.data.shards}"):
        shards = ShardSet.open(config.data.shards)
        shards.check_files(config.data.split)
    stream_plan(config, shards)
    build_masking(config)
    build_crop(config)
    _check_compiler(config)
    check_snapshots(config, shards)
    with storage_faults(f"run.dir={config.run.dir}"):
        old = read_config(config.run.dir)
        has_checkpoints = bool(CheckpointStore(config.run.dir).names())
    if old is not None and has_checkpoints:
        changed = _changed(old, absolute_paths(config))
        if changed:
            raise ValueError(
                f"{config.run.dir} holds another run: {'; '.join(changed)}. Choose another run.dir, or go back to "
                f"these values to resume"
            )
    return shards


def check_numbers(config: RunConfig) -> None:
    """ValueError for a number that is not finite: comparisons let it pass, and losses would carry it on."""
    for key, value, _ in leaves(config):
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{key}={value}: must be a finite number; `medim-ray config --fields` tells its default")


def _check_compiler(config: RunConfig) -> None:
    """ValueError where torch.compile was asked for on the CPUs of this machine, and it has no C++ compiler."""
    compilers = [os.environ.get("CXX", ""), "g++", "clang++"]
    here = not config.train.use_gpu and not (config.run.ray_address or os.environ.get("RAY_ADDRESS"))
    if config.train.compile and here and not any(shutil.which(name) for name in compilers if name):
        raise ValueError(
            "train.compile=true: torch.compile on a CPU needs a C++ compiler, and there is no g++ or clang++ here: "
            "install one (apt-get install g++), name it in CXX, or use train.compile=false"
        )


def _changed(old: RunConfig, new: RunConfig) -> list[str]:
    """Options that may not change in a resumed run and do."""
    before = {key: value for key, value, meta in leaves(old) if meta.get("fixed", True)}
    after = {key: value for key, value, meta in leaves(new) if meta.get("fixed", True)}
    keys = sorted(key for key in before | after if before.get(key) != after.get(key))
    return [f"{key} was {before.get(key)!r}, is {after.get(key)!r}" for key in keys]
