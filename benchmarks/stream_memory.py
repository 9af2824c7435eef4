"""Question: does the memory of the stream grow with the corpus?

    python -m benchmarks.stream_memory --folder /tmp/corpora [--nums 2000 20000]

For each size a process (stream_contenders.py) starts Ray and streams one epoch of 512 px images, at least two of the
smallest; the peak is that of the sum over the process and all below it, Ray's object store included, each shared page
counted once, looked at twice a second. The target: less than 10 % apart.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.process_tree import tree_bytes
from benchmarks.repeated_shards import repeated_shards
from medim_ray.studies.origin import package_commit, this_machine


def peak_of(shards: Path, num_samples: int, recipe: str, actors: int) -> tuple[int, int]:
    """Bytes at the peak, and when half of the samples were through."""
    command = [sys.executable, "-m", "benchmarks.stream_contenders", "medim", str(shards), recipe, str(actors)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdin is not None and child.stdout is not None
    stop, peak = threading.Event(), [0]

    def watch() -> None:
        while not stop.wait(0.5):
            peak[0] = max(peak[0], tree_bytes(child.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    halves = []
    answers = (line for line in child.stdout if line.startswith("{"))
    next(answers)
    for _ in range(2):
        child.stdin.write(f"{num_samples // 2}\n")
        child.stdin.flush()
        next(answers)
        halves.append(peak[0])
    stop.set()
    watcher.join()
    child.stdin.close()
    child.wait(timeout=60)
    return peak[0], halves[0]


def main() -> None:
    """Prints a line a size and a JSON record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="corpora are written there where they are not yet")
    parser.add_argument("--nums", type=int, nargs="+", default=[2000, 20000])
    parser.add_argument("--recipe", choices=("medim", "rad_dino"), default="medim")
    parser.add_argument("--actors", type=int, default=2)
    args = parser.parse_args()
    peaks = {}
    for num in args.nums:
        shards = args.folder / str(num)
        if not (shards / "manifest.json").exists():
            repeated_shards(shards, num)
        peak, half = peak_of(shards, max(num, 2 * min(args.nums)), args.recipe, args.actors)
        peaks[num] = peak
        print(f"{num} images: peak {peak / 2**20:.0f} MiB ({half / 2**20:.0f} MiB half-way)", flush=True)
    first, last = args.nums[0], args.nums[-1]
    print(f"{last} images need {peaks[last] / peaks[first] - 1:+.1%} of what {first} need")
    where = {"machine": this_machine(), "commit": package_commit(), "recipe": args.recipe, "actors": args.actors}
    print(json.dumps({"peak_bytes": peaks, **where, "when": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")}))


if __name__ == "__main__":
    main()
