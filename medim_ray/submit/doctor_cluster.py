"""`medim-ray doctor --cluster ADDRESS`: what a Ray cluster has, one line a check, asked on every node of it.

Run where the cluster's network is: on a node, or as a job (`command: [doctor, --cluster, auto]`). It writes one file a
node to `--storage`, and removes them again.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec

from medim_ray.data.progress import quiet
from medim_ray.submit.doctor import MIN_DISK_BYTES, MIN_MEMORY_BYTES
from medim_ray.submit.ray_jobs import read_token

_TIMEOUT_S = 120.0
_JOIN_TIMEOUT_S = 45.0
_MAX_CLOCK_S = 2.0
_REDUCED_BYTES = 16 << 20
_STREAMED_BYTES, _BLOCK_BYTES = 64 << 20, 4 << 20


def check_cluster(address: str, storage: str | None = None) -> int:
    """Prints a line for each check of the cluster at `address` (HOST:6379 or auto); exit code 1 where one fails."""
    import ray

    failed = [] if _line("token", _token) else ["token"]
    if not (_line("ports", lambda: _ports(address)) and _line("join", lambda: _join(address))):
        return 1
    try:
        facts: list[dict[str, Any]] = []
        if not _line("nodes", lambda: _ask_nodes(facts)):
            return 1
        on_nodes: list[tuple[str, Callable[[], tuple[bool, str]]]] = [
            ("versions", lambda: _versions(facts)),
            ("clocks", _clocks),
            ("disk", lambda: _least(facts, "disk", MIN_DISK_BYTES)),
            ("memory", lambda: _least(facts, "memory", MIN_MEMORY_BYTES)),
            ("accelerators", lambda: _accelerators(facts)),
            *([("storage", lambda: _storage(storage))] if storage is not None else []),
            ("all-reduce", lambda: _all_reduce(all(f["gpus"] for f in facts))),
            ("data stream", _stream),
        ]
        failed += [name for name, check in on_nodes if not _line(name, check)]
    finally:
        ray.shutdown()
    return 1 if failed else 0


def _line(name: str, check: Callable[[], tuple[bool, str]]) -> bool:
    try:
        good, text = check()
    except Exception as error:  # a check that dies is a finding, not a crash of the doctor
        good, text = False, f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
    print(f"{'ok  ' if good else 'FAIL'} {name}: {text}")
    return good


def _token() -> tuple[bool, str]:
    mode, token = os.environ.get("RAY_AUTH_MODE", ""), read_token()
    if mode == "token" and not token:
        return False, "RAY_AUTH_MODE=token and no token: set RAY_AUTH_TOKEN_PATH to the head's (`ray get-auth-token`)"
    if token and mode != "token":
        return False, "there is a token, but RAY_AUTH_MODE is not token here: set it on head, workers and clients alike"
    if not token:
        return False, "no token: whoever reaches the cluster may run code; start it with RAY_AUTH_MODE=token"
    return True, "RAY_AUTH_MODE=token, a token is there"


def _ports(address: str) -> tuple[bool, str]:
    where = os.environ.get("RAY_ADDRESS", "") if address == "auto" else address
    host, _, port = where.rpartition(":")
    if address != "auto" and (not host or not port.isdigit()):
        return False, f"{address} is not HOST:PORT; the head's port is 6379 unless `ray start --port` said otherwise"
    if not host:
        return True, "auto: the Ray that runs on this machine"
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        return False, f"{where} can't be reached ({error}): is the head up, and is this its network?"
    return True, f"{where} answers"


# A refused token is told as such by the first call; ray.init only says that it failed to connect.
_ASK = "import sys; from ray._raylet import GcsClient; GcsClient(address=sys.argv[2])"
_JOIN = "import ray; ray.init(sys.argv[1], log_to_driver=False)"


def _join(address: str) -> tuple[bool, str]:
    """Joins, after another process has: ray.init compares versions, but may try for many minutes."""
    import ray

    if os.environ.get("RAY_AUTH_MODE") == "token" and not read_token():
        return False, "there is no token to show, see above"
    where = os.environ.get("RAY_ADDRESS", "") if address == "auto" else address

    def ask(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code, address, where]
        environment = {**os.environ, **variables}
        return subprocess.run(command, capture_output=True, text=True, timeout=_JOIN_TIMEOUT_S, env=environment)

    try:
        if where and os.environ.get("RAY_AUTH_MODE") == "token" and ask(_ASK, RAY_AUTH_MODE="disabled").returncode == 0:
            return False, (
                "RAY_AUTH_MODE=token here, but the head takes all who come, and would leave our work undone: start it, "
                "and its workers, with RAY_AUTH_MODE=token and the token"
            )
        first = ask(f"{_ASK if where else 'import sys'}; {_JOIN}")
    except subprocess.TimeoutExpired:
        return False, f"no welcome in {_JOIN_TIMEOUT_S:.0f} s though the port is open: TLS may be on at one side only"
    if first.returncode:
        return False, _why_not(first.stderr)
    ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    nodes = [node for node in ray.nodes() if node["Alive"]]
    return True, f"{len(nodes)} node(s), {ray.cluster_resources().get('CPU', 0):.0f} CPUs"


def _why_not(said: str) -> str:
    """What stands in the way of joining, out of the traceback of a process that tried."""
    if "InvalidAuthToken" in said:
        return (
            "the head asks for a token, and ours is missing or another cluster's: RAY_AUTH_MODE=token on head, workers "
            "and clients alike, and RAY_AUTH_TOKEN_PATH a copy of what `ray get-auth-token` prints on the head"
        )
    errors = [line for line in said.splitlines() if re.match(r"[\w.]*(Error|Exception)\b", line)]
    text = (errors or said.splitlines() or ["it ended without a word"])[-1][:300]
    if "ersion mismatch" in said:
        mismatch = " ".join(said[said.index("ersion mismatch") - 1 :].split())
        return f"{mismatch[:300]}; use the cluster's Ray and Python here"
    return f"{text}: is it a Ray head, with TLS (RAY_USE_TLS) as it is here?"


def _ask_nodes(facts: list[dict[str, Any]]) -> tuple[bool, str]:
    """Fills `facts`, one entry a node, the one with the driver first."""
    import ray

    pending = _on_every_node(_facts)
    done, _ = ray.wait(pending, num_returns=len(pending), timeout=_TIMEOUT_S)
    hosts = {node["NodeID"]: node["NodeManagerHostname"] for node in ray.nodes()}
    late = [hosts[node] for node, answer in zip(_nodes(), pending, strict=True) if answer not in done]
    if late:
        return False, (
            f"{', '.join(late)} ran no task in {_TIMEOUT_S:.0f} s: started with another RAY_AUTH_MODE or token than "
            "the head, or its ports are closed to us"
        )
    facts += ray.get(pending)
    return True, f"{len(facts)} node(s) ran a task"


def _from_every_node(function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """The function's answer from each node, the one with the driver first."""
    import ray

    answers: list[Any] = ray.get(_on_every_node(function, *arguments), timeout=_TIMEOUT_S)
    return answers


def _on_every_node(function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Pending answers of a task on each node."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    remote = ray.remote(num_cpus=0)(function)
    return [
        remote.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(*arguments)
        for node in _nodes()
    ]


def _nodes() -> list[str]:
    """The nodes that are alive, ours first."""
    import ray

    own = ray.get_runtime_context().get_node_id()
    return sorted((node["NodeID"] for node in ray.nodes() if node["Alive"]), key=lambda node: (node != own, node))


def _facts() -> dict[str, Any]:
    """What one node has."""
    import psutil
    import ray
    import torch

    import medim_ray

    folders = {"/tmp", os.environ.get("RAY_TMPDIR", "/tmp")}
    return {
        "host": platform.node(),
        "versions": {
            "Ray": ray.__version__,
            "Python": platform.python_version(),
            "torch": torch.__version__,
            "medim-ray": medim_ray.__version__,
        },
        "disk": min(shutil.disk_usage(folder).free for folder in folders if Path(folder).exists()),
        "memory": psutil.virtual_memory().available,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def _versions(facts: list[dict[str, Any]]) -> tuple[bool, str]:
    ours = facts[0]["versions"]
    shown = ", ".join(f"{name} {version}" for name, version in ours.items())
    others = [f"{f['host']} has {f['versions']}" for f in facts if f["versions"] != ours]
    return not others, f"{shown} on {len(facts)} node(s)" + (f"; but {'; '.join(others)}" if others else "")


def _clocks() -> tuple[bool, str]:
    """The farthest clock from ours; the second of two calls, since the first may have to start a worker."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    remote, offsets = ray.remote(num_cpus=0)(_clock), []
    for node in _nodes():
        there = remote.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))
        for _ in range(2):
            before = time.time()
            clock = ray.get(there.remote(), timeout=_TIMEOUT_S)
            offset = clock - (before + time.time()) / 2
        offsets.append(offset)
    worst = max(offsets, key=abs)
    fix = "" if abs(worst) < _MAX_CLOCK_S else "; set them by NTP: tokens and certificates go by the clock"
    return abs(worst) < _MAX_CLOCK_S, f"within {abs(worst):.3f} s{fix}"


def _clock() -> float:
    return time.time()


def _least(facts: list[dict[str, Any]], key: str, least: int) -> tuple[bool, str]:
    worst = min(facts, key=lambda f: f[key])
    good = worst[key] > least
    fix = "" if good else f"; at least {least >> 30} GiB are needed on each node"
    return good, f"at least {worst[key] / 2**30:.1f} GiB free, on {worst['host']}{fix}"


def _accelerators(facts: list[dict[str, Any]]) -> tuple[bool, str]:
    kinds = Counter(name for f in facts for name in f["gpus"])
    return True, ", ".join(f"{num} x {name}" for name, num in kinds.items()) or "none (train.use_gpu=false)"


def _storage(url: str) -> tuple[bool, str]:
    folder = f"{url.rstrip('/')}/.medim-ray-doctor-{uuid.uuid4().hex[:8]}"
    try:
        written = _from_every_node(_write, folder)
        missing = [problem for problem in _from_every_node(_read, folder, written) if problem]
    finally:
        fs, root = fsspec.core.url_to_fs(folder)
        if fs.exists(root):
            fs.rm(root, recursive=True)
    if missing:
        return False, f"{url}: {'; '.join(missing)}: it must be one storage for all nodes"
    return True, f"{url}: each of {len(written)} node(s) wrote a file and read all of them"


def _write(folder: str) -> str:
    fs, root = fsspec.core.url_to_fs(folder)
    fs.makedirs(root, exist_ok=True)
    name = f"{platform.node()}-{uuid.uuid4().hex[:8]}"
    fs.pipe_file(f"{root}/{name}", name.encode())
    return name


def _read(folder: str, names: list[str]) -> str:
    fs, root = fsspec.core.url_to_fs(folder)
    lost = []
    for name in names:
        try:
            if fs.cat_file(f"{root}/{name}") != name.encode():
                lost.append(name)
        except OSError:
            lost.append(name)
    return f"{platform.node()} does not see what {', '.join(lost)} wrote" if lost else ""


def _all_reduce(has_gpus: bool) -> tuple[bool, str]:
    """16 MiB over one process a node; bandwidth as algorithms count it, 2 (n - 1) / n of the bytes a node."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = _nodes()
    backend = "nccl" if has_gpus else "gloo"
    if len(nodes) == 1:
        return True, "one node: nothing to cross"
    host, port = _from_every_node(_free_port)[0]
    remote = ray.remote(num_cpus=0, num_gpus=int(has_gpus))(_reduce)
    pending = [
        remote.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(
            f"tcp://{host}:{port}", rank, len(nodes), backend
        )
        for rank, node in enumerate(nodes)
    ]
    seconds = max(ray.get(pending, timeout=_TIMEOUT_S))
    rate = 2 * (len(nodes) - 1) / len(nodes) * _REDUCED_BYTES / seconds
    return True, f"{backend}, {len(nodes)} nodes, {rate / 1e6:.0f} MB/s"


def _free_port() -> tuple[str, int]:
    import ray

    with socket.socket() as probe:
        probe.bind(("", 0))
        return ray.util.get_node_ip_address(), int(probe.getsockname()[1])


def _reduce(url: str, rank: int, num: int, backend: str) -> float:
    """Seconds of one all-reduce, the best of three. AssertionError where the sum is wrong."""
    import datetime

    import ray
    import torch
    import torch.distributed as dist

    from medim_ray.train.network import meet_on

    meet_on(ray.util.get_node_ip_address())
    limit = datetime.timedelta(seconds=_TIMEOUT_S / 2)
    dist.init_process_group(backend, init_method=url, rank=rank, world_size=num, timeout=limit)
    try:
        values = torch.ones(_REDUCED_BYTES // 4, device="cuda" if backend == "nccl" else "cpu")
        times = []
        for _ in range(3):
            dist.barrier()
            started = time.perf_counter()
            dist.all_reduce(values)
            total = float(values[0])
            times.append(time.perf_counter() - started)
            assert total == num, f"the sum of {num} ones is {total}"
            values.fill_(1.0)
        return min(times)
    finally:
        dist.destroy_process_group()


def _stream() -> tuple[bool, str]:
    """Blocks of 4 MiB made by tasks on the cluster and read here, as the trainer reads its stream; the second of two
    readings, since the first starts the workers."""
    import numpy as np
    import ray.data

    def blocks(batch: dict[str, Any]) -> dict[str, Any]:
        return {"image": np.zeros((len(batch["id"]), _BLOCK_BYTES), np.uint8)}

    num = _STREAMED_BYTES // _BLOCK_BYTES
    stream = ray.data.range(num, override_num_blocks=num).map_batches(blocks, batch_size=None, num_cpus=0.1)
    with quiet("ray.data"):
        for _ in range(2):
            started, arrived = time.perf_counter(), 0
            for batch in stream.iter_batches(batch_size=1, batch_format="numpy"):
                arrived += batch["image"].nbytes
            rate = arrived / (time.perf_counter() - started)
    return arrived == _STREAMED_BYTES, f"{rate / 1e6:.0f} MB/s to this node, {arrived >> 20} MiB"
