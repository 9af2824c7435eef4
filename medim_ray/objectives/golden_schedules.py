"""DINOv2's cosine schedules against tables from the paper's own code: schedules.npz (PAPERS.md, golden notes).

The command line and the printed table are in check_golden.py; the schedules themselves in medim_ray/schedules.py.
"""

from __future__ import annotations

from medim_ray.objectives.comparison import Arrays, Comparison
from medim_ray.schedules import cosine, tabulate

NUM_STEPS = 200
CURVES = {
    "cosine_0": cosine(0.004, 1e-6, NUM_STEPS, warmup_steps=20),
    "cosine_1": cosine(0.04, 0.4, NUM_STEPS),
    "cosine_2": cosine(0.992, 1.0, NUM_STEPS),
    "cosine_3": cosine(0.002, 1e-6, NUM_STEPS, warmup_steps=20, frozen_steps=10),
}


def compare_schedules(arrays: Arrays) -> list[Comparison]:
    """Each value of each curve, [NUM_STEPS], to 1e-9 of itself; none is above 1, so to 1e-9 in absolute terms too."""
    return [
        Comparison(name, name, arrays[name], tabulate(schedule, NUM_STEPS), 1e-9) for name, schedule in CURVES.items()
    ]
