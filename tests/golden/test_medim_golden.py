"""check_golden on the numbers of the paper's own code; and that it notices a reference that is 0.1 % off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medim_ray.objectives.check_golden import MEDIM_OUTPUTS, main

GOLDEN = Path(__file__).parents[2] / "../shared/golden"
FILES = [GOLDEN / f"medim_losses_{seed}.npz" for seed in (7, 11)]
pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"{GOLDEN} is not on this machine")


def arrays_of(path: Path) -> dict[str, Any]:
    with np.load(path) as file:
        return {key: file[key] for key in file.files}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_all_quantities_agree(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(path)]) == 0
    printed = capsys.readouterr().out
    assert "DIFFERS" not in printed
    for name in ("ita", "local", "proto", "reconstruction", "acc1", "acc5", "kdm map", "sdm hidden of high"):
        assert name in printed


@pytest.mark.parametrize("key", MEDIM_OUTPUTS)
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_change_of_a_thousandth_is_noticed(
    path: Path, key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arrays = arrays_of(path)
    if arrays[key].dtype == np.bool_:
        arrays[key][0, 0, 0] ^= True  # one patch of 1,176
    else:
        arrays[key] = np.where(arrays[key] == 0, 1e-3, arrays[key] * 1.001).astype(arrays[key].dtype)
    np.savez(tmp_path / "changed.npz", **arrays)
    assert main([str(tmp_path / "changed.npz")]) == 1
    assert "FAILED" in capsys.readouterr().out


@pytest.mark.parametrize("key", MEDIM_OUTPUTS)
def test_a_missing_output_is_a_failure(key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arrays = arrays_of(FILES[0])
    del arrays[key]
    np.savez(tmp_path / "short.npz", **arrays)
    assert main([str(tmp_path / "short.npz")]) == 1
    assert f"{key} is missing" in capsys.readouterr().out


def test_an_unknown_output_is_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "more.npz", **arrays_of(FILES[0]), out_new=np.float32(1.0))
    assert main([str(tmp_path / "more.npz")]) == 1
    assert "out_new of the file is unknown" in capsys.readouterr().out


def test_a_file_of_no_known_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "other.npz", values=np.zeros(3))
    assert main([str(tmp_path / "other.npz")]) == 1
    assert "no golden file of a known kind" in capsys.readouterr().out
    assert main([str(tmp_path / "absent.npz")]) == 1
    assert main([]) == 2
