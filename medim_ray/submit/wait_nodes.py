"""`python -m medim_ray.submit.wait_nodes NUM TIMEOUT_S PID…`: waits for the nodes of the cluster at RAY_ADDRESS.

Exit code 1, with the reason, when the time is over or one of the processes PID, which start the nodes, has ended.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence

import psutil
import ray


def wait_nodes(num: int, timeout_s: float, pids: Sequence[int], poll_s: float = 0.5) -> str:
    """'' once `num` nodes are alive, else what went wrong."""
    deadline = time.monotonic() + timeout_s
    ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False, logging_level="ERROR")
    try:
        while True:
            alive = sum(node["Alive"] for node in ray.nodes())
            if alive >= num:
                return ""
            if not all(_runs(pid) for pid in pids):
                return f"a step that starts nodes has ended, {alive} of {num} nodes are there"
            if time.monotonic() > deadline:
                return f"{alive} of {num} nodes after {timeout_s:.0f} s (slurm.start_timeout_s)"
            time.sleep(poll_s)
    finally:
        ray.shutdown()


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def main(arguments: Sequence[str]) -> int:
    """Exit code 0 when all nodes are there."""
    num, timeout_s, *pids = arguments
    problem = wait_nodes(int(num), float(timeout_s), [int(pid) for pid in pids])
    if problem:
        print(f"medim-ray: {problem}", file=sys.stderr)
    return 1 if problem else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
