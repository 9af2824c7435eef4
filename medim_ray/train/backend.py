"""The process group of the workers: what Ray Train's torch backend does, from a controller that does not load torch
(two seconds of every start), and with SIGTERM taken for a warning. A developer API of Ray, pinned by test_train.py."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import Any

import ray
from ray.train.backend import Backend, BackendConfig

from medim_ray.train.control import catch_sigterm
from medim_ray.train.network import meet_on

_TIMEOUT_S = 1800  # of collectives, as in Ray; what hangs is found by train.hang_timeout_s before
_SHUTDOWN_S = 5.0


class _Backend(Backend):
    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        address, port = worker_group.execute_single(0, _free_address)
        size = len(worker_group)
        joining = [
            worker_group.execute_single_async(rank, _join, backend_config.backend, address, port, rank, size)
            for rank in range(size)
        ]
        ray.get(joining)

    def on_training_start(self, worker_group: Any, backend_config: Any) -> None:
        # Runs in the main thread of each worker, where alone Python lets a handler be set; training runs in another.
        worker_group.execute(catch_sigterm)

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        ray.wait(worker_group.execute_async(_leave), num_returns=len(worker_group), timeout=_SHUTDOWN_S)


def _free_address() -> tuple[str, int]:
    """Of rank 0, where the others meet it."""
    with socket.socket() as free:
        free.bind(("", 0))
        return ray.util.get_node_ip_address(), free.getsockname()[1]


def _join(backend: str, address: str, port: int, rank: int, size: int) -> None:
    """In each worker: environment and process group as DeepSpeed and torch expect them."""
    import os

    from ray.train.torch import config

    meet_on(ray.util.get_node_ip_address())
    os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
    config._set_torch_distributed_env_vars()
    config._setup_torch_process_group(
        backend=backend, world_rank=rank, world_size=size, init_method="env://", timeout_s=_TIMEOUT_S
    )


def _leave() -> None:
    from ray.train.torch import config

    config._shutdown_torch(destroy_process_group=True)


class _Context:
    """Around the training function: the worker's GPU is torch's default device."""

    def __enter__(self) -> None:
        import ray.train.torch
        import torch

        device = ray.train.torch.get_device()
        if device.type == "cuda":
            torch.cuda.set_device(device)

    def __exit__(self, *error: Any) -> None: ...


@dataclass
class WorkerBackend(BackendConfig):
    """backend: of torch.distributed, gloo or nccl."""

    backend: str

    @property
    def backend_cls(self) -> Any:
        return _Backend

    @property
    def train_func_context(self) -> Any:
        return _Context
