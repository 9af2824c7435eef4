"""Decoders and projections: each place of the grid ends at its place in the image, whatever order it came in."""

from __future__ import annotations

import pytest
import torch

from medim_ray.models.decoder import MaeDecoder, SetrDecoder, sine_positions
from medim_ray.models.heads import Projection
from medim_ray.types import Grid

GRID = Grid(4, 6)


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_positions_tell_rows_from_columns() -> None:
    positions_ND = sine_positions(GRID, 32)
    assert positions_ND.shape == (24, 32)
    assert len(torch.unique(positions_ND, dim=0)) == 24
    by_row, by_column = positions_ND.view(4, 6, 32)[..., :16], positions_ND.view(4, 6, 32)[..., 16:]
    torch.testing.assert_close(by_row[:, :1].expand_as(by_row), by_row)
    torch.testing.assert_close(by_column[:1].expand_as(by_column), by_column)


def test_mae_decoder_does_not_care_in_which_order_patches_come() -> None:
    torch.manual_seed(0)
    decoder = MaeDecoder(20, GRID, 8, width=32, depth=1, num_heads=4)
    cls, patches, order = rand(2, 20), rand(2, 6, 20), torch.randperm(6, generator=torch.Generator().manual_seed(1))
    visible = torch.tensor([[1, 4, 7, 12, 13, 23], [0, 2, 3, 9, 10, 11]])
    out = decoder(cls, patches, visible)
    assert out.shape == (2, 24, 64)
    torch.testing.assert_close(decoder(cls, patches[:, order], visible[:, order]), out, rtol=1e-4, atol=1e-5)
    assert (decoder(cls, patches, visible.roll(1, 1)) - out).abs().max() > 1e-3


@pytest.mark.parametrize(("patch_size", "num_stages"), [(16, 4), (8, 3), (14, 4), (32, 5)])
def test_setr_decoder_reaches_the_image_size(patch_size: int, num_stages: int) -> None:
    torch.manual_seed(0)
    decoder = SetrDecoder(10, GRID, patch_size, (16, 8, 8, 4), num_heads=2, norm="layer")
    assert len(decoder.stages) == num_stages
    features = rand(2, 3, 24, 10)
    images = decoder(features)
    assert images.shape == (2, 3, 1, 4 * patch_size, 6 * patch_size)
    # A change of the last patch moves its corner of its own image most, and the other strategy not at all.
    features[1, 2, 23] += 5.0
    change = (decoder(features) - images).abs()
    assert (change[0] == 0).all() and (change[1, :2] == 0).all()
    corner = change[1, 2, 0, -patch_size:, -patch_size:]
    assert corner.mean() > 3 * change[1, 2, 0].mean()


def test_heads_differ_by_strategy() -> None:
    torch.manual_seed(0)
    decoder = SetrDecoder(10, GRID, 8, (8,), num_heads=2, norm="batch")
    same = rand(1, 3, 24, 10).expand(2, -1, -1, -1)
    images = decoder(same)
    assert (images[0] - images[1]).abs().max() > 1e-3


@pytest.mark.parametrize("norm", ["batch", "sync_batch", "layer"])
def test_projection_is_of_unit_norm_and_float32(norm: str) -> None:
    torch.manual_seed(0)
    head = Projection(20, 32, 8, norm).bfloat16()
    out = head(rand(4, 7, 20).bfloat16())
    assert out.dtype == torch.float32 and out.shape == (4, 7, 8)
    torch.testing.assert_close(out.norm(dim=-1), torch.ones(4, 7))


def test_bad_width() -> None:
    with pytest.raises(ValueError, match="decoder_width=30"):
        MaeDecoder(20, GRID, 8, width=30, depth=1, num_heads=3)
