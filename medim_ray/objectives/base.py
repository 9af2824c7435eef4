"""What an objective is: one torch module that turns a Batch into a StepOutput. No objective lives here.

DeepSpeed wraps the module whole (one forward, one backward), so everything trainable is a submodule of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from medim_ray.masking.base import Masking
from medim_ray.models.vit import ImageEncoder
from medim_ray.registry import Registry
from medim_ray.types import Batch, StepOutput


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What an objective is built from. text is None where objective.needs_text is False."""

    encoder: ImageEncoder
    text: nn.Module | None
    masking: Masking
    num_steps: int
    global_batch: int


class Objective(Protocol):
    """An nn.Module with these attributes; constructed as `cls(config, parts)`, registered in OBJECTIVES.

    Weights are initialised from torch's generator, which the caller seeds before construction.
    """

    encoder: ImageEncoder  # what probes and exports take
    needs_text: bool  # class attribute

    def forward(self, batch: Batch) -> StepOutput:
        """The loss of one micro-batch; `batch.step` is the global optimizer step, counted from 0."""
        ...

    def after_step(self, step: int) -> None:
        """Called on every rank after the optimizer step `step` (EMA, statistics); usually nothing."""
        ...


OBJECTIVES: Registry[Any] = Registry("objective")
