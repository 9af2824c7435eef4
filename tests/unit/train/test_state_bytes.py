"""What a worker holds of parameters and optimizer at each ZeRO stage is what the planner's formula says."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from medim_ray.config.schema import TrainConfig
from medim_ray.plan.constants import code
from medim_ray.plan.memory import Memory, memory
from medim_ray.plan.workload import workload
from medim_ray.train import zero
from tests.unit.train.ranks import on_ranks

WORKERS = 2
SMALL = ["encoder.width=96", "encoder.depth=4", "encoder.num_heads=3"]
CASES: list[tuple[int, Literal["fp32", "bf16"]]] = [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (3, "bf16")]


def state_bytes(engine: Any) -> int:
    """Bytes of parameters, masters and moments of this rank: each storage once, with its padding."""
    optimizer = zero._torch_optimizer(engine)
    held = [p.ds_tensor if hasattr(p, "ds_tensor") else p.data for p in engine.module.parameters()]
    for flat in zero._flat_tensors(engine):
        held += [flat.data, *(optimizer.state[flat][kind] for kind in zero.MOMENTS)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in held}
    return sum(storages.values())


def compare(folder: str) -> None:
    from medim_ray.config.loader import load
    from medim_ray.config.schema import RunConfig
    from tests.unit.objectives.batches import build

    sizes = {"image_size": 224, "width": 96, "depth": 4, "num_heads": 3}
    for stage, precision in CASES:
        config = load(RunConfig, None, [*SMALL, f"train.precision={precision}"])
        need: Memory = memory(
            workload(config, code("medim_ray")),
            stage=stage,
            num_gpus=WORKERS,
            micro_batch=1,
            checkpointed=False,
            on_cpu=True,
        )
        train = TrainConfig(steps=9, num_workers=WORKERS, zero=stage, global_batch=8, precision=precision)
        engine = zero.build_engine(build("mae", {"name": "uniform"}, sizes), train)
        ratio = state_bytes(engine) / (need.parameters + need.optimizer)
        if torch.distributed.get_rank() == 0:
            Path(folder, f"{stage} {precision}").write_text(str(ratio))


def test_state_bytes_follow_the_formula_within_a_twentieth(tmp_path: Path) -> None:
    on_ranks(WORKERS, compare, str(tmp_path))
    ratios = {path.name: float(path.read_text()) for path in tmp_path.iterdir()}
    assert len(ratios) == len(CASES)
    assert all(abs(ratio - 1.0) < 0.05 for ratio in ratios.values()), ratios
