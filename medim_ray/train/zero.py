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

if TYPE_CHECKING:
    from medim_ray.config.schema import TrainConfig
    from medim_ray.objectives.base import ParameterGroup

MOMENTS = ("exp_avg", "exp_avg_sq")


def zero_config(train: TrainConfig) -> dict[str, Any]:
    """The DeepSpeed configuration of a run; nothing in it depends on the machine."""
    bf16 = train.precision == "bf16"
    return {
        "train_batch_size": train.global_batch,
        "train_micro_batch_size_per_gpu": train.local_micro_batch,
        "gradient_accumulation_steps": train.accumulation,
        "gradient_clipping": train.clip_norm,
        # Parameters in bf16 with fp32 masters in the shards; stage 0 has no shards, so there autocast does it.
        "bf16": {"enabled": bf16 and train.stage > 0},
        "torch_autocast": {"enabled": bf16 and train.stage == 0, "dtype": "bfloat16"},
        "zero_optimization": {
            "stage": train.stage,
            # No parameter keeps a full copy beside its shard: the shard is the only truth, also for small models.
            "stage3_param_persistence_threshold": 0,
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1 << 30,
        "wall_clock_breakdown": False,
    }


def build_engine(module: nn.Module, train: TrainConfig) -> Any:
    """`module` in a DeepSpeed engine with torch's AdamW; its groups carry lr_ratio, decay_ratio and frozen_steps.

    The process group must exist (Ray Train makes it). The moments start at zero at every stage.
    """
    import deepspeed  # takes seconds, and only workers need it

    if not train.use_gpu:
        # DeepSpeed's CPU backend probes every op that it could compile and, for minutes at the first start of each
        # environment, compiles one that only inference calls. Told that it has none, it does neither.
        deepspeed.ops.__compatible_ops__ = {}
    groups: list[ParameterGroup] = module.parameter_groups()  # type: ignore[operator]
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
    )
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=zero_config(train))
    if train.stage == 0:
        _tell_norm(engine, optimizer, train.clip_norm)
    for flat in _flat_tensors(engine):
        engine_state = _torch_optimizer(engine).state[flat]
        engine_state["step"] = torch.zeros((), dtype=torch.float32)
        for kind in MOMENTS:
            engine_state[kind] = torch.zeros_like(flat, memory_format=torch.preserve_format)
    return engine


def _tell_norm(engine: Any, optimizer: torch.optim.Optimizer, clip_norm: float) -> None:
    """Makes the engine tell its gradient norm at stage 0, as it does at the others: DeepSpeed clips there and forgets
    the norm. The numbers of the clipping itself are DeepSpeed's."""
    from deepspeed.runtime.utils import clip_grad_norm_

    def measured(*_: Any) -> None:
        norm = clip_grad_norm_(list(engine.module.parameters()), max_norm=clip_norm or torch.inf, mpu=engine.mpu)
        optimizer._global_grad_norm = norm  # type: ignore[attr-defined]  # where the engine looks for it

    if clip_norm:
        engine.clip_fp32_gradients = measured
    else:
        optimizer.register_step_pre_hook(measured)


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
