"""Normalisation that survives DeepSpeed's bf16: statistics and arithmetic in float32, whatever the parameters are.

torch refuses a batch norm with bf16 weights and float32 statistics, which is what DeepSpeed leaves behind; and its
SyncBatchNorm runs on GPUs only. No layer here knows an objective.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medim_ray.models.collectives import all_reduce_sum, num_ranks


class BatchNorm(nn.BatchNorm1d):
    """Batch norm over channel axis 1 of [B, C] or [B, C, ...]; output in the input's dtype.

    sync: statistics over the samples of all ranks (equal counts a rank), on any backend. A single value a channel has
    no variance: the layer then normalises with its running statistics.
    """

    def __init__(
        self,
        num_features: int,
        affine: bool = True,
        sync: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, affine=affine, device=device, dtype=dtype)
        self.sync = sync

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.float() if self.weight is not None else None
        bias = self.bias.float() if self.bias is not None else None
        mean, var = self.running_mean, self.running_var
        assert mean is not None and var is not None
        mean_C, var_C = mean.float(), var.float()  # the buffers themselves where they are float32
        count = x.numel() // x.shape[1]
        ranks = num_ranks() if self.sync else 1
        if self.training and ranks > 1:
            return self._synced(x, count * ranks, ranks)
        training = self.training and count > 1
        y = F.batch_norm(x, mean_C, var_C, weight, bias, training, self.momentum or 0.0, self.eps)
        if training and mean_C is not mean:
            mean.copy_(mean_C)
            var.copy_(var_C)
        return y

    def _synced(self, x: Tensor, count: int, ranks: int) -> Tensor:
        assert self.running_mean is not None and self.running_var is not None
        axes = [axis for axis in range(x.dim()) if axis != 1]
        shape = [1, -1] + [1] * (x.dim() - 2)
        x32 = x.float()
        # Two reductions rather than E[x^2] - E[x]^2, which cancels.
        mean_C = all_reduce_sum(x32.mean(axes)) / ranks
        centred = x32 - mean_C.view(shape)
        var_C = all_reduce_sum(centred.square().mean(axes)) / ranks
        with torch.no_grad():
            momentum = self.momentum or 0.0
            self.running_mean.lerp_(mean_C.detach().to(self.running_mean.dtype), momentum)
            unbiased_C = var_C.detach() * count / max(count - 1, 1)
            self.running_var.lerp_(unbiased_C.to(self.running_var.dtype), momentum)
        y = centred * torch.rsqrt(var_C + self.eps).view(shape)
        if self.weight is not None:
            y = y * self.weight.float().view(shape) + self.bias.float().view(shape)
        return y.to(x.dtype)

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002 - torch's name
        assert input.dim() >= 2


class ChannelLayerNorm(nn.LayerNorm):
    """LayerNorm over channel axis 1 of [B, C] or [B, C, ...]: no dependence on batch neighbours."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def build_norm(kind: str, num_features: int, affine: bool = True) -> nn.Module:
    """The norm called 'batch', 'sync_batch' or 'layer', over channel axis 1."""
    if kind == "layer":
        return ChannelLayerNorm(num_features, elementwise_affine=affine)
    assert kind in ("batch", "sync_batch"), kind
    return BatchNorm(num_features, affine=affine, sync=kind == "sync_batch")
