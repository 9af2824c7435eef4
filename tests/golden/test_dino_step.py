"""A whole DINOv2 step against the paper's own code: losses 1e-5, gradient norms 1e-4 (relative), centres 1e-6."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from medim_ray.objectives.check_golden import check
from medim_ray.objectives.golden_dino import build, compare_dino

GOLDEN = (Path(__file__).parents[2] / "../shared/golden").resolve()


@pytest.mark.skipif(not GOLDEN.exists(), reason=f"golden numbers are not here: {GOLDEN}")
@pytest.mark.parametrize("seed", [7, 11])
@pytest.mark.parametrize(("file", "centring"), [("centering", "centre"), ("sinkhorn_knopp", "sinkhorn")])
def test_step_is_dinov2s(file: str, centring: str, seed: int) -> None:
    path = GOLDEN / f"dinov2_step_{file}_{seed}.npz"
    arrays = np.load(path)
    assert build(arrays).config.centring == centring
    lines = compare_dino(arrays)
    # 5 losses, 57 parameters of the student, 2 centres: a parameter that gets no gradient is an error of its own.
    assert len(lines) == 5 + 57 + 2
    assert not [line.what for line in lines if not line.is_ok]
    assert check(path) == 0


@pytest.mark.skipif(not GOLDEN.exists(), reason=f"golden numbers are not here: {GOLDEN}")
def test_a_changed_number_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arrays = dict(np.load(GOLDEN / "dinov2_step_centering_7.npz"))
    arrays["out_ibot_loss"] = arrays["out_ibot_loss"] * (1 + 3e-5)
    np.savez(tmp_path / "changed.npz", **arrays)
    assert check(tmp_path / "changed.npz") == 1
    said = re.search(r"FAILED ibot: error (\S+) is over 1e-05", capsys.readouterr().out)
    assert said is not None
    assert float(said.group(1)) == pytest.approx(3e-5, abs=1e-6)  # ours has an error of its own, by machine


@pytest.mark.skipif(not GOLDEN.exists(), reason=f"golden numbers are not here: {GOLDEN}")
def test_missing_and_unknown_numbers_are_failures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arrays = dict(np.load(GOLDEN / "dinov2_step_centering_7.npz"))
    norm = "gradnorm_backbone.cls_token"
    np.savez(tmp_path / "more.npz", **arrays, gradnorm_new=arrays[norm])
    assert check(tmp_path / "more.npz") == 1
    assert "FAILED gradnorm_new of the file is unknown" in capsys.readouterr().out
    for name in (norm, "out_koleo_loss"):
        np.savez(tmp_path / "fewer.npz", **{key: value for key, value in arrays.items() if key != name})
        assert check(tmp_path / "fewer.npz") == 1
        assert f"FAILED {name} is missing" in capsys.readouterr().out
