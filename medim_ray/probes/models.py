"""Whole objectives in actors: from a run's configuration and weights in the object store to models ready to embed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
import torch

from medim_ray.config.loader import from_tree, to_tree
from medim_ray.config.schema import RunConfig
from medim_ray.data.shards import ShardSet
from medim_ray.data.texts import ReportEncoder
from medim_ray.data.transforms import Crop
from medim_ray.train.build import build_crop, build_objective, report_encoder
from medim_ray.train.runs import LoadedRun


@dataclass(frozen=True, kw_only=True)
class StoredModels:
    """The configuration of a run as a tree, and references to weights by name; cheap to send to an actor."""

    tree: dict[str, Any]
    weights: Mapping[str, Any]

    @classmethod
    def of(cls, runs: Mapping[str, LoadedRun]) -> StoredModels:
        """Runs of one configuration with different weights. Needs a running Ray."""
        return cls(
            tree=to_tree(next(iter(runs.values())).config),
            weights={name: ray.put(_weights(run)) for name, run in runs.items()},
        )

    def open(self) -> Models:
        """The models, in evaluation mode on the device of the run's workers."""
        config = from_tree(RunConfig, self.tree)
        shards = ShardSet.open(config.data.shards)
        device = torch.device("cuda" if config.train.use_gpu else "cpu")
        objectives: dict[str, Any] = {}
        for name, ref in self.weights.items():
            objective: Any = build_objective(config, shards)
            objective.load_state_dict(ray.get(ref))
            objectives[name] = objective.eval().to(device)
        reports = report_encoder(config, shards)
        return Models(config=config, crop=build_crop(config), reports=reports, device=device, objectives=objectives)


@dataclass(frozen=True, kw_only=True)
class Models:
    """objectives: by the name of their weights."""

    config: RunConfig
    crop: Crop
    reports: ReportEncoder
    device: torch.device
    objectives: Mapping[str, Any]


def _weights(run: LoadedRun) -> dict[str, torch.Tensor]:
    assert isinstance(run.objective, torch.nn.Module)
    return {name: tensor.detach().cpu() for name, tensor in run.objective.state_dict().items()}
