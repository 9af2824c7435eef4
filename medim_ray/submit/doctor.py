"""`medim-ray doctor`: what this machine has, one line a check. It changes nothing but a file that it removes again."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = (
    "ray",
    "torch",
    "timm",
    "deepspeed",
    "transformers",
    "fsspec",
    "s3fs",
    "pyarrow",
    "pydicom",
    "omegaconf",
    "aim",
)
MIN_MEMORY_BYTES = 4 << 30
MIN_DISK_BYTES = 5 << 30


def check_machine() -> int:
    """Prints a line for each check; exit code 1 where one of them stops medim-ray from running."""
    checks: list[tuple[str, Callable[[], tuple[bool, str]]]] = [
        ("python", _python),
        ("packages", _packages),
        ("accelerators", _accelerators),
        ("ray", _ray),
        ("storage", _storage),
        ("memory", _memory),
    ]
    failed = False
    for name, check in checks:
        try:
            good, text = check()
        except Exception as error:  # a check that dies is a finding, not a crash of the doctor
            good, text = False, f"{type(error).__name__}: {error}"
        failed |= not good
        print(f"{'ok  ' if good else 'FAIL'} {name}: {text}")
    return 1 if failed else 0


def _python() -> tuple[bool, str]:
    supported = (3, 11) <= sys.version_info[:2] <= (3, 12)
    return supported, f"{platform.python_version()} at {sys.executable}" + ("" if supported else "; use 3.11 or 3.12")


def _packages() -> tuple[bool, str]:
    found, missing = [], []
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            missing.append(name)
    fix = f"; missing: {', '.join(missing)}, run `pip install -e .`" if missing else ""
    return not missing, ", ".join(found) + fix


def _accelerators() -> tuple[bool, str]:
    import torch

    if not torch.cuda.is_available():
        return True, f"none, {os.cpu_count()} CPU cores (train.use_gpu=false)"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return True, f"{len(names)} x {names[0]}, CUDA {torch.version.cuda}"


def _ray() -> tuple[bool, str]:
    import ray

    from medim_ray.session import ray_session

    address = os.environ.get("RAY_ADDRESS", "")
    with ray_session(num_cpus=1, object_store_memory=100 << 20):
        answer = ray.get(ray.remote(num_cpus=1)(lambda: 6 * 7).remote(), timeout=60)
        nodes = len(ray.nodes())
    where = f"cluster at {address}" if address else "started here"
    return answer == 42, f"{ray.__version__}, {where}, {nodes} node(s), a task ran"


def _storage() -> tuple[bool, str]:
    folder = Path.cwd()
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        file.write(b"medim-ray")
        file.flush()
        same = Path(file.name).read_bytes() == b"medim-ray"
    free = min(shutil.disk_usage(folder).free, shutil.disk_usage(tempfile.gettempdir()).free)
    return same and free > MIN_DISK_BYTES, f"{folder} is writable, {free / 2**30:.0f} GiB free" + (
        ""
        if free > MIN_DISK_BYTES
        else f"; at least {MIN_DISK_BYTES >> 30} GiB are needed there and in the temp folder"
    )


def _memory() -> tuple[bool, str]:
    import psutil

    memory = psutil.virtual_memory()
    good = memory.available > MIN_MEMORY_BYTES
    fix = "" if good else f"; at least {MIN_MEMORY_BYTES >> 30} GiB are needed"
    return good, f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB available{fix}"
