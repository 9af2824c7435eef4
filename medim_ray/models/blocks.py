"""Blocks of a transformer computed again in the backward pass, or compiled: the same numbers for other time and memory.

Encoders and decoders with blocks have `checkpoint_activations` and `compile_blocks`; here are the calls for a whole
objective, and how one block runs. What is worth it is the user's choice (`train.activation_checkpointing`,
`train.compile`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from medim_ray.models.norms import BatchNorm

_PLAIN_TOKENS = 512  # up to so many tokens, see `attends_plainly`


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


def attends_plainly(x_BLD: Tensor) -> bool:
    """Whether two products and a softmax are to take the place of torch's fused attention: on a CPU in 16 bits, whose
    fused backward pass takes 2 to 8 times as long (50 to 257 tokens). In float32, and on a GPU, the fused one is it."""
    half = x_BLD.dtype in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled("cpu")
    return x_BLD.device.type == "cpu" and half and x_BLD.shape[1] <= _PLAIN_TOKENS


def pick_attention(blocks: Iterable[Any], x_BLD: Tensor) -> None:
    """Tells timm blocks which of the two to run for tokens such as `x_BLD`."""
    fused = not attends_plainly(x_BLD)
    for block in blocks:
        block.attn.fused_attn = fused


def attention(query_BHLd: Tensor, key_BHLd: Tensor, value_BHLd: Tensor, dropout: float = 0.0) -> Tensor:
    """[B, H, L, d] what the tokens take from each other, by whichever of the two is faster."""
    if attends_plainly(query_BHLd.flatten(0, 1)):
        scores_BHLL = (query_BHLd * query_BHLd.shape[-1] ** -0.5) @ key_BHLd.transpose(-2, -1)
        return F.dropout(scores_BHLL.softmax(dim=-1), dropout) @ value_BHLd
    return F.scaled_dot_product_attention(query_BHLd, key_BHLd, value_BHLd, dropout_p=dropout)


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
