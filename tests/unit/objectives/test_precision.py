"""Terms and attention maps are those of float32 under autocast, as DeepSpeed turns it on at ZeRO stage 0."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from medim_ray.objectives import dino_losses, losses

B, W, N, D = 6, 5, 9, 16


def embeddings() -> tuple[Tensor, ...]:
    """Aligned words and patches, whose scores are the largest there can be."""
    generator = torch.Generator().manual_seed(0)
    images_BD, reports_BD = (F.normalize(torch.randn(B, D, generator=generator), dim=-1) for _ in range(2))
    patches_BND = F.normalize(torch.randn(B, N, D, generator=generator), dim=-1)
    words_BWD = F.normalize(patches_BND[:, :W] + 0.1 * torch.randn(B, W, D, generator=generator), dim=-1)
    return images_BD, reports_BD, words_BWD, patches_BND


def _local(words_BWD: Tensor, patches_BND: Tensor) -> tuple[Tensor, Tensor]:
    is_pad_BW = torch.zeros(B, W, dtype=torch.bool)
    weights = torch.full((B, W), 1 / W), torch.full((B, N), 1 / N)
    return losses.local_alignment(words_BWD, patches_BND, is_pad_BW, *weights, 0.07, False)


TERMS: dict[str, Callable[..., Any]] = {
    "ita": lambda i, r, w, p: losses.image_text_contrast(i, r, 0.07, i, r, 0),
    "local": lambda i, r, w, p: _local(w, p),
    "attention": lambda i, r, w, p: losses.word_patch_attention(w, p, 0.07),
    "contrast": lambda i, r, w, p: losses.word_contrast(
        w, p, torch.arange(B * W).reshape(B, W) + 1, torch.ones(B, W, dtype=torch.bool), 0.07
    ),
    "proto": lambda i, r, w, p: losses.prototype_prediction(i, r, F.normalize(p[:, 0], dim=-1), 0.2, 0.05),
    "koleo": lambda i, r, w, p: dino_losses.koleo_loss(i, False),
    "rank": lambda i, r, w, p: dino_losses.effective_rank(i),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", TERMS)
def test_autocast_changes_no_term(name: str, dtype: torch.dtype) -> None:
    plain = TERMS[name](*embeddings())
    with torch.autocast("cpu", dtype=dtype):
        cast = TERMS[name](*embeddings())
    torch.testing.assert_close(cast, plain, rtol=0, atol=0)
    halves = TERMS[name](*(tensor.to(dtype) for tensor in embeddings()))  # parameters in half precision: stages 1 to 3
    for value in halves if isinstance(halves, tuple) else (halves,):
        assert value.dtype == torch.float32 and value.isfinite().all()
