"""The Ray that a command starts for itself."""

from __future__ import annotations

import subprocess
import sys

import psutil
import pytest

from medim_ray.session import STORE_BYTES, store_of

pytestmark = pytest.mark.system
_COMMAND = """
import psutil, ray
from medim_ray.session import ray_session

with ray_session(num_cpus=1):
    assert ray.get(ray.remote(num_cpus=1)(lambda: 7).remote()) == 7
    print([" ".join(process.cmdline()) for process in psutil.Process().children(recursive=True)])
assert ray._private.node.Node.__name__ == "Node"
"""


def test_the_object_store_is_as_large_as_the_stream_asks_for_within_bounds() -> None:
    share = int(0.3 * psutil.virtual_memory().total)
    assert store_of(1) == STORE_BYTES == 512 << 20
    assert store_of(600 << 20) == 600 << 20
    assert store_of(1 << 60) == max(share, STORE_BYTES)


def test_it_starts_no_process_that_nobody_needs() -> None:
    """In a process of its own: this one may have a Ray already."""
    done = subprocess.run([sys.executable, "-c", _COMMAND], capture_output=True, text=True, timeout=120, check=True)
    assert "raylet/raylet" in done.stdout
    for script in ("log_monitor.py", "autoscaler/_private/monitor.py", "dashboard/dashboard.py"):
        assert script not in done.stdout
