"""The maps of single mentions and sentences of a report, for the mask gallery: what KDM and SDM add up, one by one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medim_ray.data.texts import ReportEncoder, TextRows
from medim_ray.masking.prior import patch_maps, places_of
from medim_ray.probes.rows import Columns
from medim_ray.reports.tagger import Mention
from medim_ray.studies.panels import Panel, heat_uri
from medim_ray.types import BOX, SENTENCE_ID, WORD_IS_PAD, Grid


@dataclass(frozen=True, kw_only=True)
class Phrase:
    """A mention or a sentence of a report. told: what the tagger says of a mention.

    maps: the word-to-patch attention of its words, where the run makes it; the anatomy prior, where it tells a place.
    """

    words: str
    told: str
    negated: bool
    maps: Sequence[Panel]


@dataclass(frozen=True, kw_only=True)
class Phrases:
    """All of one report, in its order; a mention that is said twice in a sentence stands once."""

    mentions: Sequence[Phrase]
    sentences: Sequence[Phrase]


def phrases(
    row: Mapping[str, Any],
    encoder: ReportEncoder,
    columns: Columns,
    encoded: TextRows,
    i: int,
    grid: Grid,
    attention_WN: NDArray[np.float32] | None,
) -> Phrases:
    """Of sample i of `columns` and `encoded`, whose stored row is `row`."""

    def maps(words_W: NDArray[np.bool_], spoken: Iterable[Mention]) -> list[Panel]:
        panels = []
        if attention_WN is not None:
            seen = words_W.any()
            heat = heat_uri(attention_WN[words_W].sum(axis=0), grid.width) if seen else ""
            panels.append(Panel(title="attention", caption="" if seen else "beyond text.num_tokens", heat=heat))
        if places := places_of(spoken):
            prior_N = patch_maps([places], columns[BOX][i : i + 1], grid)[0]
            panels.append(Panel(title="anatomy prior", caption="", heat=heat_uri(prior_N, grid.width)))
        return panels

    mentions = {(one.sentence, one.text.lower(), one.heading): one for one in encoded.mentions[i]}
    words_W = {key: encoder.words_of(row["report"], one) for key, one in mentions.items()}
    sentence_W = np.where(columns[WORD_IS_PAD][i], -1, columns[SENTENCE_ID][i])
    return Phrases(
        mentions=[
            Phrase(words=one.text, told=_told(one), negated=one.negated, maps=maps(words_W[key], [one]))
            for key, one in mentions.items()
        ],
        sentences=[
            Phrase(
                words=str(words),
                told="",
                negated=False,
                maps=maps(sentence_W == k, [one for one in encoded.mentions[i] if one.sentence == k]),
            )
            for k, words in enumerate(row["sentences"])
        ],
    )


def _told(mention: Mention) -> str:
    """Heading, assertion of a finding, side and zone."""
    said = "" if mention.category == "anatomy" else mention.assertion
    place = " ".join(word for word in (mention.side, mention.zone) if word)
    return " · ".join(word for word in (mention.heading, said, place) if word)
