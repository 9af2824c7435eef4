"""Question: how much faster are block masks of a whole granule than a per-patch Python loop, the reference's kind?

Run: OMP_NUM_THREADS=1 python -m benchmarks.block_masks [--out FILE]. Pairs alternate in one process of one thread;
printed are medians of CPU time, which other processes disturb little, and their ratios. --out gets them as a JSON line.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medim_ray.draws import Draws
from medim_ray.masking.block import ASPECT, MIN_BLOCK, NUM_TRIES, block_masks
from medim_ray.studies.origin import package_commit, this_machine
from medim_ray.types import Grid

GRID, RATIO, NUM_PAIRS, NUM_LOOPS = Grid(37, 37), 0.3, 9, 48
GRANULES = (8, 16, 32, 64, 128, 256)  # samples; two crops each


def loop_mask(count: int, grid: Grid, rng: random.Random, quick: bool) -> NDArray[np.bool_]:
    """One mask by the same law, one try and one patch at a time.

    The reference compares each patch with 0, which NumPy 2 makes slow for its booleans (1.6 us); `quick` reads the
    patch's truth instead (0.06 us): the best a per-patch loop can do.
    """
    mask = np.zeros((grid.height, grid.width), dtype=bool)
    missing = count
    while missing > 0:
        new = 0
        for _ in range(NUM_TRIES):
            area = rng.uniform(MIN_BLOCK, missing)
            aspect = math.exp(rng.uniform(math.log(ASPECT), -math.log(ASPECT)))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if height >= grid.height or width >= grid.width:
                continue
            top, left = rng.randint(0, grid.height - height), rng.randint(0, grid.width - width)
            block = mask[top : top + height, left : left + width]
            if not 0 < height * width - block.sum() <= missing:
                continue
            for row in range(top, top + height):
                for column in range(left, left + width):
                    if (not mask[row, column]) if quick else (mask[row, column] == 0):
                        mask[row, column] = True
                        new += 1
            break
        if new == 0:
            break
        missing -= new
    return mask


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, help="jobs/results/block_masks.jsonl")
    args = parser.parse_args()
    count = int(GRID.num_patches * RATIO)
    rng = random.Random(0)
    print(
        f"grid {GRID.height}x{GRID.width}, ratio {RATIO}: {count} patches; microseconds a mask, medians of {NUM_PAIRS}"
    )
    print(f"{'samples':>8} {'loop':>8} {'quick loop':>11} {'granule':>8} {'loop/granule':>13} {'quick/granule':>14}")
    rows = []
    for num in GRANULES:
        counts = np.full((num, 2), count, dtype=np.int64)
        times = []
        for pair in range(NUM_PAIRS):
            draws = Draws.of(pair, np.zeros(num, dtype=np.int64), [f"image{i}" for i in range(num)])
            row = []
            for quick in (False, True):
                start = time.process_time()
                for _ in range(NUM_LOOPS):
                    loop_mask(count, GRID, rng, quick)
                row.append((time.process_time() - start) / NUM_LOOPS * 1e6)
            start = time.process_time()
            block_masks(counts, GRID, draws, "mask/block")
            row.append((time.process_time() - start) / (2 * num) * 1e6)
            times.append(row)
        loop, quick_loop, ours = np.median(times, axis=0)
        ratios = np.median([(a / c, b / c) for a, b, c in times], axis=0)
        print(f"{num:8d} {loop:8.0f} {quick_loop:11.0f} {ours:8.1f} {ratios[0]:13.1f} {ratios[1]:14.1f}")
        medians = {"loop_us": loop, "quick_loop_us": quick_loop, "granule_us": ours}
        line = {"samples": num, **medians, "loop_ratio": ratios[0], "quick_loop_ratio": ratios[1]}
        rows.append({name: round(float(value), 2) for name, value in line.items()})
    if args.out is not None:
        where = {"commit": package_commit(), "machine": this_machine(), "numpy": np.__version__}
        with args.out.open("a") as file:
            file.write(json.dumps({**where, "pairs": NUM_PAIRS, "granules": rows}) + "\n")


if __name__ == "__main__":
    main()
