"""Question: what does each objective learn on phantoms, beside the anatomy prior and the weights it began with?

For every objective and seed one `medim-ray pretrain` and one `medim-ray probe`, one after the other. A run that has its
result.json is not run again, one that was cut goes on from its checkpoint: repeat the command until the table is there.
Numbers are means over seeds with a 95 % t-interval. A row that does not beat uniform masking says so.

    python benchmarks/learning.py SHARDS OUT [--seeds 0 1 2] [--steps 200] [--objectives mae medim ...]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy.stats import t as student

RECIPE = Path(__file__).parents[1] / "configs/demo-medim-vit_tiny-2w-z1.yaml"
_PIXELS = ["masking.name=uniform", "masking.ratio=0.75", "masking.on=input"]
_WITHOUT = ["objective.reconstruction_weight=0"]
_BEST = ["masking.prior=multiply", "objective.word_contrast_weight=1", "objective.mae_ratio=0.3"]
OBJECTIVES = {
    "mae": [*_PIXELS, "objective.name=mae"],
    "simmim": [*_PIXELS, "objective.name=simmim"],
    "ita": [*_WITHOUT, "objective.local_weight=0", "objective.proto_weight=0"],
    "mgca": _WITHOUT,
    "medim-kdm": ["masking.name=kdm"],
    "medim-sdm": ["masking.name=sdm"],
    "medim": [],
    # Beside the seven of the papers: the controls, and what we ship against attention that does not localise.
    "mae-anatomy": ["masking.name=anatomy", "masking.ratio=0.75", "masking.on=input", "objective.name=mae"],
    "medim-uniform": ["masking.name=uniform", "masking.ratio=0.5", "masking.on=feature"],
    "medim-prior": ["masking.prior=multiply"],
    "medim-contrast": ["objective.word_contrast_weight=1"],
    "medim-best": _BEST,
}
CONTROL = "medim-uniform"
FINDINGS = ("cardiomegaly", "effusion", "pneumothorax", "consolidation", "nodule", "edema", "atelectasis")
SHARES = (0.01, 0.1, 1.0)
_PROBE = [
    f"probe.labels=[{','.join(FINDINGS)}]",
    f"probe.fractions=[{','.join(map(str, SHARES))}]",
    "probe.num_bootstrap=100",  # the intervals of the table are over seeds
    "probe.tasks=[labels,localise,segment]",
]
Numbers = list[float | None]


@dataclass(frozen=True)
class Run:
    """result: of its result.json; looks: the records of metrics.jsonl in which its maps were looked at."""

    result: dict[str, Any]
    looks: list[dict[str, Any]]


def run_one(name: str, seed: int, args: argparse.Namespace) -> Run:
    """One run, which is made where it is missing."""
    folder = Path(args.out) / f"{name}-{args.steps}-seed{seed}"
    result = folder / "result.json"
    if not result.exists():
        options = [f"data.shards={args.shards}", f"run.dir={folder}", f"seed={seed}", "track.aim=false"]
        options += [f"train.steps={args.steps}", f"train.checkpoint_every={max(1, args.steps // 4)}"]
        options += [f"maps.every={max(1, args.steps // 6)}", *OBJECTIVES[name]]
        began = time.monotonic()
        tool = [sys.executable, "-m", "medim_ray.cli"]
        subprocess.run([*tool, "pretrain", "--config", str(RECIPE), *options], check=True, stdout=subprocess.DEVNULL)
        shared = f"probe.cache={Path(args.out) / 'features'}"  # pixels, and weights before training, are probed once
        subprocess.run([*tool, "probe", f"run={folder}", shared, *_PROBE], check=True, stdout=subprocess.DEVNULL)
        print(f"{name} seed {seed}: {time.monotonic() - began:.0f} s", flush=True)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    looks = [record for record in records if any(key.startswith("maps/") for key in record)]
    return Run(json.loads(result.read_text()), looks)


def probes(run: Run, encoder: str) -> Numbers:
    """AUROC of the findings at each share of the labels, and Dice of pneumothorax with a linear head."""
    shares = {entry["fraction"]: entry["encoders"] for entry in run.result["mean"]["fractions"]}
    shares[1.0] = run.result["mean"]["encoders"]
    found: Numbers = [_value(shares.get(share, {}).get(encoder), "auroc") for share in SHARES]
    lesion = run.result["segmentation"]["targets"].get("pneumothorax", {}).get("encoders", {})
    return [*found, _value(lesion.get(encoder), "dice")]


def maps(run: Run, strategy: str) -> dict[str, Numbers]:
    """(map AUROC, lesion lift) by row of the table; `during` is of the small batch that a run looks at."""
    sources = run.result["localisation"]["strategies"].get(strategy, {})
    rows: dict[str, Numbers] = {"attention before": _both(sources.get("untrained"))}
    for look in run.looks[1:]:
        keys = [f"maps/{strategy}/{metric}" for metric in ("map_auroc", "lesion_lift")]
        rows[f"attention at step {look['step']} (small batch)"] = [look.get(key) for key in keys]
    names = {"trained": "attention after", "prior": "prior alone", "both": "attention after x prior"}
    rows |= {row: _both(sources.get(source)) for source, row in names.items()}
    rows["both minus prior"] = _both(run.result["localisation"].get("both_minus_prior", {}).get(strategy))
    return rows


def _both(metrics: dict[str, Any] | None) -> Numbers:
    return [_value(metrics, key) for key in ("map_auroc", "lesion_lift")]


def _value(metrics: dict[str, Any] | None, key: str) -> float | None:
    return metrics[key]["value"] if metrics and metrics.get(key) else None


def with_interval(values: Sequence[float | None]) -> str:
    """Mean and 95 % t-interval over seeds; '' where a seed has no number."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return ""
    mean = statistics.mean(known)
    return f"{mean:.3f}" if len(known) < 2 else f"{mean:.3f} +- {half(known):.3f}"


def half(values: Sequence[float]) -> float:
    return float(student.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _columns(rows: Sequence[Numbers]) -> list[str]:
    return [with_interval(column) for column in zip(*rows, strict=True)]


def probe_table(results: dict[str, list[Run]]) -> list[str]:
    """A row for each objective, and for the encoders that no run trained."""
    heads = [f"finding AUROC, {share:.0%} of the labels" for share in SHARES]
    lines = [_row("encoder", *heads, "pneumothorax Dice"), "|" + "---|" * (2 + len(SHARES))]
    lines += [_row(name, *_columns([probes(run, "trained") for run in runs])) for name, runs in results.items()]
    runs = results.get("medim") or next(iter(results.values()))
    return lines + [_row(name, *_columns([probes(run, name) for run in runs])) for name in ("untrained", "pixels")]


def verdicts(results: dict[str, list[Run]]) -> list[str]:
    """Does report-guided masking beat uniform on the probe with all labels, over the same seeds?"""
    lines = []
    for name in ("medim-kdm", "medim-sdm", "medim", "medim-prior", "medim-best"):
        if name in results and CONTROL in results and len(results[name]) > 1:
            gains = _gains(results[name], results[CONTROL])
            verdict = "beats" if statistics.mean(gains) > half(gains) else "does not beat"
            lines.append(f"\n{name} {verdict} {CONTROL} on the finding probe: {with_interval(gains)} AUROC.")
    return lines


def gain_table(results: dict[str, list[Run]]) -> list[str]:
    """Finding AUROC with all labels, paired by seed: less that of the first weights, and that of two objectives."""
    others = [name for name in ("mae", CONTROL) if name in results]
    heads = ["objective", *(f"minus {name}" for name in ("untrained", *others))]
    lines = ["", _row(*heads), "|" + "---|" * len(heads)]
    for name, runs in results.items():
        cells = ["" if other == name else with_interval(_gains(runs, results[other])) for other in others]
        lines.append(_row(name, with_interval(_gains(runs, runs, "untrained")), *cells))
    return lines


def _gains(runs: Sequence[Run], peers: Sequence[Run], encoder: str = "trained") -> list[float]:
    """By seed: finding AUROC with all labels of `runs`, less that of `encoder` of their peers."""
    pairs = zip(runs, peers, strict=True)
    return [(probes(run, "trained")[2] or 0.0) - (probes(peer, encoder)[2] or 0.0) for run, peer in pairs]


def map_table(results: dict[str, list[Run]]) -> list[str]:
    """Attention before, during and after, the prior, both. Learning is claimed only where both beat the prior."""
    heads = [f"{strategy} {metric}" for strategy in ("KDM", "SDM") for metric in ("map AUROC", "lesion lift")]
    lines = [_row("objective", "map of", *heads), "|" + "---|" * 6]
    for name, runs in results.items():
        found = [[maps(run, strategy) for run in runs] for strategy in ("kdm", "sdm")]
        for row in found[0][0]:
            cells = [cell for of_runs in found for cell in _columns([one[row] for one in of_runs])]
            if any(cells):
                lines.append(_row(name, row, *cells))
    return lines


def parse(meaning: str | None, option: str, names: Sequence[str]) -> argparse.Namespace:
    """Shards, folder, seeds and steps of such a table, and by `option` which of its rows."""
    parser = argparse.ArgumentParser(description=meaning, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards")
    parser.add_argument("out")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument(option, nargs="+", choices=list(names), default=list(names))
    return parser.parse_args()


def main() -> None:
    args = parse(__doc__, "--objectives", list(OBJECTIVES))
    results = {name: [run_one(name, seed, args) for seed in args.seeds] for name in args.objectives}
    head = f"{args.steps} steps, seeds {', '.join(map(str, args.seeds))}; mean +- 95 % t-interval over seeds.\n"
    text = "\n".join([head, *probe_table(results), *gain_table(results), *verdicts(results), "", *map_table(results)])
    (Path(args.out) / "learning.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
