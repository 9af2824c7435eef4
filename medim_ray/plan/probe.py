"""What this machine can do: the rate of a large matrix product and of a sum. `python -m medim_ray.plan.probe` shows it.

Not a benchmark of training; the planner multiplies the rate by its utilisation constant.
"""

from __future__ import annotations

import time
from functools import cache

import torch


@cache
def measure_peak_flops(precision: str = "fp32", side: int = 1024, seconds: float = 0.5) -> float:
    """Operations a second of one core in a square matrix product; the best of the repeats within `seconds`.

    A device of kind cpu-core is one core: the product runs on one thread, and its processor time is taken, so that
    what other processes do in between does not count.
    """
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(side, side, generator=generator).to(dtype)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        a @ a
        best, end = float("inf"), time.thread_time() + seconds
        while time.thread_time() < end:
            started = time.thread_time()
            a @ a
            best = min(best, time.thread_time() - started)
    finally:
        torch.set_num_threads(threads)
    return 2.0 * side**3 / best


def measure_bandwidth(num_bytes: int = 1 << 28, repeats: int = 5) -> float:
    """Bytes read and written a second by one core adding two large float tensors."""
    a = torch.ones(num_bytes // 4)
    out = torch.empty_like(a)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        best = float("inf")
        for _ in range(repeats):
            started = time.thread_time()
            torch.add(a, 1.0, out=out)
            best = min(best, time.thread_time() - started)
    finally:
        torch.set_num_threads(threads)
    return 2.0 * num_bytes / best


if __name__ == "__main__":
    for kind in ("fp32", "bf16"):
        print(f"matrix product {kind}: {measure_peak_flops(kind) / 1e12:.4f} TFLOPS on one core")
    print(f"add: {measure_bandwidth() / 1e9:.1f} GB/s on one core")
