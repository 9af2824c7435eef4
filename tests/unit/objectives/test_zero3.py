"""Every objective of this package gives, in two processes under ZeRO-3, the losses of one plain process.

ZeRO-3 frees a parameter after the forward of the module that owns it: an objective that reads a parameter elsewhere
fails here and nowhere else, and so does what publishes parameters. Norms are per sample, so that two halves of a batch
are the batch.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from medim_ray.data.texts import TextRows
from medim_ray.masking import MASKINGS
from medim_ray.probes.localise import ModelMaps
from medim_ray.train.snapshot_store import SnapshotStore
from medim_ray.train.snapshots import Publisher
from tests.unit.objectives.batches import batch_for, build

SMALL = {"projection_hidden": 64, "projection_dim": 32, "decoder_widths": (16, 8, 8, 8), "norm": "layer"}
# Prototypes are left out where losses are compared: Sinkhorn balances a rank's own samples.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "mae": ("mae", {"name": "uniform"}, {}),
    "simmim": ("simmim", {"name": "uniform"}, {}),
    "medim": ("medim", {"name": "kdm+sdm"}, {**SMALL, "proto_weight": 0.0, "gather_negatives": True}),
    # After a warm-up of one step, in which most parameters have no gradient.
    "input": (
        "medim",
        {"name": "kdm", "on": "input"},
        {**SMALL, "proto_weight": 0.0, "gather_negatives": True, "mae_ratio": 0.01},
    ),
}
STEPS = 3
NO_TEXT = TextRows(columns={}, mentions=[])  # maps are made of the batch's own columns


def losses(case: str, rank: int, num_ranks: int, folder: Path) -> list[float]:
    """This rank's loss at each step: a plain loop for one rank, ZeRO-3 for several. What MedIM's attention needs is
    published at the end under `folder`."""
    name, masking_options, options = CASES[case]
    objective = build(name, masking_options, **options)
    strategy = MASKINGS[masking_options["name"]]
    masking = strategy(strategy.Config(**masking_options))
    groups = [{"params": [*group.parameters]} for group in objective.parameter_groups()]
    # SGD, because Adam turns the rounding of a gradient that is zero in theory into a full step.
    optimizer: Any = torch.optim.SGD(groups, lr=0.01)
    engine: Any = objective
    if num_ranks > 1:
        import deepspeed

        zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
        config = {
            "train_batch_size": 8,
            "zero_optimization": zero,
            "gradient_clipping": 0.0,  # DeepSpeed clips to 1 where nothing is said
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 1 << 30,
        }
        engine, optimizer, *_ = deepspeed.initialize(model=objective, optimizer=optimizer, config=config)
    result = []
    for step in range(STEPS):
        if case == "medim" and num_ranks > 1:
            look(objective, masking)
        whole = batch_for(masking, objective.encoder.grid, 8, 64, step)
        rows = slice(rank * 8 // num_ranks, (rank + 1) * 8 // num_ranks)
        part = type(whole)(
            step=step,
            image_ids=whole.image_ids[rows],
            views={"image": whole.views["image"][rows]},
            columns={key: value[rows] for key, value in whole.columns.items()},
        )
        loss = engine(part).loss
        if num_ranks > 1:
            engine.backward(loss)
            engine.step()
        else:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        result.append(loss.item())
    if case == "medim":
        Publisher(SnapshotStore(str(folder / f"published-{num_ranks}")), STEPS, objective, rank)(STEPS)
    return result


def look(objective: Any, masking: Any) -> None:
    """As before a step (probes/watch.py): submodules alone, without gradient; the steps after it must not feel it."""
    objective.eval()
    maps_BWN = ModelMaps(objective)(batch_for(masking, objective.encoder.grid, 3, 64), NO_TEXT)
    assert maps_BWN.isfinite().all() and maps_BWN.shape[0] == 3
    objective.train()


@pytest.mark.system
def test_losses_are_those_of_one_process(tmp_path: Path) -> None:
    root = Path(__file__).parents[3]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, __file__, str(tmp_path)], env=environment, cwd=root, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for case in CASES:
        ranks = [json.loads((tmp_path / f"{case}-{rank}.json").read_text()) for rank in (0, 1)]
        joined = [sum(pair) / 2 for pair in zip(*ranks, strict=True)]
        plain = losses(case, 0, 1, tmp_path)
        assert joined == pytest.approx(plain, rel=1e-4), case
        assert plain[-1] < plain[case == "input"], case
    sharded, whole = (SnapshotStore(str(tmp_path / f"published-{num}")).wait(STEPS) for num in (2, 1))
    assert sharded.keys() == whole.keys() and {name.partition(".")[0] for name in whole} >= {"encoder", "text"}
    for name, tensor in whole.items():
        torch.testing.assert_close(sharded[name], tensor, rtol=1e-3, atol=1e-5, msg=name)


def main(folder: str) -> None:
    """One of the two processes."""
    import deepspeed
    import torch.distributed as dist

    deepspeed.ops.__compatible_ops__ = {}  # as train/zero.py: else it compiles one, for minutes
    deepspeed.init_distributed("gloo")
    for case in CASES:
        values = losses(case, dist.get_rank(), dist.get_world_size(), Path(folder))
        Path(folder, f"{case}-{dist.get_rank()}.json").write_text(json.dumps(values))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
