"""The planned work of whole objectives against what torch counts while the real ones run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from medim_ray.config.loader import load
from medim_ray.config.schema import RunConfig
from medim_ray.plan.clusters import resolve
from medim_ray.plan.workload import Workload, workload
from tests.unit.objectives.batches import TOKENS, batch_for, build
from tests.unit.plan.layouts import GPUS

NUM = 8
ENCODER = {"image_size": 64, "width": 48, "depth": 3, "num_heads": 3}
CASES = [
    ("mae", {"name": "uniform", "ratio": 0.75}, {}),
    ("simmim", {"name": "uniform", "ratio": 0.5}, {}),
    ("medim", {"name": "kdm+sdm"}, {"num_prototypes": 10, "projection_hidden": 64}),
    ("medim", {"name": "uniform", "ratio": 0.5, "on": "input"}, {"projection_hidden": 64, "local_weight": 0.0}),
]


def planned(objective: str, masking: dict[str, Any], options: dict[str, Any]) -> Workload:
    overrides = [f"objective.name={objective}", f"text.num_tokens={TOKENS}", "text.width=32"]
    for group, values in (("encoder", ENCODER), ("masking", masking), ("objective", options)):
        overrides += [f"{group}.{key}={value}" for key, value in values.items()]
    return workload(load(RunConfig, None, overrides), resolve(GPUS).code)


@pytest.mark.parametrize(("objective", "masking", "options"), CASES)
def test_operations_are_those_of_the_real_step(
    objective: str, masking: dict[str, Any], options: dict[str, Any]
) -> None:
    module = build(objective, masking, ENCODER, **options)
    batch = batch_for(module._masking, module.encoder.grid, NUM, 64)
    with FlopCounterMode(display=False) as forward:
        loss = module(batch).loss
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    work = planned(objective, masking, options)
    assert work.forward_flops * NUM == pytest.approx(forward.get_total_flops(), rel=0.05)
    counted = forward.get_total_flops() + backward.get_total_flops()
    assert work.flops(False) * NUM == pytest.approx(counted, rel=0.05)


@pytest.mark.parametrize(("objective", "masking", "options"), CASES)
def test_kept_activations_are_those_of_the_real_step(
    objective: str, masking: dict[str, Any], options: dict[str, Any]
) -> None:
    module = build(objective, masking, ENCODER, **options)
    batch = batch_for(module._masking, module.encoder.grid, NUM, 64)
    known = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    sizes: dict[int, int] = {}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(batch)
    work = planned(objective, masking, options)
    assert work.kept_bytes(False) * NUM == pytest.approx(sum(sizes.values()), rel=0.15)


def test_a_pretrained_report_encoder_is_planned_without_its_files() -> None:
    config = load(RunConfig, None, ["objective.name=medim", "text.name=hf", "text.path=no/such/model"])
    work = workload(config, resolve(GPUS).code)
    # BERT-base without pooler: 108.3 M with 28,996 tokens and 112 positions, and a ViT-Tiny with its heads.
    assert 110e6 < work.num_trained < 125e6


def test_frozen_reports_have_no_backward_pass() -> None:
    overrides = ["objective.name=medim", "masking.name=kdm"]
    trained = workload(load(RunConfig, None, overrides), resolve(GPUS).code)
    frozen = workload(load(RunConfig, None, [*overrides, "text.trainable=false"]), resolve(GPUS).code)
    by_name = {p.name: p for p in frozen.passes}
    assert by_name["report encoder"].backward_flops == 0
    assert frozen.num_frozen > 0 == trained.num_frozen
    assert frozen.flops(False) < trained.flops(False)
