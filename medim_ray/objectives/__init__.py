"""Pretraining objectives, registered by name in OBJECTIVES."""

from medim_ray.objectives.base import OBJECTIVES as OBJECTIVES
