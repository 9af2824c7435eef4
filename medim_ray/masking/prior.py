"""Where on a frontal chest radiograph a mention is likely to be: a map from heading, side and zone, without a model.

Written from general radiological anatomy, for upright and supine frontal views in the convention of PACS (the patient's
left on the image's right); nothing here is fitted to images. anatomy.py and report.py make masks of these maps.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from medim_ray.masking.base import Samples
from medim_ray.masking.chest_places import PLACE_OF_HEADING, PLACE_WORDS, draw_place
from medim_ray.reports.tagger import Mention
from medim_ray.types import Grid

CELLS = 64  # a map of the whole stored image has CELLS x CELLS values
_SPOKEN_OF = frozenset(("finding", "device", "procedure", "anatomy"))  # quality and technique have no place

Floats = NDArray[np.float32]


class Place(NamedTuple):
    """Kind of place (a row of chest_places.py), side ('left', 'right', 'bilateral' or '') and zone ('' or as told)."""

    kind: str
    side: str
    zone: str


def place_of(mention: Mention) -> Place | None:
    """Where the mention is; None for what has no place on the film, such as a technique or an external device."""
    if mention.category not in _SPOKEN_OF:
        return None
    kind = PLACE_OF_HEADING.get(mention.heading)
    if kind is None:  # of another vocabulary: a finding of the chest may be anywhere in the lungs
        kind = "lung" if mention.category == "finding" else ""
    words = mention.text.lower()
    for told, place in PLACE_WORDS.get(mention.heading, ()):
        if told in words:
            kind = place
            break
    return Place(kind, mention.side, mention.zone) if kind else None


def places_of(mentions: Iterable[Mention]) -> frozenset[Place]:
    """The places that a text tells: of findings and devices that are there; where there are none, of what it speaks of.

    A place told twice counts once, and one without side or zone not at all where another mention of its kind is more
    exact ("right upper lobe consolidation ... impression: pneumonia").
    """
    there: set[Place] = set()
    spoken: set[Place] = set()
    for mention in mentions:
        place = place_of(mention)
        if place is not None:
            is_there = mention.category != "anatomy" and mention.assertion != "absent" and mention.course != "past"
            (there if is_there else spoken).add(place)
    places = there or spoken
    return frozenset(place for place in places if not any(_is_finer(other, place) for other in places))


def _is_finer(one: Place, other: Place) -> bool:
    """Whether `one` says all that `other` does, and more."""
    same_side, same_zone = other.side in ("", one.side), other.zone in ("", one.zone)
    return one != other and one.kind == other.kind and same_side and same_zone


@functools.lru_cache(maxsize=4096)
def image_map(places: frozenset[Place]) -> Floats:
    """[CELLS, CELLS] float32 over the stored image: the mean of the places' densities, each with sum 1; read only."""
    centres = (np.arange(CELLS) + 0.5) / CELLS
    total_KK = np.zeros((CELLS, CELLS))
    for place in sorted(places):
        density_KK = draw_place(place.kind, place.side, place.zone, centres[:, None], centres[None, :])
        total_KK += density_KK / density_KK.sum()
    map_KK: Floats = (total_KK / max(1, len(places))).astype(np.float32)
    map_KK.flags.writeable = False
    return map_KK


def prior_maps(samples: Samples, grid: Grid, sentences_B: NDArray[np.int16] | None = None) -> Floats:
    """[B, N] the prior of each report, or of sentence `sentences_B` of each; 0 everywhere where no place is told."""
    places = [
        places_of(mentions if sentences_B is None else [m for m in mentions if m.sentence == sentences_B[i]])
        for i, mentions in enumerate(samples.mentions)
    ]
    return patch_maps(places, samples.boxes_B4, grid)


def patch_maps(places_B: Sequence[frozenset[Place]], boxes_B4: Floats, grid: Grid) -> Floats:
    """[B, N] mean density of each patch of the crops `boxes_B4` (fractions of the stored image, may reach outside).

    1 is the density of a map that is flat over the stored image; outside it, and for a text without a place, 0.
    """
    maps_BKK = np.stack([image_map(places) for places in places_B]) * np.float32(CELLS * CELLS)
    rows_BHK = _overlaps(boxes_B4[:, 0], boxes_B4[:, 2], grid.height)
    columns_BWK = _overlaps(boxes_B4[:, 1], boxes_B4[:, 3], grid.width)
    maps_BHW = rows_BHK @ maps_BKK @ columns_BWK.transpose(0, 2, 1)
    return maps_BHW.reshape(len(places_B), grid.num_patches)


def _overlaps(first_B: Floats, last_B: Floats, num: int) -> Floats:
    """[B, num, CELLS] share of each of `num` equal parts of [first, last] that lies in each cell of [0, 1]."""
    edges_BP = first_B[:, None] + (last_B - first_B)[:, None] * np.linspace(0, 1, num + 1, dtype=np.float32)
    cells_K = np.linspace(0, 1, CELLS + 1, dtype=np.float32)
    ends_BPK = np.minimum(edges_BP[:, 1:, None], cells_K[1:])
    starts_BPK = np.maximum(edges_BP[:, :-1, None], cells_K[:-1])
    lengths_BP = np.diff(edges_BP, axis=1)
    shares_BPK: Floats = np.clip(ends_BPK - starts_BPK, 0, None) / lengths_BP[:, :, None]
    return shares_BPK
