"""Source `phantom`: the embedded corpus of medim_ray.data.phantom, drawn in the tasks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from medim_ray.data.sources.base import SOURCES, Sample, Truth, described, plan_table


@SOURCES.register("phantom")
class PhantomSource:
    """Procedural chest phantoms with reports and pixel truth; nothing is downloaded.

    Studies 0 to num_images - 1 of the corpus `seed`; more images add to fewer, they change none.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        name: str = described("phantom", "phantom")
        num_images: int = described(480, "images; a patient has one to three")
        seed: int = described(0, "another seed is another corpus")
        size: int = described(256, "height and width in pixels")
        anatomy: bool = described(False, "also the zones of the lungs as truth: `lung`, with side and zone")

        def __post_init__(self) -> None:
            if self.num_images < 1:
                raise ValueError(f"num_images={self.num_images}: at least 1")
            if self.size < 32:
                raise ValueError(f"size={self.size}: at least 32 pixels")

    def __init__(self, config: Config) -> None:
        self.config = config
        self.name = config.name

    def plan(self) -> pa.Table:
        """See `Source`. The location of a row is the number of its study."""
        from medim_ray.data import phantom  # SciPy takes most of a second, and every worker imports the sources

        config = self.config
        nothing = [""] * config.num_images
        return plan_table(
            image_id=[f"phantom-{config.seed}-{index:06d}" for index in range(config.num_images)],
            patient_id=[phantom.patient_id(index, seed=config.seed) for index in range(config.num_images)],
            location=[str(index) for index in range(config.num_images)],
            view=nothing,
            report=nothing,
            split=nothing,
            labels={},
        )

    def sample(self, row: Mapping[str, Any]) -> Sample:
        """See `Source`."""
        from medim_ray.data import phantom

        study = phantom.render(int(row["location"]), seed=self.config.seed, size=self.config.size)
        truth = tuple(
            Truth(
                finding=lesion.finding,
                side=lesion.side,
                zone=lesion.zone,
                sentence=study.sentences[lesion.sentence] if lesion.sentence >= 0 else "",
                mask_HW=lesion.mask_HW,
            )
            for lesion in study.lesions
        )
        if self.config.anatomy:
            truth += self._lungs(int(row["location"]))
        return Sample(image_HW=study.image_HW, view=study.view, report=study.report, labels=study.labels, truth=truth)

    def _lungs(self, index: int) -> tuple[Truth, ...]:
        """Six zones; no sentence tells them."""
        from medim_ray.data import phantom

        zones_HW = phantom.zone_map(index, seed=self.config.seed, size=self.config.size)
        places = [(side, zone) for side in ("right", "left") for zone in ("upper", "mid", "lower")]
        return tuple(
            Truth(finding="lung", side=side, zone=zone, sentence="", mask_HW=zones_HW == k)
            for k, (side, zone) in enumerate(places, 1)
        )
