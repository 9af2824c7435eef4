"""Maps of published weights: rank 0 publishes the alignment model every K steps, actors of the stream look with it.

Which snapshot masks which step, and where they lie, is in snapshot_store.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from medim_ray.config.schema import RunConfig
from medim_ray.data.collate import to_batch
from medim_ray.data.reader import STEP, VIEW
from medim_ray.data.shards import ShardSet
from medim_ray.data.transforms import View
from medim_ray.masking.report import ReportMasking
from medim_ray.models.vit import ImageEncoder
from medim_ray.objectives.pixels import IMAGE_VIEW
from medim_ray.train.build import build_crop, build_masking, build_objective
from medim_ray.train.runs import load_run, open_config
from medim_ray.train.snapshot_store import SnapshotStore, source_step
from medim_ray.train.zero import persistent_buffers

_PARTS = ("encoder.", "text.", "word_projection.", "patch_projection.")  # of MedIM: what attention() uses


class Publisher:
    """Called before each step on all ranks (under ZeRO-3 they gather): publishes every `every` steps, from rank 0."""

    def __init__(self, store: SnapshotStore, every: int, module: nn.Module, rank: int) -> None:
        self._store, self._every, self._module, self._rank = store, every, module, rank

    def __call__(self, step: int) -> None:
        if step == 0 or step % self._every:
            return
        tensors = {}
        named = [*self._module.named_parameters(), *persistent_buffers(self._module)]
        for name, tensor in named:
            if name.startswith(_PARTS):
                with _whole(tensor):
                    if self._rank == 0:
                        tensors[name] = tensor.detach().cpu().clone()
        if self._rank == 0:
            self._store.publish(step, tensors)


@contextlib.contextmanager
def _whole(tensor: Any) -> Iterator[None]:
    """The full tensor inside, whatever the ZeRO stage."""
    if not hasattr(tensor, "ds_id"):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([tensor], modifier_rank=None):
        yield


def snapshot_every(config: RunConfig) -> int:
    """Steps between the snapshots of the run's own weights; 0 where its masks are not made of such."""
    return int(getattr(config.masking, "snapshot_every", 0))


def snapshot_run(config: RunConfig) -> str:
    """The finished run whose weights make the masks; '' where there is none."""
    return str(getattr(config.masking, "snapshot_run", ""))


def check_snapshots(config: RunConfig, shards: ShardSet) -> None:
    """ValueError where the masks of this run can't be made of snapshots: of its own weights, or of those of a run."""
    if every := snapshot_every(config):
        own = f"masking.snapshot_every={every}"
        if getattr(config.objective, "local_weight", 0.0) <= 0:
            raise ValueError(
                f"{own}: objective.name={config.objective.name} trains no attention of words on patches; use "
                "objective.name=medim with objective.local_weight above 0, or masking.snapshot_run=PATH of such a run"
            )
        if every < config.data.window_steps:
            raise ValueError(
                f"{own}: must be at least data.window_steps={config.data.window_steps}, the steps that one block of "
                "the stream carries: it would wait for weights that are trained on it"
            )
    if not snapshot_run(config):
        return
    where = f"masking.snapshot_run={snapshot_run(config)}"
    other = open_config(snapshot_run(config))
    if getattr(other.objective, "local_weight", 0.0) <= 0:
        raise ValueError(f"{where}: its objective ({other.objective.name}) trained no attention of words on patches")
    if (other.encoder.image_size, ImageEncoder.grid_of(other.encoder)) != (
        config.encoder.image_size,
        ImageEncoder.grid_of(config.encoder),
    ):
        raise ValueError(f"{where}: has another image size or patch grid than this run; use the same encoder sizes")
    if isinstance(config.masking, ReportMasking.Config) and config.crop.name != "pad_crop":
        raise ValueError(f"crop.name={config.crop.name}: {where} looks at whole images; use crop.name=pad_crop")
    if other.text != config.text or shards.tokenizer() != ShardSet.open(other.data.shards).tokenizer():
        raise ValueError(f"{where}: reads other tokens than this run; use its text.* and shards with its vocabulary")


def make_attender(config: RunConfig) -> Attender | None:
    """The attender of a run; None where its masking takes no attention from snapshots. Nothing is built yet."""
    every, of_run = snapshot_every(config), snapshot_run(config)
    if not every and not of_run:
        return None
    build = partial(_finished, of_run) if of_run else partial(_first, config)
    return Attender(build_masking(config), build_crop(config).views[0], config.run.dir, every, build)


def _first(config: RunConfig) -> Any:
    """The objective with the weights that the run begins with."""
    return build_objective(config, ShardSet.open(config.data.shards))


def _finished(run_dir: str) -> Any:
    """The objective of a finished run."""
    return load_run(run_dir).objective


@dataclass
class Attender:
    """In an actor of the stream: a block's columns -> the same with what the snapshots of its steps make of them.

    masking: a strategy with `attend`; view: the first of the crop, on each crop of which the model looks; every: steps
    between snapshots, 0 where the weights do not change.
    build: the model with the weights of step 0, or with those that do not change; called at the first block, and it is
    put into evaluation mode, so that nothing depends on batch neighbours.
    """

    masking: Any
    view: View
    run_dir: str
    every: int
    build: Callable[[], Any]

    def __post_init__(self) -> None:
        self._model: Any = None
        self._at = 0

    def __call__(self, columns: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        steps_B, own = columns[STEP], f"{VIEW}{self.view.name}"
        seen = {name: c for name, c in columns.items() if not name.startswith(VIEW) or name.startswith(own)}
        made: dict[str, NDArray[Any]] = {}
        for step in np.unique(steps_B):
            here_B = steps_B == step
            rows = {name: column[here_B] for name, column in seen.items()}
            model = self._ready(int(step))
            batch = to_batch(rows, (self.view,), torch.device("cpu"))
            crops_KBCHW = batch.views[self.view.name].unflatten(0, (self.view.num_crops, -1))
            attention_KBWN = [model.attention(replace(batch, views={IMAGE_VIEW: crop})) for crop in crops_KBCHW]
            for name, values in self.masking.attend(rows, attention_KBWN).items():
                made.setdefault(name, np.zeros((len(steps_B), *values.shape[1:]), values.dtype))[here_B] = values
        return {**columns, **made}

    def _ready(self, step: int) -> Any:
        """The model with the weights for this step."""
        at = source_step(step, self.every) if self.every else 0
        if self._model is None or at < self._at:
            self._model, self._at = self.build().eval(), 0
        if at != self._at:
            tensors = SnapshotStore(self.run_dir).wait(at)
            unknown = self._model.load_state_dict(tensors, strict=False).unexpected_keys
            assert not unknown, unknown
            self._at = at
        return self._model
