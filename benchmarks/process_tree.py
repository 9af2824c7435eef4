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


def tree_bytes() -> tuple[int, int]:
    """Private memory of this process and everything below it (its proportional share of what several of them map), and
    the shared memory in it, which Ray's object store is part of."""
    total = shared = 0
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        try:
            info = process.memory_full_info()
        except psutil.Error:
            continue
        total += info.pss
        shared += info.pss - info.uss
    return total, shared
