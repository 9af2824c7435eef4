"""The anatomy prior against the truth of phantoms: it was written without them and must still find their lesions."""

from __future__ import annotations

import numpy as np
import torch

from medim_ray.data.phantom import render
from medim_ray.masking.prior import patch_maps, places_of
from medim_ray.probes.localise import judge_map, patch_counts
from medim_ray.reports.tagger import Tagger
from medim_ray.types import Grid


def test_the_prior_alone_hides_most_of_the_lesions() -> None:
    grid, tagger, whole = Grid(14, 14), Tagger(), np.array([[0, 0, 1, 1]], np.float32)
    numbers: list[tuple[float, float]] = []
    mirrored: list[tuple[float, float]] = []
    for index in range(24):
        study = render(index, seed=77, size=112)
        masks = [lesion.mask_HW for lesion in study.lesions if lesion.mask_HW.any()]
        if masks:
            map_HW = patch_maps([places_of(tagger.tag(study.report))], whole, grid).reshape(14, 14)
            for results, side in ((numbers, map_HW), (mirrored, map_HW[:, ::-1])):
                flat = torch.from_numpy(np.ascontiguousarray(side).ravel())
                results.append(judge_map(flat, patch_counts(masks, grid), 64, study.image_id))
    assert len(numbers) >= 12
    area, lift = np.mean(numbers, axis=0)
    assert area > 0.85 and lift > 2.6
    assert np.mean(mirrored, axis=0)[1] < lift - 0.5, "left and right would not matter"
