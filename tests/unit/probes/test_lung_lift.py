"""Lung lift: the share of a patch that lies in the boxes, and tables that lack them."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from medim_ray.probes.lung_lift import lung_shares, read_rows
from medim_ray.types import Grid


def test_shares_are_of_the_union_of_the_boxes_in_the_crop() -> None:
    whole = np.array([0, 0, 1, 1], np.float32)
    shares = lung_shares([(0, 0, 50, 100), (25, 0, 25, 100)], (200, 100), whole, Grid(2, 4))
    assert shares.tolist() == [1, 1, 0, 0, 0, 0, 0, 0], "the upper left quarter, overlaps once"
    right = lung_shares([(75, 50, 25, 50)], (200, 100), np.array([0, 0.5, 1, 1], np.float32), Grid(2, 2))
    assert right.tolist() == [0, 0.5, 0, 0]
    padded = lung_shares([(0, 0, 100, 100)], (100, 100), np.array([0, -0.5, 1, 1.5], np.float32), Grid(1, 4))
    assert padded.tolist() == [0, 1, 1, 0], "padding is no lung"


def test_rows_are_those_with_a_report(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((4, 4), np.uint8))
    head = "image_id,patient_id,file,notes,right_lung_xywh,left_lung_xywh\n"
    table = tmp_path / "t.csv"
    table.write_text(head + 'a,p,a.png,Clear.,"[0, 1, 2, 3]",\nb,p,gone.png, ,"[0, 1, 2, 3]","[0, 1, 2, 3]"\n')
    rows = read_rows(str(table), str(tmp_path), "notes")
    assert [(row["image_id"], row["boxes"]) for row in rows] == [("a", [[0, 1, 2, 3]])]
    with pytest.raises(ValueError, match=r"lacks the columns impression"):
        read_rows(str(table), str(tmp_path), "impression")
    table.write_text(head + "a,p,a.png,,,\n")
    with pytest.raises(ValueError, match="no row has text in notes"):
        read_rows(str(table), str(tmp_path), "notes")
