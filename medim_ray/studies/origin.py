"""Where a table or page comes from: the commit of the package and the machine that wrote it."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import medim_ray


def package_commit() -> str:
    """The commit of the package that writes, where it lies in a git work tree; '' elsewhere."""
    folder = Path(medim_ray.__file__).parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found.stdout.strip() if found.returncode == 0 else ""


def this_machine() -> str:
    """Processor, cores and memory of the machine that writes."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{platform.machine()} with {os.cpu_count()} cores and {memory:.0f} GiB, Python {platform.python_version()}"
