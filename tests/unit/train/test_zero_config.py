"""The DeepSpeed configuration of a run, whole, for each option of the engine; what a device cannot do is refused."""

from __future__ import annotations

from typing import Any

import pytest

from medim_ray.config.loader import load
from medim_ray.config.schema import RunConfig, TrainConfig
from medim_ray.train.checks import _check_compiler
from medim_ray.train.zero import zero_config

GOLDEN: dict[str, Any] = {
    "train_batch_size": 16,
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 4,
    "gradient_clipping": 1.0,
    "bf16": {"enabled": False},
    "fp16": {"enabled": False, "loss_scale": 0, "initial_scale_power": 16},
    "torch_autocast": {"enabled": False, "dtype": "bfloat16"},
    "zero_optimization": {"stage": 0, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "steps_per_print": 1 << 30,
    "wall_clock_breakdown": False,
}


def made(**options: Any) -> dict[str, Any]:
    return zero_config(TrainConfig(num_workers=2, global_batch=16, micro_batch=2, **options))


def stage(number: int, **more: Any) -> dict[str, Any]:
    return {"zero_optimization": {**GOLDEN["zero_optimization"], "stage": number, **more}}


@pytest.mark.parametrize(
    ("options", "differences"),
    [
        ({}, {}),
        *[({"zero": number}, stage(number)) for number in (1, 2, 3)],
        ({"clip_norm": 3.0, "clip_by": "part"}, {"gradient_clipping": 3.0}),
        ({"precision": "bf16"}, {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}),
        ({"precision": "bf16", "zero": 2}, {**stage(2), "bf16": {"enabled": True}}),
        (
            {"precision": "fp16", "use_gpu": True},
            {"torch_autocast": {"enabled": True, "dtype": "float16"}},
        ),
        (
            {"precision": "fp16", "use_gpu": True, "zero": 3},
            {**stage(3), "fp16": {"enabled": True, "loss_scale": 0, "initial_scale_power": 16}},
        ),
        (
            {"offload_optimizer": True, "use_gpu": True, "zero": 2},
            stage(2, offload_optimizer={"device": "cpu", "pin_memory": True}),
        ),
    ],
)
def test_the_configuration_is_a_function_of_the_options(options: dict[str, Any], differences: dict[str, Any]) -> None:
    expected = GOLDEN | differences
    if options.get("precision") == "fp16":
        expected["torch_autocast"] = {**expected["torch_autocast"], "dtype": "float16"}
    assert made(**options) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "fp16"}, r"precision=fp16 with use_gpu=false: DeepSpeed runs fp16 on GPUs only.*precision=bf16"),
        ({"offload_optimizer": True, "zero": 1}, r"offload_optimizer=true with use_gpu=false: the optimizer is in the"),
        ({"offload_optimizer": True, "use_gpu": True}, r"offload_optimizer=true with zero=0: .* use zero=1, 2, 3 or"),
        ({"compile": True, "zero": 3}, r"compile=true with zero=3: .* use zero=0, 1 or 2, or compile=false"),
    ],
)
def test_what_a_device_or_a_stage_cannot_do_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**options)


def test_auto_chooses_among_the_stages_that_the_options_leave() -> None:
    assert TrainConfig(zero="auto").possible_stages == (0, 1, 2, 3)
    assert TrainConfig(zero="auto", compile=True).possible_stages == (0, 1, 2)
    assert TrainConfig(zero="auto", offload_optimizer=True, use_gpu=True).possible_stages == (1, 2, 3)


def test_compiling_without_a_compiler_is_refused_before_ray_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ValueError, match=r"train.compile=true: .* needs a C\+\+ compiler.*use train.compile=false"):
        _check_compiler(load(RunConfig, None, ["train.compile=true"]))
    _check_compiler(load(RunConfig, None, ["train.compile=true", "run.ray_address=auto"]))
    _check_compiler(load(RunConfig, None, []))
