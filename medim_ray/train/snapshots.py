"""Maps of published weights: rank 0 publishes the alignment model every K steps, actors of the stream look with it.

Which snapshot masks which step, and where they lie, is in snapshot_store.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medim_ray.data.shards import TOKENIZER, ShardSet
from medim_ray.masking.report import ReportMasking
from medim_ray.models.vit import ImageEncoder
from medim_ray.train.snapshot_store import SnapshotStore, source_step
from medim_ray.train.zero import persistent_buffers

if TYPE_CHECKING:
    from torch import nn

    from medim_ray.config.schema import RunConfig

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


def snapshot_masking(config: RunConfig) -> ReportMasking.Config | None:
    """The run's masking where it takes its attention from snapshots."""
    masking = config.masking
    return masking if isinstance(masking, ReportMasking.Config) and masking.attention == "snapshot" else None


def check_snapshots(config: RunConfig, shards: ShardSet) -> None:
    """ValueError where the masks of this run can't be made of snapshots: of its own weights, or of those of a run."""
    from medim_ray.train.runs import open_config

    masking = snapshot_masking(config)
    if masking is None:
        return
    if masking.snapshot_every:
        own = f"masking.snapshot_every={masking.snapshot_every}"
        if getattr(config.objective, "local_weight", 0.0) <= 0:
            raise ValueError(
                f"{own}: objective.name={config.objective.name} trains no attention of words on patches; use "
                "objective.name=medim with objective.local_weight above 0, or masking.snapshot_run=PATH of such a run"
            )
        if masking.snapshot_every < config.data.window_steps:
            raise ValueError(
                f"{own}: must be at least data.window_steps={config.data.window_steps}, the steps that one block of "
                "the stream carries: it would wait for weights that are trained on it"
            )
        return
    where = f"masking.snapshot_run={masking.snapshot_run}"
    other = open_config(masking.snapshot_run)
    if getattr(other.objective, "local_weight", 0.0) <= 0:
        raise ValueError(f"{where}: its objective ({other.objective.name}) trained no attention of words on patches")
    if (other.encoder.image_size, ImageEncoder.grid_of(other.encoder)) != (
        config.encoder.image_size,
        ImageEncoder.grid_of(config.encoder),
    ):
        raise ValueError(f"{where}: has another image size or patch grid than this run; use the same encoder sizes")
    if config.crop.name != "pad_crop":
        raise ValueError(f"crop.name={config.crop.name}: {where} looks at whole images; use crop.name=pad_crop")
    vocabularies = [_vocabulary(shards), _vocabulary(ShardSet.open(other.data.shards))]
    if other.text != config.text or vocabularies[0] != vocabularies[1]:
        raise ValueError(f"{where}: reads other tokens than this run; use its text.* and shards with its vocabulary")


def _vocabulary(shards: ShardSet) -> list[str]:
    """What the tokenizer stored with the shards is; [] where there is none."""
    return sorted(file.blake2b for file in shards.manifest.other_files if file.path.startswith(f"{TOKENIZER}/"))


@dataclass
class Attender:
    """In an actor of the stream: a block's columns -> the same with the maps of the snapshots of its steps.

    The model is built at the first block. It is in evaluation mode: nothing depends on batch neighbours.
    """

    config: RunConfig

    def __post_init__(self) -> None:
        self._model: Any = None
        self._at = -1

    def __call__(self, columns: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        import torch

        from medim_ray.data.collate import to_batch
        from medim_ray.data.reader import STEP
        from medim_ray.train.build import build_crop

        masking_config = snapshot_masking(self.config)
        assert masking_config is not None
        masking, views = ReportMasking(masking_config), build_crop(self.config).views
        steps_B = columns[STEP]
        made: dict[str, NDArray[Any]] = {}
        for step in np.unique(steps_B):
            here_B = steps_B == step
            rows = {name: column[here_B] for name, column in columns.items()}
            model = self._ready(int(step), masking_config)
            attention_BWN = model.attention(to_batch(rows, views, torch.device("cpu")))
            for name, values in masking.attend(rows, attention_BWN).items():
                made.setdefault(name, np.zeros((len(steps_B), *values.shape[1:]), values.dtype))[here_B] = values
        return {**columns, **made}

    def _ready(self, step: int, masking: ReportMasking.Config) -> Any:
        """The model with the weights for this step."""
        from medim_ray.train.build import build_objective
        from medim_ray.train.runs import load_run

        if masking.snapshot_run:
            if self._model is None:
                self._model = load_run(masking.snapshot_run).objective
            return self._model
        at = source_step(step, masking.snapshot_every)
        if self._model is None or (at == 0 and self._at != 0):
            self._model = build_objective(self.config, ShardSet.open(self.config.data.shards))
            self._model.eval()
            self._at = 0
        if at != self._at:
            tensors = SnapshotStore(self.config.run.dir).wait(at)
            unknown = self._model.load_state_dict(tensors, strict=False).unexpected_keys
            assert not unknown, unknown
            self._at = at
        return self._model
