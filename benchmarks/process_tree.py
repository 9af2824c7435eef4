"""What a process and everything below it has cost: processor seconds, and memory that it holds now. For benchmarks."""

from __future__ import annotations

import psutil


def tree_seconds() -> float:
    """User + system seconds so far of this process and everything below it, those that have ended included."""
    me = psutil.Process()
    total = 0.0
    for process in [me, *me.children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.Error:
            continue
        total += times.user + times.system
    own = me.cpu_times()
    return total + own.children_user + own.children_system


def tree_bytes(pid: int) -> int:
    """Memory that a process and everything below it hold now; what several of them map, Ray's object store among it,
    counts once (proportional set size)."""
    top = psutil.Process(pid)
    total = 0
    for process in [top, *top.children(recursive=True)]:
        try:
            total += process.memory_full_info().pss
        except psutil.Error:
            continue
    return total
