"""What `medim-ray prepare` prints when it is done: three counts that add up, and what a user should know."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from medim_ray.data import shards
from medim_ray.data.duplicates import Verdict
from medim_ray.data.encode import NO_PATIENT, NO_REPORT
from medim_ray.data.shards import Manifest

SALT_VARIABLE = "MEDIM_RAY_SALT"


@dataclass(frozen=True, kw_only=True)
class PrepareSummary:
    """What `prepare` did; rows_in = sum of `splits` + sum of `quarantine` + `skipped`."""

    out: str
    rows_in: int
    splits: dict[str, int]
    quarantine: dict[str, int]
    skipped: int
    notices: tuple[str, ...]
    already_prepared: bool

    def lines(self) -> list[str]:
        """The last lines that the command prints."""
        kept, lost = sum(self.splits.values()), sum(self.quarantine.values())
        assert self.rows_in == kept + lost + self.skipped, "rows went missing"
        lines = [f"already prepared, nothing to do: {self.out}"] if self.already_prepared else []
        lines += [f"note: {notice}" for notice in self.notices]
        lines += [f"quarantine: {num} rows: {reason}" for reason, num in self.quarantine.items()]
        by_split = ", ".join(f"{split} {num}" for split, num in self.splits.items())
        lines.append(
            f"{self.rows_in} rows in = {kept} in shards ({by_split}) + {lost} in quarantine "
            f"+ {self.skipped} skipped as duplicates"
        )
        return lines


def notices_of_copies(verdict: Verdict) -> list[str]:
    """What a user should know about exact copies."""
    notices = []
    if verdict.groups:
        num = sum(len(group) - 1 for group in verdict.groups)
        notices.append(f"{num} images are exact copies of others: see {shards.DUPLICATES}")
    if verdict.num_moved:
        notices.append(f"{verdict.num_moved} rows went to the split of their patients' copies")
    if verdict.num_straddling:
        notices.append(
            f"{verdict.num_straddling} images have copies in another split, as the split column says: "
            "they leak; duplicates=skip leaves the copies out of training"
        )
    return notices


def summarize(
    out: str, manifest: Manifest, *, is_salted: bool, already_prepared: bool, notices: Sequence[str] = ()
) -> PrepareSummary:
    """The summary of a finished set."""
    notices = list(notices)
    if not is_salted:
        notices.append(f"patient ids are hashed without a secret; set {SALT_VARIABLE} before sharing the shards")
    if num := manifest.flags.get(NO_PATIENT):
        notices.append(f"{num} rows have no patient id: each counts as a patient of its own")
    if num := manifest.flags.get(NO_REPORT):
        notices.append(f"{num} rows have no report; they are kept, flagged {NO_REPORT!r}")
    if not any(file.path.startswith(f"{shards.TOKENIZER}/") for file in manifest.other_files):
        notices.append(
            "the training reports share too few words for a vocabulary: text.name=bert can't use these shards"
        )
    return PrepareSummary(
        out=out,
        rows_in=manifest.rows_in,
        splits=manifest.splits,
        quarantine=manifest.quarantine,
        skipped=manifest.rows_skipped,
        notices=tuple(notices),
        already_prepared=already_prepared,
    )
