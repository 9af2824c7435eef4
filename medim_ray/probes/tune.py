"""Training of a head, and of the encoder below it, on images in memory: layer decay, early stopping by what is judged.

The loss and what is judged are the caller's (segment_trained.py, finetune.py). A function of its arguments: batches
come from a Generator of the seed, and torch's own randomness (first weights, stochastic depth) from a forked state.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from medim_ray.config.probe import FitConfig, TuneConfig
from medim_ray.probes.trainable import Trainable

_NUM_LOOKS = 10
_PATIENCE = 3  # looks without gain
_WARMUP_RATIO = 0.1


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """best: the smallest value that was judged, at optimizer step `step` (0: before the first) of `steps` done."""

    best: float
    step: int
    steps: int


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """torch's CPU generator begins at `seed` inside and goes on as before outside."""
    with torch.random.fork_rng(devices=[]):
        torch.random.manual_seed(seed)
        yield


def parameter_groups(encoder: Trainable, head: nn.Module, config: FitConfig, trains: bool) -> list[dict[str, Any]]:
    """Groups of AdamW with `lr_ratio`: 1 for the head, layer_decay ** (layers above) for the encoder where it `trains`.

    The head counts as a layer, so the encoder's highest learns by layer_decay; no weight decay on biases, norms and
    other one-dimensional parameters.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for parameter in head.parameters():
        if parameter.requires_grad:
            groups.setdefault((1.0, parameter.ndim > 1), []).append(parameter)
    for name, parameter in encoder.named_parameters() if trains else ():
        assert isinstance(config, TuneConfig), "an encoder learns with layer decay"
        ratio = config.layer_decay ** (encoder.num_layers - encoder.layer_of(name))
        groups.setdefault((ratio, parameter.ndim > 1), []).append(parameter)
    return [
        {"params": members, "lr_ratio": ratio, "weight_decay": config.weight_decay * decays}
        for (ratio, decays), members in groups.items()
    ]


def fit(
    encoder: Trainable,
    head: nn.Module,
    num: int,
    loss_of: Callable[[NDArray[np.int64]], Tensor],
    judge: Callable[[], float],
    config: FitConfig,
    seed: int,
    trains: bool,
) -> Fitted:
    """Trains head and, where it `trains`, encoder in place; leaves the weights with the smallest `judge()`, those of
    the start among them.

    num: images; loss_of: of a batch of their positions; judge: called without gradients and in evaluation mode. A
    frozen encoder stays in evaluation mode.
    """
    optimizer = torch.optim.AdamW(parameter_groups(encoder, head, config, trains), lr=config.lr)
    modules = nn.ModuleList([encoder, head] if trains else [head])
    batches = _batches(num, config.batch, seed)
    every = max(1, config.steps // _NUM_LOOKS)
    best, best_step, best_state = _look(encoder, head, judge), 0, _state(modules)
    step = 0
    while step < config.steps:
        encoder.train(trains)
        head.train()
        for group in optimizer.param_groups:
            group["lr"] = config.lr * group["lr_ratio"] * schedule(step, config.steps)
        loss = loss_of(next(batches))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % every and step < config.steps:
            continue
        value = _look(encoder, head, judge)
        if value < best:
            best, best_step, best_state = value, step, _state(modules)
        elif step - best_step >= _PATIENCE * every:
            break
    modules.load_state_dict(best_state, strict=False)
    encoder.eval()
    head.eval()
    return Fitted(best=best, step=best_step, steps=step)


def schedule(step: int, steps: int) -> float:
    """Share of the peak learning rate: linear warm-up over a tenth of the steps, then a cosine to zero."""
    warmup = max(1, round(_WARMUP_RATIO * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _state(modules: nn.Module) -> dict[str, Tensor]:
    """A copy of what training may change: a language model that stays frozen is not copied."""
    frozen = {name for name, parameter in modules.named_parameters() if not parameter.requires_grad}
    return {name: value.detach().clone() for name, value in modules.state_dict().items() if name not in frozen}


@torch.no_grad()
def _look(encoder: nn.Module, head: nn.Module, judge: Callable[[], float]) -> float:
    encoder.eval()
    head.eval()
    return judge()


def _batches(num: int, size: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Epochs in drawn orders, in batches of one size; what is left over of an epoch is not seen in it."""
    rng = np.random.default_rng(seed)
    size = min(size, num)
    while True:
        order = rng.permutation(num)
        for start in range(0, num - size + 1, size):
            yield order[start : start + size]
