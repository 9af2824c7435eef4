"""Score the tagger against human indexers: `python -m medim_ray.reports.evaluate REPORTS.csv [--half dev|held-out]`.

REPORTS.csv has the columns uid, findings, impression and MeSH ("Heading/qualifier;Heading", as Open-i gives them).
Rules were written on the `dev` half only; the paper's way (exact match of single words) is the baseline.
"""

from __future__ import annotations

import argparse
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from medim_ray.reports.tag_command import read_reports
from medim_ray.reports.tagger import Tagger

__all__ = ["Score", "evaluate", "main", "score", "split_halves"]

SPLIT_SEED = 20261122  # drawn before the first report was read
NOT_HEADINGS = frozenset(("", "normal", "No Indexing"))


@dataclass(frozen=True)
class Score:
    """Micro-averaged counts over reports; `per_heading` maps a heading to (true positives, false ones, missed ones)."""

    num_reports: int
    true_positives: int
    false_positives: int
    false_negatives: int
    per_heading: dict[str, tuple[int, int, int]]

    @property
    def precision(self) -> float:
        return self.true_positives / max(1, self.true_positives + self.false_positives)

    @property
    def recall(self) -> float:
        return self.true_positives / max(1, self.true_positives + self.false_negatives)

    @property
    def f1(self) -> float:
        return 2 * self.true_positives / max(1, 2 * self.true_positives + self.false_positives + self.false_negatives)

    def __str__(self) -> str:
        return f"F1 {self.f1:.3f}  precision {self.precision:.3f}  recall {self.recall:.3f}"


def split_halves(ids: Sequence[str]) -> tuple[set[str], set[str]]:
    """(dev, held-out): a random half of the ids and the rest; a function of the set of ids alone."""
    ordered = sorted(set(ids), key=lambda name: (len(name), name))
    Random(SPLIT_SEED).shuffle(ordered)
    return set(ordered[: len(ordered) // 2]), set(ordered[len(ordered) // 2 :])


def indexed_by_humans(mesh: str) -> set[str]:
    """Main headings of a MeSH column, without 'normal' and 'No Indexing'."""
    return {entry.split("/")[0].strip() for entry in mesh.split(";")} - NOT_HEADINGS


def score(truths: Sequence[set[str]], predictions: Sequence[set[str]]) -> Score:
    """Count headings; only headings that some truth holds count as predictions."""
    known = set().union(*truths)
    hits, extras, misses = Counter[str](), Counter[str](), Counter[str]()
    for truth, predicted in zip(truths, predictions, strict=True):
        hits.update(truth & predicted)
        extras.update((predicted & known) - truth)
        misses.update(truth - predicted)
    per_heading = {heading: (hits[heading], extras[heading], misses[heading]) for heading in known}
    return Score(len(truths), hits.total(), extras.total(), misses.total(), per_heading)


def exact_word_baseline(headings: Sequence[str]) -> Callable[[str], set[str]]:
    """The paper's way: a heading is found where one word of the report equals it."""
    single_words = {heading.lower(): heading for heading in headings}
    return lambda text: {
        single_words[word] for word in set(re.findall(r"[a-z]+", text.lower())) if word in single_words
    }


def evaluate(reports_csv: str, half: str = "all") -> tuple[Score, Score, float]:
    """(tagger, baseline, reports per second of one core) on `half` of the reports.

    The baseline looks for the headings that the file holds, which flatters it. Raises ValueError for another `half` or
    a file without the columns.
    """
    ids, texts, extras = read_reports(reports_csv, ["findings", "impression"], "uid", ["MeSH"])
    dev, held_out = split_halves(ids)
    halves = {"dev": dev, "held-out": held_out, "all": dev | held_out}
    if half not in halves:
        raise ValueError(f"half={half!r}: must be one of {', '.join(halves)}")
    rows = [place for place, identifier in enumerate(ids) if identifier in halves[half]]
    truths = [indexed_by_humans(extras[place][0]) for place in rows]
    documents = ["\n\n".join(texts[place]) for place in rows]

    tagger = Tagger()
    begin = time.process_time()
    predictions = [set(tagger.headings(document)) for document in documents]
    reports_per_s = len(documents) / max(1e-9, time.process_time() - begin)
    find_words = exact_word_baseline(sorted(set().union(*truths)))
    return score(truths, predictions), score(truths, [find_words(document) for document in documents]), reports_per_s


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; prints both scores, the speed and a table of headings."""
    parser = argparse.ArgumentParser(prog="python -m medim_ray.reports.evaluate", description=__doc__)
    parser.add_argument("reports_csv", metavar="REPORTS.csv")
    parser.add_argument("--half", default="all", choices=("dev", "held-out", "all"))
    options = parser.parse_args(arguments)
    result, baseline, reports_per_s = evaluate(options.reports_csv, options.half)
    print(f"{result.num_reports} reports ({options.half}), {len(result.per_heading)} headings")
    print(f"tagger             {result}")
    print(f"exact single words {baseline}")
    print(f"speed              {reports_per_s:,.0f} reports/s on one core")
    print(f"\n{'heading':44} found  false missed")
    for heading, (hits, extra, missed) in sorted(result.per_heading.items(), key=lambda row: -row[1][0] - row[1][2]):
        print(f"{heading:44} {hits:5d} {extra:6d} {missed:6d}")


if __name__ == "__main__":
    main()
