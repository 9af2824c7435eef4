"""What an objective is: one torch module that turns a Batch into a StepOutput. No objective lives here.

DeepSpeed wraps the module whole (one forward, one backward), so everything trainable is a submodule of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import Tensor, nn

from medim_ray.masking.base import Masking
from medim_ray.models.vit import ImageEncoder
from medim_ray.registry import Registry
from medim_ray.types import Batch, StepOutput


@dataclass(frozen=True, kw_only=True)
class ParameterGroup:
    """Parameters that are stepped alike: the scheduled learning rate times `lr_ratio` (0 during the first
    `frozen_steps` steps), the scheduled weight decay times `decay_ratio`."""

    parameters: tuple[nn.Parameter, ...]
    lr_ratio: float = 1.0
    decay_ratio: float = 1.0
    frozen_steps: int = 0


def default_groups(module: nn.Module) -> list[ParameterGroup]:
    """Two groups: no weight decay on parameters of one dimension (biases, norms, tokens), decay on the others."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    decayed = tuple(p for p in trainable if p.ndim > 1)
    others = tuple(p for p in trainable if p.ndim <= 1)
    groups = [ParameterGroup(parameters=decayed), ParameterGroup(parameters=others, decay_ratio=0.0)]
    return [group for group in groups if group.parameters]


def default_part(name: str) -> str:
    """The part of a parameter by its name: the objective's own child that holds it; a mask token is the encoder's."""
    child = name.partition(".")[0]
    return "encoder" if child == "mask_token" else child


def split_by_part(module: nn.Module, groups: Sequence[ParameterGroup]) -> list[tuple[str, ParameterGroup]]:
    """Each group cut where it holds parameters of several parts, with the name of its part (`Objective.part_of`)."""
    part_of: Callable[[str], str] = module.part_of  # type: ignore[assignment]  # of an Objective
    part_by_id = {id(parameter): part_of(name) for name, parameter in module.named_parameters()}
    split: list[tuple[str, ParameterGroup]] = []
    for group in groups:
        parts = dict.fromkeys(part_by_id[id(parameter)] for parameter in group.parameters)
        for part in parts:
            own = tuple(parameter for parameter in group.parameters if part_by_id[id(parameter)] == part)
            split.append((part, replace(group, parameters=own)))
    return split


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
    view: str  # class attribute: the first view of the crop, "image" or "global"

    @staticmethod
    def check_masking(masking: Masking) -> None:
        """ValueError for a strategy whose masks this objective can't use; called before a run starts."""
        ...

    def forward(self, batch: Batch) -> StepOutput:
        """The loss of one micro-batch; `batch.step` is the global optimizer step, counted from 0."""
        ...

    def export_extras(self) -> dict[str, Tensor]:
        """What an export of `encoder` holds besides its backbone (layouts.Weights.extras); usually nothing."""
        ...

    def parameter_groups(self) -> list[ParameterGroup]:
        """The optimizer's groups, in an order that never changes; usually `default_groups(self)`."""
        ...

    def part_of(self, name: str) -> str:
        """The submodel that a parameter belongs to where each is clipped by its own norm; usually `default_part`."""
        ...

    def after_step(self, step: int) -> None:
        """Called on every rank after the optimizer step `step` (EMA, statistics); usually nothing."""
        ...

    def warnings(self, step: int, logs: Mapping[str, float]) -> list[str]:
        """What the reduced logs of a step say that a user should hear of, in words; usually nothing."""
        ...


OBJECTIVES: Registry[Any] = Registry("objective")
