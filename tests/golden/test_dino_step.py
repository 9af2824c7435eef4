"""A whole DINOv2 step against the paper's own code: losses 1e-5, gradient norms 1e-4 (relative), centres 1e-6."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from medim_ray.objectives.golden_dino import compare

GOLDEN = (Path(__file__).parents[2] / "../shared/golden").resolve()


@pytest.mark.skipif(not GOLDEN.exists(), reason=f"golden numbers are not here: {GOLDEN}")
@pytest.mark.parametrize("seed", [7, 11])
@pytest.mark.parametrize(("file", "centring"), [("centering", "centre"), ("sinkhorn_knopp", "sinkhorn")])
def test_step_is_dinov2s(file: str, centring: str, seed: int) -> None:
    rows = list(compare(np.load(GOLDEN / f"dinov2_step_{file}_{seed}.npz"), centring))
    # 5 losses, 57 parameters of the student, 2 centres: a parameter that gets no gradient is an error of `compare`.
    assert len(rows) == 5 + 57 + 2
    wrong = [row for row in rows if not row.error <= row.tolerance]
    assert not wrong, wrong
