"""Masking strategies, registered by name in MASKINGS."""

from medim_ray.masking import anatomy as anatomy
from medim_ray.masking import block as block
from medim_ray.masking import dino_report as dino_report
from medim_ray.masking import mixture as mixture
from medim_ray.masking import report as report
from medim_ray.masking import uniform as uniform
from medim_ray.masking.base import MASKINGS as MASKINGS
