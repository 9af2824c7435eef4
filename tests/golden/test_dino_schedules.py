"""check_golden on DINOv2's cosine schedules, to 1e-9; and that it notices what is changed, missing or unknown."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from medim_ray.objectives.check_golden import main
from medim_ray.objectives.golden_schedules import CURVES

GOLDEN = (Path(__file__).parents[2] / "../shared/golden/schedules.npz").resolve()
pytestmark = pytest.mark.skipif(not GOLDEN.exists(), reason=f"golden numbers are not here: {GOLDEN}")


def test_curves_are_dinov2s(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(GOLDEN)]) == 0
    printed = capsys.readouterr().out
    assert "DIFFERS" not in printed
    assert [line.split()[0] for line in printed.splitlines()] == ["quantity", *np.load(GOLDEN).files]


@pytest.mark.parametrize("entries", [slice(None), slice(50, 51), slice(199, 200)], ids=["all", "one", "the last"])
@pytest.mark.parametrize("name", CURVES)
def test_a_change_of_a_thousandth_is_noticed(
    name: str, entries: slice, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arrays = dict(np.load(GOLDEN))
    arrays[name][entries] *= 1.001
    np.savez(tmp_path / "changed.npz", **arrays)
    assert main([str(tmp_path / "changed.npz")]) == 1
    assert f"FAILED {name}: error 9.99e-04 is over 1e-09" in capsys.readouterr().out


@pytest.mark.parametrize("name", CURVES)
def test_a_short_curve_and_a_value_that_is_no_number_are_noticed(name: str, tmp_path: Path) -> None:
    arrays = dict(np.load(GOLDEN))
    np.savez(tmp_path / "short.npz", **arrays | {name: arrays[name][:-1]})
    assert main([str(tmp_path / "short.npz")]) == 1
    arrays[name][3] = np.nan
    np.savez(tmp_path / "nan.npz", **arrays)
    assert main([str(tmp_path / "nan.npz")]) == 1


@pytest.mark.parametrize("name", CURVES)
def test_a_missing_or_unknown_curve_is_a_failure(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arrays = dict(np.load(GOLDEN))
    np.savez(tmp_path / "more.npz", **arrays, cosine_4=arrays[name])
    assert main([str(tmp_path / "more.npz")]) == 1
    assert "FAILED cosine_4 of the file is unknown" in capsys.readouterr().out
    del arrays[name]
    np.savez(tmp_path / "fewer.npz", **arrays)
    assert main([str(tmp_path / "fewer.npz")]) == 1
    assert f"FAILED {name} is missing" in capsys.readouterr().out
