"""Jobs on this machine, on Ray, Slurm and Kubernetes. One import line makes a target known."""

from medim_ray.submit import kuberay, local, ray_jobs, slurm

__all__ = ["kuberay", "local", "ray_jobs", "slurm"]
