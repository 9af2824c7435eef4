"""Ray Train's torch backend, whose workers take SIGTERM for a warning. Loaded by the controller: keep it light."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ray.train.torch import TorchConfig

from medim_ray.train.control import catch_sigterm

_Base: Any = TorchConfig().backend_cls


class _Backend(_Base):
    def on_training_start(self, worker_group: Any, backend_config: Any) -> None:
        super().on_training_start(worker_group, backend_config)
        # Runs in the main thread of each worker, where alone Python lets a handler be set; training runs in another.
        worker_group.execute(catch_sigterm)


@dataclass
class WarnedTorchConfig(TorchConfig):
    """TorchConfig with that backend."""

    @property
    def backend_cls(self) -> Any:
        return _Backend
