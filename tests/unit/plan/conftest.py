"""A small run and the cluster that the tests of the planner share."""

from __future__ import annotations

import pytest

from medim_ray.config.loader import load
from medim_ray.config.schema import RunConfig
from medim_ray.plan.clusters import Cluster, resolve
from tests.unit.plan.layouts import GPUS

RECIPE = (
    "objective.name=rad_dino",
    "crop.name=multi_crop",
    "masking.name=dinov2_block",
    "encoder.name=vit_base_patch14_dinov2",
    "train.precision=bf16",
    "train.global_batch=512",
    "train.num_workers=16",
    "train.steps=1000",
)


@pytest.fixture
def gpus() -> Cluster:
    return resolve(GPUS)


@pytest.fixture
def recipe() -> RunConfig:
    return load(RunConfig, None, RECIPE)
