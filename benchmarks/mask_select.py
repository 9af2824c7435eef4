"""Question: how much faster is choosing hidden patches in one batched operation than sample by sample?

Paired runs in one process, one thread: the per-sample loop draws index permutations, ours sorts noise that the plan has
drawn. Prints microseconds a sample and strategy, and the ratio of each pair.

    python benchmarks/mask_select.py [--batch 64] [--patches 196] [--pairs 20]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from medim_ray.masking.report import ReportMasking
from medim_ray.masking.selection import select_hidden


def loop(maps_SBN: Tensor, ratio: float, diversity: float) -> Tensor:
    """One sample and strategy after the other, with index permutations."""
    hidden_SBN = torch.zeros(maps_SBN.shape, dtype=torch.bool)
    for strategy in range(maps_SBN.shape[0]):
        for sample in range(maps_SBN.shape[1]):
            map_N = maps_SBN[strategy, sample]
            values_N, _ = torch.sort(map_N, descending=True)
            threshold = values_N[int(len(map_N) * ratio)]
            high = (map_N > threshold).nonzero().squeeze(1)
            low = (map_N <= threshold).nonzero().squeeze(1)
            high = high[torch.randperm(len(high))]
            low = low[torch.randperm(len(low))]
            chosen = high[: int(diversity * len(high))].tolist() + low[: int((1 - diversity) * len(low))].tolist()
            for patch in chosen:
                hidden_SBN[strategy, sample, patch] = True
    return hidden_SBN


def timed(run: Callable[[], object]) -> float:
    start_s = time.perf_counter()
    run()
    return time.perf_counter() - start_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--patches", type=int, default=196)
    parser.add_argument("--pairs", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    maps_SBN = torch.rand(2, options.batch, options.patches, generator=generator)
    noise_SBN = torch.rand(maps_SBN.shape, generator=generator)
    has_word_SB = torch.ones(maps_SBN.shape[:2], dtype=torch.bool)
    config = ReportMasking.Config(fallback="paper")

    ours_SBN, _ = select_hidden(maps_SBN, noise_SBN, has_word_SB, config)
    assert torch.equal(ours_SBN.sum(-1), loop(maps_SBN, config.ratio, config.diversity).sum(-1)), "other counts"

    loop_s, ours_s = [], []
    for _ in range(options.pairs):
        loop_s.append(timed(lambda: loop(maps_SBN, config.ratio, config.diversity)))
        ours_s.append(timed(lambda: select_hidden(maps_SBN, noise_SBN, has_word_SB, config)))
    ratios = sorted(a / b for a, b in zip(loop_s, ours_s, strict=True))
    per_item = 1e6 / (2 * options.batch)
    print(f"batch {options.batch}, {options.patches} patches, 2 strategies, {options.pairs} pairs, 1 thread")
    print(f"loop   {statistics.median(loop_s) * per_item:8.2f} us a sample and strategy (median)")
    print(f"ours   {statistics.median(ours_s) * per_item:8.2f} us a sample and strategy (median)")
    print(f"ratio  {statistics.median(ratios):8.1f} median of pairs, {ratios[0]:.1f} lowest, {ratios[-1]:.1f} highest")


if __name__ == "__main__":
    main()
