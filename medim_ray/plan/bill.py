"""Money, energy and CO2 of device hours. Whole nodes are billed and powered; power is the rated one, an upper bound."""

from __future__ import annotations

from dataclasses import dataclass

from medim_ray.plan.clusters import Cluster
from medim_ray.plan.constants import assumption


@dataclass(frozen=True, kw_only=True)
class Bill:
    """gpu_hours: billed ones. cost: US dollars. energy_kwh: at the wall of the building. co2_kg: of that energy."""

    gpu_hours: float
    cost: float
    energy_kwh: float
    co2_kg: float


def bill(cluster: Cluster, num_gpus: int, hours: float) -> Bill:
    """The bill of `num_gpus` devices for `hours`."""
    nodes = cluster.num_nodes_of(num_gpus)
    gpu_hours = nodes * cluster.config.gpus_per_node * hours
    # A CPU core's power already is its share of the socket; a GPU has a host beside it.
    host = 0.0 if cluster.gpu.is_cpu else assumption("host_watts_per_gpu")
    energy = gpu_hours * (cluster.gpu.watts + host) / 1000.0 * cluster.pue
    return Bill(
        gpu_hours=gpu_hours,
        cost=gpu_hours * cluster.price_per_gpu_hour,
        energy_kwh=energy,
        co2_kg=energy * cluster.grid,
    )
