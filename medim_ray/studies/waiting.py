"""Why a run waits for its data: the stage of the stream that limits it and what to change, from metrics.jsonl alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from medim_ray.config.schema import RunConfig
from medim_ray.train.feed import STREAM_SECONDS

MAX_WAIT = 0.05  # share of a step; below it nothing is said
_WARM_UP = 2  # steps of each start that fill the stream
_IDLE = 0.7  # share of their time that actors work, below which they are not what limits
_STARVED = 0.7  # share of a core that a working actor gets, below which there are too few cores
_FIXES = {
    "read": "the storage is slow: copy the shards nearer, write larger row groups (shards.row_group_bytes), or read in "
    "parallel with",
    "decode": "decode in parallel with",
    "crop": "cut in parallel with",
    "text": "the first pass over the reports tokenises and tags them; if it stays like this, work in parallel with",
    "plan": "plan masks and crops in parallel with",
}


def why_it_waits(records: Sequence[Mapping[str, Any]], config: RunConfig) -> str:
    """One paragraph, or "" where steps wait for less than MAX_WAIT of their time or too few are recorded.

    The seconds of the stages are of the samples that a step was made of, over all actors.
    """
    known = [record for record in records[_WARM_UP:] if all(name in record for name in STREAM_SECONDS)]
    if not known:
        return ""
    wait = statistics.median(record["data_wait_ratio"] for record in known)
    if wait <= MAX_WAIT:
        return ""
    step_s = statistics.fmean(record["step_s"] for record in known)
    seconds = {
        name.removeprefix("stream_").removesuffix("_s"): statistics.fmean(record[name] for record in known)
        for name in STREAM_SECONDS
    }
    cpu_s = seconds.pop("cpu")
    busy_s, actors = sum(seconds.values()), config.data.num_actors
    told = f"Steps wait {wait:.0%} of their time for data. "
    occupied = busy_s / (actors * step_s)
    if occupied < _IDLE:
        return told + (
            f"What limits is the transfer: the {actors} decoding actors work {occupied:.0%} of the time, their blocks "
            f"wait on the way to the workers. Use smaller blocks (data.window_steps below {config.data.window_steps}) "
            f"or fetch more ahead (data.prefetch_blocks above {config.data.prefetch_blocks})."
        )
    working = cpu_s / max(busy_s - seconds["read"], 1e-9)
    if working < _STARVED:
        return told + (
            f"What limits are the cores: a decoding actor at work gets {min(working, 1):.0%} of one. Add CPUs to the "
            "nodes, or run less beside the training; more actors would not help."
        )
    stage = max(seconds, key=lambda name: seconds[name])
    need = max(actors + 1, math.ceil(busy_s / (step_s * (1 - wait)) / 0.9)) if wait < 1 else 2 * actors
    return told + (
        f"What limits is the stage {stage}: {seconds[stage] / busy_s:.0%} of the {busy_s:.2f} s that the actors spend "
        f"on a step, which the model needs every {step_s * (1 - wait):.2f} s. {_FIXES[stage].capitalize()} "
        f"data.num_actors={need} (now {actors}), as far as there are CPUs."
    )
