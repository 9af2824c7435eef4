"""Norm layers: equal to torch's where torch has them; synced statistics equal the statistics of the joined batch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from medim_ray.models.collectives import all_gather_rows
from medim_ray.models.norms import BatchNorm, build_norm


def values(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * 3 + 1


@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 5), (6, 4, 3, 3)])
def test_equals_torch_in_both_modes(shape: tuple[int, ...]) -> None:
    ours = BatchNorm(4)
    reference = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}[len(shape)](4)
    for mode in (True, True, False):
        ours.train(mode)
        reference.train(mode)
        torch.testing.assert_close(ours(values(*shape)), reference(values(*shape)))
    torch.testing.assert_close(ours.running_var, reference.running_var)


def test_bf16_parameters_with_float32_statistics() -> None:
    layer = BatchNorm(4)
    layer.weight.data = layer.weight.data.bfloat16()
    layer.bias.data = layer.bias.data.bfloat16()
    y = layer(values(64, 4).bfloat16())
    assert y.dtype == torch.bfloat16 and layer.running_mean is not None and layer.running_mean.dtype == torch.float32
    assert y.float().mean(0).abs().max() < 0.02 and (y.float().std(0) - 1).abs().max() < 0.05


def test_a_single_sample_does_not_break() -> None:
    layer = BatchNorm(4)
    layer(values(8, 4))
    assert layer.running_var is not None
    before = layer.running_var.clone()
    assert torch.isfinite(layer(values(1, 4))).all()
    torch.testing.assert_close(layer.running_var, before)


def test_layer_norm_ignores_neighbours() -> None:
    layer = build_norm("layer", 4)
    torch.testing.assert_close(layer(values(6, 4, 5))[:2], layer(values(6, 4, 5)[:2]))


def _rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    x = values(6, 4, 5)[rank * 3 : rank * 3 + 3].requires_grad_()
    layer = BatchNorm(4, sync=True)
    y = layer(x)
    (y.pow(3) * values(6, 4, 5)[rank * 3 : rank * 3 + 3]).sum().backward()
    rows = all_gather_rows(values(2, 3) * (rank + 1))
    assert torch.equal(rows, torch.cat([values(2, 3), values(2, 3) * 2]))
    torch.save((y.detach(), x.grad, layer.running_var), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_synced_over_two_ranks_equals_the_joined_batch(tmp_path: Path) -> None:
    ranks = [subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path)]) for rank in (0, 1)]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    x = values(6, 4, 5).requires_grad_()
    layer = BatchNorm(4)
    y = layer(x)
    (y.pow(3) * values(6, 4, 5)).sum().backward()
    (y_0, grad_0, var_0), (y_1, grad_1, _) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    torch.testing.assert_close(torch.cat([y_0, y_1]), y.detach())
    torch.testing.assert_close(torch.cat([grad_0, grad_1]), x.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(var_0, layer.running_var)


if __name__ == "__main__":
    _rank(int(sys.argv[1]), sys.argv[2])
