"""Question: what does each objective learn on phantoms, beside the anatomy prior and the weights it began with?

For every objective and seed one `medim-ray pretrain` and one `medim-ray probe`, one after the other. A run that has its
result.json is not run again, one that was cut goes on from its checkpoint: repeat the command until the table is there.
Numbers are means over seeds with a 95 % t-interval. A row that does not beat uniform masking says so.

    python benchmarks/learning.py SHARDS OUT [--seeds 0 1 2] [--steps 300] [--objectives mae medim ...]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from scipy.stats import t as student

RECIPE = Path(__file__).parents[1] / "configs/demo-medim-vit_tiny-2w-z1.yaml"
_PIXELS = ["masking.name=uniform", "masking.ratio=0.75", "masking.on=input"]
_WITHOUT = ["objective.reconstruction_weight=0"]
OBJECTIVES = {
    "mae": [*_PIXELS, "objective.name=mae"],
    "mae-anatomy": ["masking.name=anatomy", "masking.ratio=0.75", "masking.on=input", "objective.name=mae"],
    "simmim": [*_PIXELS, "objective.name=simmim"],
    "ita": [*_WITHOUT, "objective.local_weight=0", "objective.proto_weight=0"],
    "mgca": _WITHOUT,
    "medim-uniform": ["masking.name=uniform", "masking.ratio=0.5", "masking.on=feature"],
    "medim-kdm": ["masking.name=kdm"],
    "medim-sdm": ["masking.name=sdm"],
    "medim": [],
    "medim-prior": ["masking.prior=multiply"],
}
CONTROL = "medim-uniform"
COLUMNS = ("KDM map AUROC", "KDM lesion lift", "SDM map AUROC", "SDM lesion lift", "finding AUROC", "minus untrained")


def run_one(name: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """The content of result.json of one run, which is made where it is missing."""
    folder = Path(args.out) / f"{name}-{args.steps}-seed{seed}"
    result = folder / "result.json"
    if not result.exists():
        options = [f"data.shards={args.shards}", f"run.dir={folder}", f"seed={seed}"]
        options += [f"train.steps={args.steps}", f"train.checkpoint_every={max(1, args.steps // 4)}", *OBJECTIVES[name]]
        began = time.monotonic()
        tool = [str(Path(sys.executable).parent / "medim-ray")]
        subprocess.run([*tool, "pretrain", "--config", str(RECIPE), *options], check=True, stdout=subprocess.DEVNULL)
        subprocess.run([*tool, "probe", f"run={folder}"], check=True, stdout=subprocess.DEVNULL)
        print(f"{name} seed {seed}: {time.monotonic() - began:.0f} s", flush=True)
    content: dict[str, Any] = json.loads(result.read_text())
    return content


def numbers(result: dict[str, Any], source: str) -> list[float | None]:
    """The values of COLUMNS for one run; None where the objective has no such thing."""
    found: list[float | None] = []
    for strategy in ("kdm", "sdm"):
        metrics = result["localisation"]["strategies"].get(strategy, {}).get(source)
        found += [metrics[key]["value"] if metrics else None for key in ("map_auroc", "lesion_lift")]
    findings = [facts for label, facts in result["labels"].items() if label not in ("view", "sex", "age")]
    if source in ("trained", "untrained") and findings:
        found.append(statistics.mean(facts["encoders"][source]["auroc"]["value"] for facts in findings))
        found.append(statistics.mean(facts["trained_minus_untrained"]["auroc"]["value"] for facts in findings))
    else:
        found += [None, None]
    return found


def with_interval(values: list[float]) -> str:
    """Mean and 95 % t-interval over seeds."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:.3f}"
    half = float(student.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:.3f} +- {half:.3f}"


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown: a row for each objective and source of its maps."""
    lines = [f"| objective | maps and encoder | {' | '.join(COLUMNS)} |", "|" + "---|" * (2 + len(COLUMNS))]
    for name, runs in results.items():
        for source in ("untrained", "trained", "prior", "both"):
            rows = [numbers(run, source) for run in runs]
            columns = [[value for value in column if value is not None] for column in zip(*rows, strict=True)]
            cells = [with_interval(column) if len(column) == len(rows) else "" for column in columns]
            if any(cells):
                lines.append(f"| {name} | {source} | {' | '.join(cells)} |")
    for name in ("medim-kdm", "medim-sdm", "medim", "medim-prior"):
        if name in results and CONTROL in results and len(results[name]) > 1:
            pairs = zip(results[name], results[CONTROL], strict=True)
            gains = [(numbers(a, "trained")[4] or 0.0) - (numbers(b, "trained")[4] or 0.0) for a, b in pairs]
            half = float(student.ppf(0.975, len(gains) - 1)) * statistics.stdev(gains) / len(gains) ** 0.5
            verdict = "beats" if statistics.mean(gains) > half else "does not beat"
            lines.append(f"\n{name} {verdict} {CONTROL} on the finding probe: {with_interval(gains)} AUROC.")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards")
    parser.add_argument("out")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--objectives", nargs="+", choices=list(OBJECTIVES), default=list(OBJECTIVES))
    args = parser.parse_args()
    results = {name: [run_one(name, seed, args) for seed in args.seeds] for name in args.objectives}
    text = table(results)
    (Path(args.out) / "learning.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
