"""Blocks of a transformer computed again in the backward pass, or compiled: the same numbers for other time and memory.

Encoders and decoders with blocks have `checkpoint_activations` and `compile_blocks`; here are the calls for a whole
objective, and how one block runs. What is worth it is the user's choice (`train.activation_checkpointing`,
`train.compile`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from medim_ray.models.norms import BatchNorm


def checkpoint_activations(module: nn.Module) -> None:
    """From now on every part of `module` that has blocks keeps their inputs only while it trains."""
    for part in module.modules():
        enable: Callable[[], None] | None = getattr(part, "checkpoint_activations", None)
        if enable is not None:
            enable()


def compile_blocks(module: nn.Module) -> None:
    """Compiles the blocks of every part of `module` in place, at their first call; names and weights stay."""
    for part in module.modules():
        enable: Callable[[], None] | None = getattr(part, "compile_blocks", None)
        if enable is not None:
            enable()


def recomputed(block: Callable[..., Any], *inputs: Any) -> Any:
    """`block(*inputs)`, of which the backward pass finds only the inputs: it draws the same random numbers again, and
    running statistics inside `block` move once."""
    norms = [norm for norm in block.modules() if isinstance(norm, BatchNorm)] if isinstance(block, nn.Module) else []
    return checkpoint(
        block, *inputs, use_reentrant=False, context_fn=lambda: (contextlib.nullcontext(), _standing_still(norms))
    )


@contextlib.contextmanager
def _standing_still(norms: Iterable[BatchNorm]) -> Iterator[None]:
    """Batch norms that normalise by the batch and do not learn from it."""
    momenta = {norm: norm.momentum for norm in norms}
    for norm in momenta:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in momenta.items():
            norm.momentum = momentum
