"""Options of a probe that can't mean anything are refused with what to write instead."""

from __future__ import annotations

import pytest

from medim_ray.config.loader import load
from medim_ray.probes.command import ProbeRoot


def _load(*overrides: str) -> ProbeRoot:
    return load(ProbeRoot, None, ["run=runs/first", *overrides])


def test_encoders_shares_and_tasks_are_read_from_the_command_line() -> None:
    probe = _load(
        "probe.encoders=[untrained,pixels,run:runs/second,timm:vit_base_patch16_224.mae,hf:microsoft/rad-dino]",
        "probe.fractions=[0.01,0.1,1.0]",
        "probe.tasks=[labels,segment]",
        "probe.cache=off",
    ).probe
    assert probe.encoders[2:] == ("run:runs/second", "timm:vit_base_patch16_224.mae", "hf:microsoft/rad-dino")
    assert probe.fractions == (0.01, 0.1, 1.0) and probe.tasks == ("labels", "segment") and probe.num_draws == 3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("probe.encoders=[imagenet]", "'imagenet' is none of untrained, pixels, run:PATH, timm:NAME, hf:ID_OR_FOLDER"),
        ("probe.encoders=['hf:']", "'hf:' is none of"),
        ("probe.fractions=[0.1,10]", r"10.0 must lie in \(0, 1\]"),
        ("probe.fractions=[]", "at least one"),
        ("probe.num_draws=0", "at least one"),
        ("probe.tasks=[labels,segmentation]", "'segmentation' is none of labels, localise, retrieve, segment"),
        ("probe.tasks=[]", "probe.tasks is empty"),
        ("probe.num_folds=1", "at least 2"),
        ("probe.encoder=[pixels]", "probe.encoder"),
    ],
)
def test_what_means_nothing_is_refused(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _load(override)
