"""Question: what does carrying the stream cost over the readers' own work, and which process costs it?

    python -m benchmarks.stream_overhead --shards /tmp/shards --turns 5 [--recipe rad_dino]

MedIM's contender of stream.py is asked for samples in turns. The readers tell the processor time of their own work
(read, decode, crop, tokens, mask plan) with each block; everything else in the process tree, by thread
(/proc/PID/task/TID/schedstat), is what carries it: percent of the readers' time, medians over the turns. All
of the same seconds, so that a machine whose speed drifts, as pairs of runs feel by 10 % and more, does not move it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path

import psutil

from benchmarks.repeated_shards import repeated_shards
from benchmarks.stream import OURS, Contender
from medim_ray.studies.origin import package_commit, this_machine

READERS, CONSUMER = "MapWorker", "consumer"
_PARTS = (READERS, "SplitCoordinator", "StreamingRepartition", "StatsActor", "AutoscalingCoordinator", "ActorLocation")
_DAEMONS = {"raylet/raylet": "raylet", "gcs_server": "GCS", "DashboardAgent": "agents", "RuntimeEnvAgent": "agents"}


def part_of(process: psutil.Process, consumer: int) -> str:
    """What a process of the tree is."""
    if process.pid == consumer:
        return CONSUMER
    words = " ".join(process.cmdline()) or process.name()
    known = {**{name: name for name in _PARTS}, **_DAEMONS}
    return next((part for mark, part in known.items() if mark in words), "other")


def thread_seconds(consumer: int) -> dict[tuple[int, str], tuple[str, float]]:
    """(process, thread) -> what the process is, processor seconds so far; for the whole tree."""
    found = {}
    top = psutil.Process(consumer)
    for process in [top, *top.children(recursive=True)]:
        try:
            part = part_of(process, consumer)
            for thread in Path(f"/proc/{process.pid}/task").iterdir():
                nanoseconds = int((thread / "schedstat").read_text().split()[0])
                found[process.pid, thread.name] = (part, nanoseconds / 1e9)
        except (psutil.Error, OSError):
            continue  # it has ended meanwhile
    return found


def main() -> None:
    """Prints the table, and a JSON line for jobs/results/stream_overhead.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=Path, required=True, help="written there if it is not there yet")
    parser.add_argument("--num", type=int, default=2000, help="images of the corpus")
    parser.add_argument("--samples", type=int, default=20000, help="samples of one turn")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--recipe", choices=("medim", "rad_dino"), default="medim")
    parser.add_argument("--actors", type=int, default=2)
    args = parser.parse_args()
    if not (args.shards / "manifest.json").exists():
        repeated_shards(args.shards, args.num)
    ours = Contender(OURS, sys.executable, args, args.actors)
    ours.take(max(args.samples // 2, args.num))  # warm: tokens are cached, every row group was read
    turns: list[dict[str, float]] = []
    for _ in range(args.turns):
        before = thread_seconds(ours.pid)
        answer = ours.take(args.samples)
        own = answer["stages_s"]["cpu"]
        cost: dict[str, float] = defaultdict(float)
        for key, (part, seconds) in thread_seconds(ours.pid).items():
            cost[part] += seconds - before.get(key, (part, 0.0))[1]
        cost[READERS] -= own
        turns.append({"all": 100 * sum(cost.values()) / own, **{part: 100 * s / own for part, s in cost.items()}})
    ours.close()
    shares = {part: statistics.median(turn.get(part, 0.0) for turn in turns) for part in turns[0]}
    for part, share in sorted(shares.items(), key=lambda entry: -entry[1]):
        print(f"{part:24} {share:6.2f} % of the readers' processor time")
    record = {
        "recipe": args.recipe,
        "samples": args.samples,
        "turns": [round(turn["all"], 2) for turn in turns],
        "percent": {part: round(share, 2) for part, share in shares.items()},
        "first_batch_s": ours.start["first_batch_s"],
        "machine": this_machine(),
        "commit": package_commit(),
        "when": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
