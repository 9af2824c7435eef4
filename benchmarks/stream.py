"""Question: how fast is MedIM's stream beside a bare loop, torch DataLoader, webdataset and mosaicml-streaming?

    python -m benchmarks.stream --shards /tmp/shards --num 2000 --pairs 5 [--recipe rad_dino] [--peers PYTHON]

All do the same work with the same functions on the same images (stream_contenders.py): decode 512 px JPEG, resize,
crop, tokens, mask plan, batches; so what differs is what carries them. Each is a process of its own that stays up and
is asked for samples in turn; its processor time is user + system of it and all below it, Ray's own included. What comes
before the first measurement (start, caches of tokens, a pass over the images) is reported apart. --peers names the
interpreter of `make peers`.

Contenders decode ahead while the others have their turn (Ray up to its object store: 10,000 samples of 224 px), and
what is idle costs something too (Ray's daemons: 0.1 of a core). So each turn begins with --lead samples that do not
count, more than may lie ready, and processor seconds are those of the --samples right behind them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.repeated_shards import repeated_shards
from medim_ray.studies.origin import package_commit, this_machine

OURS, BARE = "medim", "bare"
CONTENDERS = (BARE, OURS, "dataloader", "webdataset", "mosaicml")


class Contender:
    """A process that yields samples when it is asked."""

    def __init__(self, name: str, python: str, args: argparse.Namespace, workers: int) -> None:
        self.name, self.workers = name, workers
        command = [python, "-m", "benchmarks.stream_contenders", name, str(args.shards), args.recipe, str(workers)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.pid = self._process.pid
        self.start = self._answer()  # {"missing": why} where it is not installed

    @property
    def is_there(self) -> bool:
        return "missing" not in self.start

    def take(self, num: int) -> dict[str, Any]:
        """wall_s and cpu_s of `num` samples."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{num}\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        raise RuntimeError(f"{self.name} ended: see its messages above")

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)


def opened(args: argparse.Namespace) -> list[Contender]:
    """Those that there are, warm; loaders with the number of workers that gave most samples a second."""
    there = []
    for name in args.contenders:
        python = args.peers if name in ("webdataset", "mosaicml") else sys.executable
        if not python:
            print(f"{name}: not available here (no --peers)")
            continue
        counts = [args.actors] if name in (OURS, BARE) else args.loader_workers
        tried = []
        for workers in counts:
            one = Contender(name, python, args, workers)
            if not one.is_there:
                print(f"{name}: not available here ({one.start['missing']})")
                one.close()
                break
            warm = one.take(args.num)
            speed = args.samples / one.take(args.samples)["wall_s"] if len(counts) > 1 else 0.0
            first = one.start["first_batch_s"]
            print(f"{name}, {workers} workers: first batch {first:.1f} s, warm-up {warm['wall_s']:.1f} s", flush=True)
            tried.append((speed, one))
        tried.sort(key=lambda entry: -entry[0])
        there += [one for _, one in tried[:1]]
        for _, one in tried[1:]:
            one.close()
    return there


def main() -> None:
    """Prints a table, and a JSON line with every number for jobs/results/stream.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=Path, required=True, help="written there if it is not there yet")
    parser.add_argument("--num", type=int, default=2000, help="images of the corpus")
    parser.add_argument("--samples", type=int, default=20000, help="samples of one measurement")
    parser.add_argument("--lead", type=int, default=12000, help="samples of its turn before the measurement")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--recipe", choices=("medim", "rad_dino"), default="medim")
    parser.add_argument("--actors", type=int, default=2, help="decoding actors of MedIM")
    parser.add_argument("--loader-workers", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--peers", help="python of an environment with webdataset and mosaicml-streaming")
    args = parser.parse_args()
    if not (args.shards / "manifest.json").exists():
        repeated_shards(args.shards, args.num)
    there = opened(args)
    rows: dict[str, list[dict[str, Any]]] = {one.name: [] for one in there}
    for pair in range(args.pairs):
        for one in there if pair % 2 == 0 else reversed(there):
            one.take(args.lead)
            rows[one.name].append(one.take(args.samples))
            time.sleep(0.5)  # what it decodes ahead comes before the next one's turn
        shown = {name: round(args.samples / taken[-1]["cpu_s"]) for name, taken in rows.items()}
        print(f"pair {pair}: samples per CPU-second {shown}", flush=True)
    for one in there:
        one.close()
    tell(args, there, rows)


def tell(args: argparse.Namespace, there: list[Contender], rows: dict[str, list[dict[str, Any]]]) -> None:
    """The table: medians, and medians of the ratios of MedIM to each within a pair."""
    lines: dict[str, Any] = {}
    ours = rows.get(OURS, [])
    print(
        "\ncontender (workers)      samples/s  per CPU-second  MedIM over it: per CPU-second, per second  first batch s"
    )
    for one in there:
        taken = rows[one.name]
        ratios = {
            key: statistics.median(t[key] / o[key] for t, o in zip(taken, ours, strict=True)) if ours else float("nan")
            for key in ("cpu_s", "wall_s")
        }
        speed = {key: args.samples / statistics.median(t[key] for t in taken) for key in ("cpu_s", "wall_s")}
        print(
            f"{one.name + f' ({one.workers})':24} {speed['wall_s']:9.0f} {speed['cpu_s']:15.0f} {ratios['cpu_s']:31.3f}"
            f" {ratios['wall_s']:11.3f} {one.start['first_batch_s']:14.1f}"
        )
        lines[one.name] = {"workers": one.workers, "start": one.start, "taken": taken, "medim_over_it": ratios}
    stages = ours[-1].get("stages_s") if ours else None
    if stages:
        share = stages["plan"] / sum(seconds for name, seconds in stages.items() if name != "cpu")
        print(f"masks and plans: {share:.1%} of the readers' time; by stage {stages}")
    packages = ("ray", "torch", "opencv-python-headless", "pyarrow", "numpy")
    record = {
        "recipe": args.recipe,
        "num_images": args.num,
        "samples": args.samples,
        "contenders": lines,
        "machine": this_machine(),
        "versions": {name: version(name) for name in packages},
        "commit": package_commit(),
        "when": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
