"""Report-guided masks: KDM hides what the MeSH words look at, SDM what the words of one sentence look at.

The law is that of MedIM's code (PAPERS.md, MedIM, "Masking"): the relevance map is a sum of word-to-patch attention
rows; patches above a threshold are "high"; `diversity` of the high ones and 1 - `diversity` of the others are hidden.
Beyond the paper, the anatomy prior (prior.py) may weigh the map, or stand in for it in the first steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from medim_ray.draws import Draws
from medim_ray.masking.base import MASKINGS, Masks, Samples
from medim_ray.masking.prior import prior_maps
from medim_ray.types import ASSERTION, MESH_FLAG, SENTENCE_ID, WORD_IS_PAD, Grid

if TYPE_CHECKING:
    from torch import Tensor

ABSENT = 2  # code of types.ASSERTION
MIN_SENTENCE_WORDS = 4  # SDM draws among sentences with more than three words where there are any

WORDS = "mask/report/words_BSW"  # float32: weight of each word's attention row in the map of mask S
NOISE = "mask/report/noise_BSN"  # float32 in [0, 1): which patches of a class are hidden
PRIOR = "mask/report/prior_BSN"  # float32: anatomy prior, 1 everywhere where the text tells no place
IS_COLD = "mask/report/is_cold_B"  # bool: the prior stands in for the attention
MAPS = "mask/report/maps_BSN"  # float32: maps of a published snapshot, where attention = "snapshot"
SENTENCE = "mask/sdm/sentence_B"  # int16: the sentence SDM drew, -1 where there is none


@MASKINGS.register("kdm", "sdm", "kdm+sdm")
class ReportMasking:
    """KDM, SDM or both (S = 2 masks an image).

    on = "feature": the counts are the paper's (97 of 196 at ratio 0.5 and diversity 0.9 without ties).
    on = "input": exactly int(ratio * N) in every row, so that an encoder can skip them: int(diversity * high) of the
    high ones, the rest random ones of the others.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        name: Literal["kdm", "sdm", "kdm+sdm"] = "kdm+sdm"
        ratio: float = field(default=0.5, metadata={"help": "share of the patches that counts as high"})
        diversity: float = field(
            default=0.9, metadata={"help": "share of the high patches, and 1 - share of the others, that is hidden"}
        )
        on: Literal["input", "feature"] = field(
            default="feature",
            metadata={"help": "feature: the encoder's output is zeroed (the paper); input: hidden patches are skipped"},
        )
        fallback: Literal["uniform", "paper", "none"] = field(
            default="uniform",
            metadata={
                "help": "a report without a word to go by: 'uniform' hides int(ratio * N) random patches, 'paper' "
                "(1 - diversity) of all, 'none' nothing"
            },
        )
        negated_weight: float = field(
            default=1.0, metadata={"help": "weight in KDM of words whose mention is asserted absent (the paper: 1)"}
        )
        prior: Literal["none", "multiply", "cold_start"] = field(
            default="none",
            metadata={
                "help": "anatomy prior from side and zone of the mentions: 'multiply' weighs the attention with it, "
                "'cold_start' hides by the prior alone for prior_steps steps and by the attention alone after them"
            },
        )
        prior_steps: int = field(default=0, metadata={"help": "global steps of prior=cold_start"})
        attention: Literal["step", "snapshot"] = field(
            default="step",
            metadata={
                "help": "step: of the model in the same step (the paper); snapshot: of published weights, in actors of "
                "the stream, so that any objective can mask its input by it"
            },
        )
        snapshot_every: int = field(
            default=0, metadata={"help": "attention=snapshot: steps between snapshots of this run's own weights"}
        )
        snapshot_run: str = field(
            default="", metadata={"help": "attention=snapshot: a finished MedIM run whose weights are used as they are"}
        )

        def __post_init__(self) -> None:
            if self.name not in ("kdm", "sdm", "kdm+sdm"):
                raise ValueError(f"masking.name={self.name!r}: must be kdm, sdm or kdm+sdm")
            if not 0.0 < self.ratio < 1.0:
                raise ValueError(f"masking.ratio={self.ratio}: must lie between 0 and 1, the paper uses 0.5")
            if not 0.0 <= self.diversity <= 1.0:
                raise ValueError(f"masking.diversity={self.diversity}: must lie in [0, 1], the paper uses 0.9")
            if self.on not in ("input", "feature"):
                raise ValueError(f"masking.on={self.on!r}: must be 'input' or 'feature'")
            if self.fallback not in ("uniform", "paper", "none"):
                raise ValueError(f"masking.fallback={self.fallback!r}: must be 'uniform', 'paper' or 'none'")
            if self.on == "input" and self.fallback != "uniform":
                raise ValueError(
                    f"masking.fallback={self.fallback!r}: with masking.on=input every row hides the same number; "
                    "use fallback=uniform"
                )
            if self.negated_weight < 0:
                raise ValueError(f"masking.negated_weight={self.negated_weight}: must be >= 0, the paper uses 1")
            if self.prior not in ("none", "multiply", "cold_start"):
                raise ValueError(f"masking.prior={self.prior!r}: must be none, multiply or cold_start")
            if self.attention not in ("step", "snapshot"):
                raise ValueError(f"masking.attention={self.attention!r}: must be step or snapshot")
            told = f"masking.snapshot_every={self.snapshot_every}, masking.snapshot_run={self.snapshot_run!r}"
            if self.attention == "step" and (self.snapshot_every or self.snapshot_run):
                raise ValueError(f"{told}: are read with masking.attention=snapshot only; set that or leave them out")
            if self.attention == "snapshot" and (self.snapshot_every > 0) == bool(self.snapshot_run):
                raise ValueError(
                    f"{told}: masking.attention=snapshot takes one of the two: masking.snapshot_every=100 for the "
                    "weights of this run, or masking.snapshot_run=PATH for those of a finished one"
                )
            if self.prior == "cold_start" and self.prior_steps < 1:
                raise ValueError(
                    f"masking.prior_steps={self.prior_steps}: masking.prior=cold_start needs at least 1 step, e.g. 1000"
                )
            if self.prior != "cold_start" and self.prior_steps:
                raise ValueError(
                    f"masking.prior_steps={self.prior_steps}: only masking.prior=cold_start has steps, and "
                    f"masking.prior={self.prior}; leave prior_steps out"
                )

    needs_text = True

    def __init__(self, config: Config) -> None:
        self.config = config
        self.on = config.on
        self.needs_attention = config.attention == "step"
        self.names = tuple(config.name.split("+"))

    def plan(self, samples: Samples, grid: Grid, draws: Draws) -> dict[str, NDArray[Any]]:
        """Word weights and noise (WORDS, NOISE); with SDM the SENTENCE drawn; with a prior PRIOR and IS_COLD."""
        columns: dict[str, NDArray[Any]] = {}
        words, priors = [], []
        for name in self.names:
            if name == "kdm":
                words.append(words_of_mentions(samples, self.config.negated_weight))
            else:
                columns[SENTENCE] = draw_sentences(samples, draws)
                words.append(words_of_sentences(samples, columns[SENTENCE]))
            if self.config.prior != "none":
                priors.append(prior_maps(samples, grid, columns[SENTENCE] if name == "sdm" else None))
        noise = [draws.uniform(f"mask/{name}", grid.num_patches) for name in self.names]
        columns[WORDS] = np.stack(words, axis=1)
        columns[NOISE] = np.stack(noise, axis=1).astype(np.float32)
        if priors:
            prior_BSN = np.stack(priors, axis=1)
            columns[PRIOR] = np.where(prior_BSN.any(axis=2, keepdims=True), prior_BSN, np.float32(1.0))
            columns[IS_COLD] = samples.steps_B < self.config.prior_steps
        return columns

    def attend(self, columns: Mapping[str, NDArray[Any]], attention_KBWN: Sequence[Tensor]) -> dict[str, NDArray[Any]]:
        """The column MAPS from plan columns and a snapshot's attention on the one crop (attention = "snapshot")."""
        import torch

        (attention_BWN,) = attention_KBWN
        return {MAPS: (torch.from_numpy(columns[WORDS]) @ attention_BWN.float().cpu()).numpy()}

    def resolve(self, columns: Mapping[str, Tensor], attention_BWN: Tensor | None) -> Masks:
        """Maps from the attention [B, W, N] or as the snapshot made them, masks from maps and noise."""
        import torch

        from medim_ray.masking.selection import select_hidden

        words_BSW = columns[WORDS].float()
        if self.needs_attention:
            assert attention_BWN is not None, f"masking {self.config.name} resolves word-to-patch attention"
            maps_BSN = words_BSW @ attention_BWN.detach().float()
        else:
            maps_BSN = columns[MAPS].float()
        has_word_BS = (words_BSW > 0).any(dim=2)
        if self.config.prior != "none":
            prior_BSN, is_cold_B11 = columns[PRIOR].float(), columns[IS_COLD].bool()[:, None, None]
            warm_BSN = maps_BSN * prior_BSN if self.config.prior == "multiply" else maps_BSN
            maps_BSN = torch.where(is_cold_B11, prior_BSN, warm_BSN)
            # A mention beyond the token limit has no word, and a place all the same.
            has_word_BS |= is_cold_B11[:, 0] & (prior_BSN != prior_BSN[:, :, :1]).any(dim=2)
        hidden_BSN, fallback_BS = select_hidden(maps_BSN, columns[NOISE].float(), has_word_BS, self.config)
        return Masks(
            hidden_SBN=hidden_BSN.transpose(0, 1),
            fallback_SB=fallback_BS.transpose(0, 1),
            maps_SBN=maps_BSN.transpose(0, 1),
        )


def words_of_mentions(samples: Samples, negated_weight: float) -> NDArray[np.float32]:
    """KDM's weight of each word, [B, W]: 1 in a mention, `negated_weight` in one asserted absent, 0 elsewhere."""
    weights_BW = np.where(samples.text[ASSERTION] == ABSENT, np.float32(negated_weight), np.float32(1.0))
    flagged_BW = samples.text[MESH_FLAG].astype(np.bool_) & ~samples.text[WORD_IS_PAD].astype(np.bool_)
    return np.where(flagged_BW, weights_BW, np.float32(0.0))


def words_of_sentences(samples: Samples, sentences_B: NDArray[np.int16]) -> NDArray[np.float32]:
    """SDM's weight of each word, [B, W]: 1 in the sentence that was drawn, 0 elsewhere."""
    is_chosen_BW = samples.text[SENTENCE_ID] == sentences_B[:, None]
    words_BW: NDArray[np.float32] = (is_chosen_BW & ~samples.text[WORD_IS_PAD]).astype(np.float32)
    return words_BW


def draw_sentences(samples: Samples, draws: Draws) -> NDArray[np.int16]:
    """One random sentence a report, [B]: among those with more than three words, any if there is none; -1 without
    words."""
    is_word_BW = ~samples.text[WORD_IS_PAD].astype(np.bool_)
    ids_BW = np.where(is_word_BW, samples.text[SENTENCE_ID].astype(np.int64), -1)
    num_sentences = int(ids_BW.max(initial=-1)) + 1
    counts_BI = np.zeros((len(samples), num_sentences + 1), dtype=np.int64)
    np.add.at(counts_BI, (np.arange(len(samples))[:, None], ids_BW), 1)  # -1 counts into the last column
    counts_BI = counts_BI[:, :num_sentences]
    is_long_BI = counts_BI >= MIN_SENTENCE_WORDS
    eligible_BI = np.where(is_long_BI.any(axis=1, keepdims=True), is_long_BI, counts_BI > 0)
    order_BI = np.cumsum(eligible_BI, axis=1)
    num_eligible_B = eligible_BI.sum(axis=1)
    pick_B = draws.integers("mask/sdm/sentence", 1, np.maximum(num_eligible_B, 1))[:, 0]
    chosen_BI = eligible_BI & (order_BI == pick_B[:, None] + 1)
    chosen_B = np.where(num_eligible_B > 0, chosen_BI.argmax(axis=1) if num_sentences else 0, -1)
    return chosen_B.astype(np.int16)
