"""The Aim run of a folder, and figures in it; a real Aim repository."""

from __future__ import annotations

from pathlib import Path

import aim
import cv2
import numpy as np
import pytest

from medim_ray.track.aim_run import open_aim_run, repo_of, show_pictures


def picture(level: int) -> bytes:
    done, encoded = cv2.imencode(".png", np.full((4, 6, 3), level, np.uint8))
    assert done
    return encoded.tobytes()


def test_figures_of_a_folder_are_images_of_one_run(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    repo = repo_of(str(folder))
    assert Path(repo) == tmp_path
    assert show_pictures(repo, str(folder), [("loss", picture(10)), ("masks: image 1", picture(20))], step=5) == 2
    assert show_pictures(repo, str(folder), [("loss", picture(30))], step=9) == 1
    assert aim.Repo(repo).list_all_runs() == [(folder / "aim_run").read_text().strip()]
    shown = open_aim_run(repo, str(folder)).collect_sequence_info(("images",))["images"]
    found = {entry["context"]["shows"]: entry["values"] for entry in shown}
    assert sorted(found) == ["loss", "masks: image 1"]
    assert (found["loss"]["first_step"], found["loss"]["last_step"]) == (5, 9)
    assert np.asarray(found["loss"]["last"].to_pil_image()).shape == (4, 6, 3)


def test_a_repository_that_can_not_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RuntimeError, match="did not take the figures"):
        show_pictures(str(tmp_path / "file"), str(tmp_path), [("loss", picture(1))], step=0)
