"""Pretraining objectives, registered by name in OBJECTIVES."""

from medim_ray.objectives import mae as mae
from medim_ray.objectives import medim as medim
from medim_ray.objectives import rad_dino as rad_dino
from medim_ray.objectives.base import OBJECTIVES as OBJECTIVES
