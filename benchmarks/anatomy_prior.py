"""Question: how much of the lesions does the anatomy prior hide, without any training, on phantoms it has never seen?

Whole image on a 14 x 14 grid, ratio 0.25; per kind of finding for the sentences that tell it. Intervals over patients.

    python benchmarks/anatomy_prior.py [--num 300] [--seed 9002] [--size 112]
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from functools import partial

import numpy as np
import torch

from medim_ray.data.phantom import Lesion, Study, render
from medim_ray.masking.prior import patch_maps, places_of
from medim_ray.probes.bootstrap import bootstrap, mean
from medim_ray.probes.localise import judge_map, patch_counts
from medim_ray.reports.tagger import Mention, Tagger
from medim_ray.types import Grid

GRID = Grid(14, 14)
_WHOLE = np.array([[0, 0, 1, 1]], dtype=np.float32)
TAGGER = Tagger()


def judge(mentions: list[Mention], lesions: list[Lesion], image_id: str) -> tuple[float, float]:
    """Map AUROC and lesion lift of the prior of `mentions` against the union of the lesions."""
    map_N = patch_maps([places_of(mentions)], _WHOLE, GRID)[0]
    masks = [lesion.mask_HW for lesion in lesions]
    patch_pixels = masks[0].size // GRID.num_patches
    return judge_map(torch.from_numpy(map_N), patch_counts(masks, GRID), patch_pixels, image_id)


def judge_study(study: Study) -> tuple[tuple[float, float], list[tuple[str, tuple[float, float]]]] | None:
    """The whole report (KDM), and each sentence that tells a lesion (SDM) with its finding; None without a lesion."""
    lesions = [lesion for lesion in study.lesions if lesion.mask_HW.any()]
    if not lesions:
        return None
    mentions = TAGGER.tag(study.report)
    of_sentences = []
    for sentence in sorted({lesion.sentence for lesion in lesions}):
        start = study.report.index(study.sentences[sentence])
        stop = start + len(study.sentences[sentence])
        told = [lesion for lesion in lesions if lesion.sentence == sentence]
        spoken = [mention for mention in mentions if start <= mention.start < stop]
        of_sentences.append((told[0].finding, judge(spoken, told, study.image_id)))
    return judge(mentions, lesions, study.image_id), of_sentences


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, default=300)
    parser.add_argument("--seed", type=int, default=9002)
    parser.add_argument("--size", type=int, default=112)
    args = parser.parse_args()
    patients: list[str] = []
    rows: dict[str, list[tuple[float, float]]] = {"whole report": [], "sentence": []}
    of_finding: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for index in range(args.num):
        study = render(index, seed=args.seed, size=args.size)
        found = judge_study(study)
        if found is None:
            continue
        patients.append(study.patient_id)
        rows["whole report"].append(found[0])
        area, lift = np.mean([numbers for _, numbers in found[1]], axis=0)
        rows["sentence"].append((float(area), float(lift)))
        for finding, numbers in found[1]:
            of_finding[finding].append(numbers)
    for name, values in rows.items():
        shown = []
        for column in np.array(values).T:
            estimate = bootstrap(partial(mean, column), patients, 2000, 0)
            low, high = estimate.interval()
            shown.append(f"{estimate.value:.3f} [{low:.3f}, {high:.3f}]")
        print(
            f"{name:14} map AUROC {shown[0]}  lesion lift {shown[1]}  "
            f"({len(patients)} images, {len(set(patients))} patients)"
        )
    for finding, values in sorted(of_finding.items()):
        area, lift = np.mean(values, axis=0)
        print(f"  {finding:14} map AUROC {area:.3f}  lesion lift {lift:.2f}  ({len(values)} sentences)")


if __name__ == "__main__":
    main()
