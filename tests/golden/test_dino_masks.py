"""check_golden on the statistics of DINOv2's block masks; and that it notices what is changed, missing or unknown."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medim_ray.objectives.check_golden import main
from medim_ray.objectives.golden_masks import COLUMNS, SETTINGS, compare_masks, drawn_values

GOLDEN = (Path(__file__).parents[2] / "../shared/golden/dinov2_masks.npz").resolve()
pytestmark = pytest.mark.skipif(not GOLDEN.exists(), reason=f"golden numbers are not here: {GOLDEN}")

ROWS = range(len(SETTINGS))


def golden() -> dict[str, Any]:
    return dict(np.load(GOLDEN))


def checked(path: Path, arrays: dict[str, Any]) -> int:
    np.savez(path / "changed.npz", **arrays)
    return main([str(path / "changed.npz")])


def with_value(row: int, column: str, value: float) -> dict[str, Any]:
    arrays = golden()
    arrays["rows"][row, arrays["columns"].tolist().index(column)] = value
    return arrays


def limits(row: int, column: str) -> tuple[float, float]:
    """The smallest and the largest reference that agrees with our masks."""
    side, ratio = SETTINGS[row]
    line = next(line for line in compare_masks(golden()) if line.key == f"{side}x{side} {ratio} {column}")
    ours = line.ours
    if column == "min_masked":  # any number of the range over our batches agrees
        ours = drawn_values(side, int(side * side * ratio))["mean_masked"].min(axis=1)
    return float(ours.min()) - line.tolerance, float(ours.max()) + line.tolerance


def test_statistics_are_dinov2s(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(GOLDEN)]) == 0
    printed = capsys.readouterr().out
    assert "DIFFERS" not in printed
    assert len(printed.splitlines()) == 1 + len(ROWS) * len(COLUMNS)
    # All of the file but the two columns that say what a row is of.
    assert set(COLUMNS) == set(golden()["columns"].tolist()) - {"grid", "ratio"}


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("row", ROWS)
def test_a_statistic_agrees_up_to_its_tolerance_and_no_further(
    row: int, column: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    low, high = limits(row, column)
    inside = 0.01 * (high - low)
    for value in (low + inside, high - inside):
        assert checked(tmp_path, with_value(row, column, value)) == 0
    for value in (low - inside - 1e-3, high + inside + 1e-3, float("nan")):
        capsys.readouterr()
        assert checked(tmp_path, with_value(row, column, value)) == 1
        printed = capsys.readouterr().out
        assert printed.count("DIFFERS") == 1
        assert re.search(rf"^FAILED .* {column}( \(\w+ batch\))?: error", printed, re.M)


def test_tolerances_are_three_standard_errors_and_two_patches() -> None:
    lines = {line.key: line for line in compare_masks(golden())}
    side, ratio = SETTINGS[1]
    share = float(lines[f"{side}x{side} {ratio} p_centre"].ours)
    error = 3 * np.sqrt(2 * share * (1 - share) / 2000)  # of the difference of two shares of 2,000 each
    assert lines[f"{side}x{side} {ratio} p_centre"].tolerance == pytest.approx(error, rel=1e-9)
    assert {line.tolerance for key, line in lines.items() if key.endswith(("min_masked", "max_masked"))} == {2.0}


@pytest.mark.parametrize("column", golden()["columns"].tolist() if GOLDEN.exists() else [])
def test_a_missing_column_is_a_failure(column: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arrays = golden()
    kept = arrays["columns"] != column
    assert checked(tmp_path, {"columns": arrays["columns"][kept], "rows": arrays["rows"][:, kept]}) == 1
    assert f"{column} is missing in the file" in capsys.readouterr().out


@pytest.mark.parametrize("row", ROWS)
def test_a_missing_row_and_one_of_other_masks_are_failures(
    row: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    side, ratio = SETTINGS[row]
    arrays = golden()
    assert checked(tmp_path, arrays | {"rows": np.delete(arrays["rows"], row, axis=0)}) == 1
    assert f"FAILED {side}x{side} {ratio} p_centre is missing" in capsys.readouterr().out
    for column, value, shown in (("grid", 14, f"14x14 {ratio}"), ("ratio", 0.2, f"{side}x{side} 0.2")):
        assert checked(tmp_path, with_value(row, column, value)) == 1
        assert f"FAILED {shown} p_centre of the file is unknown" in capsys.readouterr().out


def test_unknown_and_missing_arrays_and_broken_tables_are_failures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arrays = golden()
    column = arrays["columns"], np.array(["p_edge"])
    more = {"columns": np.concatenate(column), "rows": np.pad(arrays["rows"], ((0, 0), (0, 1)))}
    cases = {
        "FAILED 16x16 0.1 p_edge of the file is unknown": more,
        "FAILED out_new of the file is unknown": arrays | {"out_new": np.zeros(2)},
        "FAILED columns is missing": {"rows": arrays["rows"]},
        "FAILED rows is missing": {"columns": arrays["columns"]},
        "FAILED rows has the shape (6, 8)": arrays | {"rows": arrays["rows"][:, 1:]},
        "is in the file twice": arrays | {"rows": arrays["rows"].repeat(2, axis=0)},
    }
    for message, changed in cases.items():
        assert checked(tmp_path, changed) == 1
        assert message in capsys.readouterr().out
