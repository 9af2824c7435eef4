"""The Ray that a command works in: a running one, the cluster at an address, or one started here while it lasts."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import psutil
import ray
import ray._private.node
from ray._private.node import Node

STORE_BYTES = 512 << 20  # object store of a Ray that is started here, where nobody asks for more
_QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": "WARNING"}
# Of a Ray that is started here nobody reads metrics, event statistics or the list of tasks.
_UNWATCHED = {"enable_metrics_collection": False, "event_stats": False, "task_events_report_interval_ms": 0}
# Ray's words for a raylet whose helper processes were not there within 30 s.
_TOO_SLOW = "timed out during startup"


@contextlib.contextmanager
def ray_session(
    address: str = "", num_cpus: int | None = None, object_store_memory: int | None = STORE_BYTES
) -> Iterator[bool]:
    """Joins the cluster at `address` or RAY_ADDRESS, or starts Ray here and ends it afterwards; leaves a session that
    runs alone. Yields whether it was started here, so that nobody else uses it, adds nodes or takes them away.
    RuntimeError where Ray does not come up.

    Of a Ray that is started here: logical CPUs (None: those of the machine), bytes of its object store (None: Ray's
    share of the memory).
    """
    if ray.is_initialized():
        yield False
        return
    address = address or os.environ.get("RAY_ADDRESS", "")
    if address:
        ray.init(address=address, **_QUIET)
    else:
        _start(num_cpus=num_cpus, object_store_memory=object_store_memory)
    try:
        yield not address
    finally:
        ray.shutdown()


def store_of(wanted: int) -> int:
    """Bytes of the object store of a Ray that is started here for a stream that wants so many: at least those of
    `ray_session`, at most Ray's own share of the memory. Memory is taken as it fills."""
    return max(STORE_BYTES, min(wanted, int(0.3 * psutil.virtual_memory().total)))


class _BareNode(Node):
    """A head node without the processes that serve only a dashboard, an autoscaler and a driver that prints logs. Each
    is an interpreter that imports Ray: without the three, `ray.init` and what it starts cost 6 CPU-seconds instead of
    9, and an idle Ray 5 % of a core instead of 7. Ray has no option for it (2.60)."""

    def start_log_monitor(self) -> None: ...

    def start_monitor(self) -> None: ...

    def start_api_server(self, **_: Any) -> None: ...


@contextlib.contextmanager
def _bare_nodes() -> Iterator[None]:
    """`ray.init` starts a _BareNode."""
    ray._private.node.Node = _BareNode
    try:
        yield
    finally:
        ray._private.node.Node = Node


def _start(**sizes: int | None) -> None:
    """A second time where it was too slow: a cold disk has been read by then."""
    for is_last in (False, True):
        try:
            with _bare_nodes():
                # "local": not a cluster that somebody else happens to run on this machine.
                ray.init(address="local", include_dashboard=False, _system_config=_UNWATCHED, **sizes, **_QUIET)
            return
        except Exception as error:  # Ray raises the bare class
            if _TOO_SLOW not in str(error):
                raise
            ray.shutdown()
            if is_last:
                load, cpus = os.getloadavg()[0], os.cpu_count()
                raise RuntimeError(
                    f"Ray did not come up on this machine, twice: load {load:.0f} on {cpus} CPUs. End what else runs "
                    "here, or join a running cluster with run.ray_address or RAY_ADDRESS. Ray's own words are in "
                    "/tmp/ray/session_latest/logs"
                ) from error
