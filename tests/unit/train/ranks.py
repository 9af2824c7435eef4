"""Runs a function on a few gloo ranks in processes of their own; used by the tests of ZeRO and checkpoints."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes


def on_ranks(world_size: int, function: Callable[..., None], *arguments: Any) -> None:
    """`function(*arguments)` on `world_size` ranks with a process group; an error on any rank is raised here."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start_processes(_rank, (world_size, port, function, arguments), nprocs=world_size, start_method="spawn")


def _rank(rank: int, world_size: int, port: int, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ |= {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    function(*arguments)
    dist.barrier()
    dist.destroy_process_group()
