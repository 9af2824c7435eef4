"""fp16's dynamic loss scale as a part of the training state, and what an engine tells of a step beside loss and norm.

DeepSpeed keeps the scale in three places, by ZeRO stage and precision; nothing is scaled here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def scaler_state(engine: Any) -> dict[str, Any]:
    """The state of the dynamic loss scale; empty where the precision has none."""
    if engine.torch_autocast_z0_gradscaler is not None:
        return dict(engine.torch_autocast_z0_gradscaler.state_dict())
    if engine.fp16_enabled():
        return {name: getattr(engine.optimizer.loss_scaler, name) for name in _SCALER_STATE}
    return {}


def restore_scaler(engine: Any, state: Mapping[str, Any]) -> None:
    """Takes over what `scaler_state` told, at the same ZeRO stage; at another kind of stage only the scale itself."""
    if engine.torch_autocast_z0_gradscaler is not None:
        scaler = engine.torch_autocast_z0_gradscaler
        known = {"scale": state.get("scale", state.get("cur_scale")), "_growth_tracker": 0}
        scaler.load_state_dict({**scaler.state_dict(), **known, **{k: v for k, v in state.items() if k in known}})
    elif engine.fp16_enabled():
        scaler = engine.optimizer.loss_scaler
        scaler.cur_scale = state.get("cur_scale", state.get("scale"))
        for name in _SCALER_STATE:
            setattr(scaler, name, state.get(name, getattr(scaler, name)))


def engine_numbers(engine: Any) -> dict[str, float]:
    """For metrics.jsonl: gradient norms of parts (clipping.py) and the loss scale, where there are any."""
    numbers = {f"grad_norm/{part}": norm for part, norm in engine.clipping.norms.items()}
    state = scaler_state(engine)
    return numbers | ({"loss_scale": float(state.get("cur_scale") or state["scale"])} if state else {})
