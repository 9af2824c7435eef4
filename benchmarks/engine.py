"""Question: what does `medim-ray pretrain` cost over a plain PyTorch loop? Steps per second, in pairs.

    python -m benchmarks.engine --pairs 5                   what is missing in jobs/results/engine.jsonl, then the table
    python -m benchmarks.engine --pairs 1 --steps 20 --zero 0 --workers 1 --out /tmp/try.jsonl
    python -m benchmarks.engine --compare                   the table, from the file

MAE, ViT-Small at 224 px, batch 16 a worker, fp32, one thread a worker on both sides. Both decode the same shards, log
every step and write a checkpoint every 50 steps; the rate is that of `--steps` steps after 10, by the clock between
the records of the log, so decoding, logging and the checkpoint are in it. A pair is the plain loop (engine_peer.py) and
then ours at each ZeRO stage, all within this process tree; every second pair runs the other way round. The time from
the command to the first step is kept too. A row that is in --out is not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.plan_steps import machine
from medim_ray.data.ingest import PrepareConfig, prepare
from medim_ray.data.sources import SOURCES
from medim_ray.train.throughput import throughput

ROOT = Path(__file__).parents[1]
OUT = ROOT / "jobs" / "results" / "engine.jsonl"
WARM, MICRO, CHECKPOINT_EVERY, PLAIN = 10, 16, 50, "plain"


def shards_of(folder: Path) -> str:
    """512 phantoms at 512 px, made once."""
    if not (folder / "manifest.json").exists():
        source = SOURCES["phantom"].Config(num_images=512)
        prepare(PrepareConfig(source=source, out=str(folder)))
    return str(folder)


def run_plain(shards: str, out: Path, workers: int, steps: int) -> None:
    """The peer, by torchrun."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}"]
    script = [str(Path(__file__).with_name("engine_peer.py")), shards, str(out)]
    options = [f"--steps={steps}", f"--micro={MICRO}", f"--checkpoint-every={CHECKPOINT_EVERY}"]
    _run([*torchrun, *script, *options], out)


def command_of(shards: str, out: Path, workers: int, steps: int, zero: int, **more: Any) -> list[str]:
    """`medim-ray pretrain`; more: of its options under `train`."""
    options = {
        "data.shards": shards,
        "run.dir": out,
        "encoder.name": "vit_small_patch16_224",
        "crop.jitter": 0.0,
        "crop.blur_prob": 0.0,
        "train.steps": steps,
        "train.num_workers": workers,
        "train.zero": zero,
        "train.global_batch": MICRO * workers,
        "train.checkpoint_every": CHECKPOINT_EVERY,
        **{f"train.{key}": value for key, value in more.items()},
    }
    return [sys.executable, "-m", "medim_ray.cli", "pretrain", *(f"{key}={value}" for key, value in options.items())]


def environment() -> dict[str, str]:
    """Of every run that is measured."""
    return os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def _run(command: Sequence[str], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    with (out / "output.log").open("w") as log:
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment(), cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{(out / 'output.log').read_text()[-3000:]}")


def measure(shards: str, side: str, workers: int, steps: int) -> dict[str, Any]:
    """One run of one side in a folder of its own: steps a second, and what our own throughput block says."""
    with tempfile.TemporaryDirectory(prefix="medim-ray-engine-") as folder:
        out, started = Path(folder) / "run", time.time()
        if side == PLAIN:
            run_plain(shards, out, workers, WARM + steps)
        else:
            _run(command_of(shards, out, workers, WARM + steps, int(side.removeprefix("zero"))), out)
        records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        seconds = records[-1]["ended_at"] - records[WARM - 1]["ended_at"]
        row = {
            "steps_per_s": steps / seconds,
            "first_step_s": records[0]["ended_at"] - started,
            "last_loss": records[-1]["loss"],
        }
        return row | ({} if side == PLAIN else {"throughput": throughput(str(out), records)})


def table(rows: Sequence[dict[str, Any]]) -> None:
    """Median over the pairs of ours over plain, and of the time to the first step."""
    print("| workers | ZeRO | pairs | ours / plain, median (each) | steps/s plain, ours | first step, s | load |")
    print("|---|---|---|---|---|---|---|")
    plain = {(row["workers"], row["pair"]): row for row in rows if row["side"] == PLAIN}
    for workers, side in sorted({(row["workers"], row["side"]) for row in rows if row["side"] != PLAIN}):
        own = {row["pair"]: row for row in rows if (row["workers"], row["side"]) == (workers, side)}
        pairs = [(plain[workers, pair], row) for pair, row in own.items() if (workers, pair) in plain]
        if not pairs:
            continue
        ratios = [ours["steps_per_s"] / peer["steps_per_s"] for peer, ours in pairs]
        rates = (statistics.median(row["steps_per_s"] for row in side_rows) for side_rows in zip(*pairs, strict=True))
        print(
            f"| {workers} | {side.removeprefix('zero')} | {len(pairs)} "
            f"| {statistics.median(ratios):.3f} ({', '.join(f'{r:.3f}' for r in ratios)}) "
            f"| {', '.join(f'{rate:.2f}' for rate in rates)} "
            f"| {statistics.median(ours['first_step_s'] for _, ours in pairs):.1f} "
            f"| {max(row['load'] for pair in pairs for row in pair):.0f} |"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--zero", nargs="+", type=int, default=[0, 1, 2, 3])
    parser.add_argument("--shards", type=Path, default=Path(tempfile.gettempdir()) / "medim-ray-engine-shards")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--compare", action="store_true", help="measure nothing, print the table of --out")
    args = parser.parse_args(arguments)
    rows = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    if not args.compare:
        shards = shards_of(args.shards)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        done = {(row["workers"], row["side"], row["pair"], row["steps"]) for row in rows}
        for pair in range(args.pairs):
            sides = [PLAIN, *(f"zero{stage}" for stage in args.zero)]
            for workers in args.workers:
                for side in sides if pair % 2 == 0 else sides[::-1]:
                    if (workers, side, pair, args.steps) in done:
                        continue
                    row = {"workers": workers, "side": side, "pair": pair, "steps": args.steps, **machine()}
                    rows.append(row | measure(shards, side, workers, args.steps))
                    with args.out.open("a") as file:
                        file.write(json.dumps(rows[-1]) + "\n")
                    print(json.dumps(rows[-1]), flush=True)
    table([row for row in rows if row["steps"] == args.steps])


if __name__ == "__main__":
    main()
