"""DeepSpeed behind two questions: which configuration, and where each tensor of the training state lies on this rank.

`zero_config` is a pure function. `fragments` gives live, flat views of parameters and optimizer moments by name at
every ZeRO stage, so that a checkpoint knows neither stage nor world size (checkpoint.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from medim_ray.models.blocks import checkpoint_activations, compile_blocks
from medim_ray.objectives.base import ParameterGroup, split_by_part
from medim_ray.train.averaging import GradientAverage
from medim_ray.train.clipping import Clipping

if TYPE_CHECKING:
    from medim_ray.config.schema import TrainConfig

MOMENTS = ("exp_avg", "exp_avg_sq")


def zero_config(train: TrainConfig) -> dict[str, Any]:
    """The DeepSpeed configuration of a run; nothing in it depends on the machine."""
    half = train.precision if train.precision != "fp32" else None
    zero: dict[str, Any] = {
        "stage": train.stage,
        # No parameter keeps a full copy beside its shard: the shard is the only truth, also for small models.
        "stage3_param_persistence_threshold": 0,
    }
    if train.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    return {
        "train_batch_size": train.global_batch,
        "train_micro_batch_size_per_gpu": train.local_micro_batch,
        "gradient_accumulation_steps": train.accumulation,
        "gradient_clipping": train.clip_norm,
        # Parameters in half precision with fp32 masters in the shards; stage 0 has no shards: there autocast does it.
        "bf16": {"enabled": half == "bf16" and train.stage > 0},
        "fp16": {"enabled": half == "fp16" and train.stage > 0, "loss_scale": 0, "initial_scale_power": 16},
        "torch_autocast": {
            "enabled": half is not None and train.stage == 0,
            "dtype": "float16" if half == "fp16" else "bfloat16",
        },
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # torch's AdamW steps offloaded shards too; DeepSpeed's own would be compiled for minutes at the first start.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 30,
        "wall_clock_breakdown": False,
    }


def build_engine(module: nn.Module, train: TrainConfig) -> Any:
    """`module` in a DeepSpeed engine with torch's AdamW; its groups carry lr_ratio, decay_ratio and frozen_steps.

    The process group must exist (Ray Train makes it). The moments start at zero at every stage. `engine.clipping` tells
    the norms of parts (clipping.py).
    """
    import deepspeed  # takes seconds, and only workers need it

    if not train.use_gpu:
        # DeepSpeed's CPU backend probes every op that it could compile and, for minutes at the first start of each
        # environment, compiles one that only inference calls. Told that it has none, it does neither.
        deepspeed.ops.__compatible_ops__ = {}
    if train.activation_checkpointing:
        checkpoint_activations(module)
    if train.compile:
        compile_blocks(module)
    groups: list[ParameterGroup] = module.parameter_groups()  # type: ignore[operator]
    parts: list[str] | None = None
    if train.clip_by == "part":
        split = split_by_part(module, groups)
        parts, groups = [part for part, _ in split], [group for _, group in split]
    optimizer = torch.optim.AdamW(
        [
            {
                "params": list(group.parameters),
                "lr_ratio": group.lr_ratio,
                "decay_ratio": group.decay_ratio,
                "frozen_steps": group.frozen_steps,
            }
            for group in groups
        ],
        lr=train.lr,
        betas=train.betas,
        weight_decay=train.weight_decay,
        fused=True,  # one pass over the parameters, on CPUs and GPUs: a third of the time on a CPU, no temporaries
    )
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=zero_config(train))
    if train.stage == 0 and dist.get_world_size() == 1:
        # DeepSpeed would copy all gradients into a buffer and back for a sum over one rank: 5 % of a ViT-Small's step.
        engine.enable_backward_allreduce = False
    elif train.stage == 0:
        GradientAverage(engine)
    engine.clipping = Clipping(engine, train.clip_norm, parts)
    for flat in _flat_tensors(engine):
        engine_state = _torch_optimizer(engine).state[flat]
        engine_state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
        for kind in MOMENTS:
            engine_state[kind] = torch.zeros_like(flat, memory_format=torch.preserve_format)
    return engine


@dataclass(frozen=True)
class Fragment:
    """The part of one named tensor that this rank owns.

    tensors: kind -> flat live view of `numel` elements, from element `start` of the flattened full tensor on; kinds
    are "param", the moments of AdamW for trainable parameters, and "buffer".
    """

    name: str
    start: int
    shape: tuple[int, ...]
    tensors: dict[str, Tensor]

    @property
    def numel(self) -> int:
        return next(iter(self.tensors.values())).numel()


def fragments(engine: Any, own: bool) -> Iterator[Fragment]:
    """Fragments of this rank: all that it holds, or with `own` only those that it has to save (replicas: rank 0)."""
    first = not own or dist.get_rank() == 0
    for name, parameter in engine.module.named_parameters():
        if hasattr(parameter, "ds_id"):
            yield from _stage3(engine, name, parameter)
        elif not parameter.requires_grad:
            if first:
                yield Fragment(name, 0, tuple(parameter.shape), {"param": parameter.data.view(-1)})
        elif hasattr(parameter, "_hp_mapping"):
            if parameter._hp_mapping is not None:
                yield _partitioned(engine, name, parameter)
        elif first:
            moments = _torch_optimizer(engine).state[parameter]
            views = {kind: moments[kind].view(-1) for kind in MOMENTS}
            yield Fragment(name, 0, tuple(parameter.shape), {"param": parameter.data.view(-1), **views})
    if first:
        for name, buffer in persistent_buffers(engine.module):
            yield Fragment(name, 0, tuple(buffer.shape), {"buffer": buffer.view(-1)})


def persistent_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The buffers that are part of the module's state dict, by name; the others are constants."""
    for prefix, owner in module.named_modules():
        for name, buffer in owner.named_buffers(recurse=False):
            if name not in owner._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, buffer


def _partitioned(engine: Any, name: str, parameter: Any) -> Fragment:
    """ZeRO 1 and 2 (and the bf16 optimizer of stage 0): a piece of the flat fp32 partition of the parameter's group."""
    mapping = parameter._hp_mapping
    address = mapping.get_hp_fragment_address()
    moments = _torch_optimizer(engine).state[_flat_tensors(engine)[mapping.param_group_index]]
    views = {kind: moments[kind].narrow(0, address.start, address.numel) for kind in MOMENTS}
    tensors = {"param": mapping.get_hp_fragment(), **views}
    return Fragment(name, mapping.lp_fragment_address.start, tuple(parameter.shape), tensors)


def _stage3(engine: Any, name: str, parameter: Any) -> Iterator[Fragment]:
    """ZeRO 3: the rank's equal share of the flattened parameter; the last share is padded."""
    share = parameter.ds_tensor.ds_numel
    start = dist.get_rank() * share
    numel = min(share, parameter.ds_numel - start)
    if numel <= 0:
        return
    if parameter.requires_grad:
        optimizer = engine.optimizer
        group, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
        flat = optimizer.fp32_partitioned_groups_flat[group]
        moments = optimizer.optimizer.state[flat]
        tensors = {"param": flat.narrow(0, offset, numel)}
        tensors |= {kind: moments[kind].narrow(0, offset, numel) for kind in MOMENTS}
    else:
        tensors = {"param": parameter.ds_tensor.data.view(-1)[:numel]}
    yield Fragment(name, start, tuple(parameter.ds_shape), tensors)


def _torch_optimizer(engine: Any) -> torch.optim.Optimizer:
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def _flat_tensors(engine: Any) -> list[Tensor]:
    """The tensors that torch's AdamW steps: flat fp32 partitions under ZeRO, the parameters themselves without."""
    for attribute in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if hasattr(engine.optimizer, attribute):
            return list(getattr(engine.optimizer, attribute))
    return [p for group in engine.optimizer.param_groups for p in group["params"]]


def optimizer_step(engine: Any) -> float:
    """AdamW's step count, the same for every tensor."""
    return float(_torch_optimizer(engine).state[_flat_tensors(engine)[0]]["step"])


def adopt(engine: Any, step: float) -> None:
    """After the fragments were written to: AdamW's step count, and the working copies of the fp32 shards."""
    for flat in _flat_tensors(engine):
        _torch_optimizer(engine).state[flat]["step"].fill_(step)
    if hasattr(engine.optimizer, "update_lp_params"):
        engine.optimizer.update_lp_params()
    for fragment_parameter in engine.module.parameters():
        if hasattr(fragment_parameter, "ds_id") and fragment_parameter.requires_grad:
            optimizer = engine.optimizer
            group, offset, num = optimizer.grad_position[optimizer.get_param_id(fragment_parameter)]
            shard = optimizer.fp32_partitioned_groups_flat[group].narrow(0, offset, num)
            fragment_parameter.ds_tensor.data.copy_(shard.view_as(fragment_parameter.ds_tensor))
