"""Loss terms in float32, whatever the precision of the step."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

_HALF = (torch.bfloat16, torch.float16)
_Function = TypeVar("_Function", bound=Callable[..., Any])


def in_float32(function: _Function) -> _Function:
    """Half-precision tensors among the arguments become float32, and autocast is off inside.

    A product of embeddings in bf16 is wrong by 7e-4 of the contrast and by 8e-3 of an attention map (so other patches
    are hidden), and the exponential of a score overflows fp16.
    """

    @functools.wraps(function)
    def run(*args: Any, **options: Any) -> Any:
        args = tuple(map(_single, args))
        options = {name: _single(value) for name, value in options.items()}
        device = next(value.device.type for value in (*args, *options.values()) if isinstance(value, Tensor))
        with torch.autocast(device, enabled=False):
            return function(*args, **options)

    return cast(_Function, run)


def _single(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in _HALF else value
