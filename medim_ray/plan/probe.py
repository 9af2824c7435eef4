"""What this machine can do: the rate of a large matrix product and of a sum. `python -m medim_ray.plan.probe` shows it.

Not a benchmark of training; the planner multiplies the rate by its utilisation constant.
"""

from __future__ import annotations

import time
from functools import cache

import torch

from medim_ray.plan.constants import gpu

# As torch.cuda.get_device_name calls the entries of `gpus` in constants.yaml.
TORCH_NAMES = {
    "NVIDIA A100-SXM4-80GB": "a100-80gb-sxm",
    "NVIDIA A100 80GB PCIe": "a100-80gb-pcie",
    "NVIDIA A100-SXM4-40GB": "a100-40gb-sxm",
    "NVIDIA H100 80GB HBM3": "h100-80gb-sxm",
    "NVIDIA H200": "h200-141gb-sxm",
    "NVIDIA L4": "l4-24gb",
}


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


def worker_peak(device: torch.device, precision: str) -> tuple[float, str]:
    """Peak operations a second of one worker's device, and in words where the number comes from: the device table for
    GPUs that it has, else a matrix product made here and now (0.2 s)."""
    if device.type == "cpu":
        threads = torch.get_num_threads()
        rate = threads * measure_peak_flops("fp32" if precision == "fp32" else "bf16", seconds=0.2)
        return rate, f"a matrix product on one core, measured at the start, x {threads} threads"
    name = torch.cuda.get_device_name(device)
    if name in TORCH_NAMES:
        kind = gpu(TORCH_NAMES[name])
        return kind.peak_fp32 if precision == "fp32" else kind.peak_bf16, f"device table, {kind.name}"
    return _device_rate(device, precision), f"a matrix product on {name}, measured at the start"


def _device_rate(device: torch.device, precision: str, side: int = 4096, seconds: float = 0.2) -> float:
    """Operations a second of a device that the table lacks, by wall time; the best of the repeats."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    a = torch.ones(side, side, device=device, dtype=dtype)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        started = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - started)
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
