"""DINOv2's cosine schedules, from its own code, to 1e-9."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from medim_ray.schedules import Schedule, cosine, tabulate

GOLDEN = (Path(__file__).parents[2] / "../shared/golden/schedules.npz").resolve()

CURVES = {
    "cosine_0": cosine(0.004, 1e-6, 200, warmup_steps=20),
    "cosine_1": cosine(0.04, 0.4, 200),
    "cosine_2": cosine(0.992, 1.0, 200),
    "cosine_3": cosine(0.002, 1e-6, 200, warmup_steps=20, frozen_steps=10),
}


@pytest.mark.skipif(not GOLDEN.exists(), reason=f"golden numbers are not here: {GOLDEN}")
@pytest.mark.parametrize(("name", "schedule"), CURVES.items())
def test_curve_is_dinov2s(name: str, schedule: Schedule) -> None:
    want = np.load(GOLDEN)[name]
    np.testing.assert_allclose(tabulate(schedule, len(want)), want, rtol=0, atol=1e-9)
