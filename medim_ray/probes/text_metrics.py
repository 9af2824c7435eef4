"""Written reports against true ones: ROUGE-L, BLEU-4 and F1 over fourteen findings, with bootstrap intervals.

ROUGE-L and the n-gram counts of BLEU are those of rouge-score and sacrebleu; findings are read by our own tagger, under
CheXpert's names. RadGraph-F1 and CheXbert need weights that are not public: `NOT_HERE` says so.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from medim_ray.probes.bootstrap import Estimate, Floats, bootstrap, mean
from medim_ray.reports.tagger import Tagger, indexed_headings

NOT_HERE = {
    "radgraph_f1": "its model needs credentialed weights, which are not available here",
    "chexbert_f1": "its weights are not available here; macro_f1 and micro_f1 are by our own tagger",
}
FINDINGS: Mapping[str, tuple[str, ...]] = {  # CheXpert's names -> headings of our vocabulary
    "Enlarged Cardiomediastinum": ("Mediastinum", "Cardiac Shadow"),
    "Cardiomegaly": ("Cardiomegaly",),
    "Lung Opacity": ("Opacity", "Infiltrate"),
    "Lung Lesion": ("Nodule", "Mass"),
    "Edema": ("Pulmonary Edema",),
    "Consolidation": ("Consolidation",),
    "Pneumonia": ("Pneumonia",),
    "Atelectasis": ("Pulmonary Atelectasis",),
    "Pneumothorax": ("Pneumothorax",),
    "Pleural Effusion": ("Pleural Effusion",),
    "Pleural Other": ("Thickening", "Pleural Plaque"),
    "Fracture": ("Fractures, Bone",),
    "Support Devices": ("Tube, Inserted", "Implanted Medical Device", "Catheters, Indwelling"),
}
NO_FINDING = "No Finding"


def found_in(tagger: Tagger, report: str) -> NDArray[np.bool_]:
    """[14] which of FINDINGS a report tells of as there, and last whether it tells of none; a text without a word tells
    nothing, not even that."""
    headings = set(indexed_headings(tagger.tag(report)))
    found = [bool(headings & set(names)) for names in FINDINGS.values()]
    return np.array([*found, not any(found) and bool(re.search(r"\w", report))])


def score_reports(
    written: Sequence[str], true: Sequence[str], patients: Sequence[str], num_bootstrap: int, seed: int
) -> dict[str, Estimate]:
    """rouge_l, bleu_4, macro_f1 (over the findings that the true reports have), micro_f1, each in [0, 1]."""
    from rouge_score.rouge_scorer import RougeScorer

    rouge = RougeScorer(["rougeL"])
    rouge_K = np.array([rouge.score(t, w)["rougeL"].fmeasure for t, w in zip(true, written, strict=True)])
    tagger = Tagger()
    found_KF, true_KF = (np.stack([found_in(tagger, text) for text in texts]) for texts in (written, true))
    metrics: dict[str, Callable[[Floats], Floats]] = {
        "rouge_l": partial(mean, rouge_K),
        "bleu_4": partial(bleu, _counts(written, true)),
        "macro_f1": partial(finding_f1, found_KF, true_KF, False),
        "micro_f1": partial(finding_f1, found_KF, true_KF, True),
    }
    return {name: bootstrap(metric, patients, num_bootstrap, seed) for name, metric in metrics.items()}


def _counts(written: Sequence[str], true: Sequence[str]) -> Floats:
    """[K, 10] of each report: matching n-grams and n-grams written, n = 1 to 4, then words written and true."""
    from sacrebleu.metrics.bleu import BLEU

    scorer = BLEU(effective_order=True, lowercase=True)
    scores = [scorer.sentence_score(w, [t]) for w, t in zip(written, true, strict=True)]
    return np.array([[*s.counts, *s.totals, s.sys_len, s.ref_len] for s in scores], dtype=np.float64)


def bleu(counts_K10: Floats, weights_RK: Floats) -> Floats:
    """[R] corpus BLEU-4 in [0, 1]; 0 where an n-gram length has no match (no smoothing)."""
    sums_R10 = weights_RK @ counts_K10
    match_R4, total_R4, written_R, true_R = sums_R10[:, :4], sums_R10[:, 4:8], sums_R10[:, 8], sums_R10[:, 9]
    some_R: NDArray[np.bool_] = np.all(np.greater(match_R4, 0.0), axis=1)
    ratio_R4 = np.where(some_R[:, None], match_R4, 1.0) / np.where(some_R[:, None], total_R4, 1.0)
    brevity_R = np.exp(np.minimum(0.0, 1.0 - true_R / np.maximum(written_R, 1e-9)))
    return np.where(some_R, brevity_R * np.exp(np.log(ratio_R4).mean(axis=1)), 0.0)


def finding_f1(found_KF: NDArray[np.bool_], true_KF: NDArray[np.bool_], micro: bool, weights_RK: Floats) -> Floats:
    """[R] F1 over all findings pooled, or the mean over those that the true reports of a draw have; NaN: none."""
    hits_RF = weights_RK @ (found_KF & true_KF)
    total_RF = weights_RK @ found_KF.astype(np.float64) + weights_RK @ true_KF.astype(np.float64)
    if micro:
        hits_RF, total_RF = hits_RF.sum(axis=1, keepdims=True), total_RF.sum(axis=1, keepdims=True)
    true_RF = weights_RK @ true_KF.astype(np.float64)
    has_RF = np.greater(total_RF if micro else true_RF, 0.0)
    f1_RF = np.divide(2 * hits_RF, total_RF, out=np.zeros_like(total_RF), where=total_RF > 0)
    num_R = has_RF.sum(axis=1)
    return np.divide((f1_RF * has_RF).sum(axis=1), num_R, out=np.full(len(num_R), np.nan), where=num_R > 0)
