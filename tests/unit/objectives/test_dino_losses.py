"""DINO, iBOT, KoLeo and Sinkhorn: against plain spellings, and over two ranks against the joined batch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from medim_ray.objectives import dino_losses as losses


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_dino_loss_is_the_sum_over_pairs() -> None:
    student_SBK, teacher_TBK = normal(3, 5, 7).requires_grad_(), normal(2, 5, 7, seed=1).softmax(-1)
    pairs = [
        -(t_BK * (s_BK / 0.1).log_softmax(-1)).sum(-1).mean() for s_BK in student_SBK for t_BK in teacher_TBK.unbind()
    ]
    expected = torch.stack(pairs).sum()
    ours = losses.dino_loss(student_SBK, teacher_TBK, 0.1)
    torch.testing.assert_close(ours, expected)
    (gradient,) = torch.autograd.grad(ours, student_SBK, retain_graph=True)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, student_SBK)[0])


def test_ibot_divides_by_all_crops_and_is_zero_without_masks() -> None:
    scores_MK, targets_MK = normal(3, 7), normal(3, 7, seed=1).softmax(-1)
    weights_M = torch.tensor([0.5, 0.5, 1.0])  # two patches of one crop, one of another; two crops are whole
    terms = [-(t * (s / 0.1).log_softmax(-1)).sum() for s, t in zip(scores_MK, targets_MK, strict=True)]
    expected = ((terms[0] + terms[1]) / 2 + terms[2]) / 4
    torch.testing.assert_close(losses.ibot_loss(scores_MK, targets_MK, weights_M, 4, 0.1), expected)
    many_MK, others_MK = normal(37, 7).requires_grad_(), normal(37, 7, seed=1).softmax(-1)  # more than go at a time
    weights_M = normal(37, seed=2).abs()
    plain = -((others_MK * (many_MK / 0.1).log_softmax(-1)).sum(-1) * weights_M).sum() / 4
    ours = losses.ibot_loss(many_MK, others_MK, weights_M, 4, 0.1)
    torch.testing.assert_close(ours, plain)
    gradients = [torch.autograd.grad(3 * loss, many_MK, retain_graph=True)[0] for loss in (ours, plain)]
    torch.testing.assert_close(*gradients)
    nothing = normal(0, 7).requires_grad_()
    loss = losses.ibot_loss(nothing, nothing.detach(), torch.zeros(0), 4, 0.1)
    loss.backward()
    assert float(loss.detach()) == 0.0


@settings(max_examples=30, deadline=None)
@given(num=st.integers(1, 40), num_prototypes=st.integers(2, 60), temperature=st.floats(0.02, 1.0))
def test_sinkhorn_rows_sum_to_one_and_prototypes_share_alike(num: int, num_prototypes: int, temperature: float) -> None:
    scores = normal(num, num_prototypes).tanh()
    weights = losses.sinkhorn(scores, temperature)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(num), rtol=1e-4, atol=0)
    assert torch.isfinite(weights).all()
    if temperature > 0.3:
        share = weights.sum(dim=0) * num_prototypes / num
        assert share.min() > 0.6 and share.max() < 1.6


def test_sinkhorn_does_not_overflow_and_ignores_a_common_offset() -> None:
    scores = normal(16, 8) * 20
    weights = losses.sinkhorn(scores, 0.04)
    assert torch.isfinite(weights).all()
    torch.testing.assert_close(losses.sinkhorn(normal(16, 8) + 3, 0.5), losses.sinkhorn(normal(16, 8), 0.5))


def test_koleo_is_minus_the_log_distance_to_the_nearest_neighbour() -> None:
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-3.0, 0.0]])
    loss, distance = losses.koleo_loss(rows, gather=False)
    torch.testing.assert_close(loss, -torch.tensor(2.0).sqrt().log())
    torch.testing.assert_close(distance, torch.tensor(2.0).sqrt())


def test_health_numbers_at_their_extremes() -> None:
    assert float(losses.entropy(torch.full((3, 8), 1 / 8))) == pytest.approx(torch.tensor(8.0).log().item())
    assert float(losses.entropy(torch.eye(4))) == 0.0
    assert float(losses.effective_rank(torch.outer(torch.arange(5.0), normal(6)))) == pytest.approx(1.0)
    assert float(losses.effective_rank(torch.eye(6))) == pytest.approx(5.0)  # six points, five directions


def _losses(scores: Tensor, features: Tensor) -> Tensor:
    targets = losses.sinkhorn(scores.detach(), 0.1)
    koleo, _ = losses.koleo_loss(features, gather=True)
    weights = torch.full((len(scores),), 1 / len(scores))
    return losses.ibot_loss(scores, targets, weights, 1, 0.1) + koleo


def _rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    part = slice(rank * 4, rank * 4 + 4)
    scores, features = normal(8, 6)[part].requires_grad_(), normal(8, 5, seed=1)[part].requires_grad_()
    loss = _losses(scores, features)
    loss.backward()
    uneven = losses.sinkhorn(normal(5, 6)[: 5 * rank], 0.1)  # rank 0 has no row
    torch.save((loss.detach(), scores.grad, features.grad, uneven), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_equal_the_joined_batch(tmp_path: Path) -> None:
    ranks = [subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path)]) for rank in (0, 1)]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    scores, features = normal(8, 6).requires_grad_(), normal(8, 5, seed=1).requires_grad_()
    loss = _losses(scores, features)
    loss.backward()
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    torch.testing.assert_close((results[0][0] + results[1][0]) / 2, loss.detach())
    for index, tensor in ((1, scores), (2, features)):
        torch.testing.assert_close(torch.cat([result[index] for result in results]) / 2, tensor.grad)
    assert len(results[0][3]) == 0
    torch.testing.assert_close(results[1][3], losses.sinkhorn(normal(5, 6), 0.1))


if __name__ == "__main__":
    _rank(int(sys.argv[1]), sys.argv[2])
