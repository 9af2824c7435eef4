"""One Ray for the whole test session; started by the first test that asks for it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import hypothesis
import pytest

# Two cores may be shared: one thread a process, no progress bars. Set before NumPy and Ray are imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")

# CI judges a change, so its examples are a function of the test; elsewhere every run looks at new ones.
hypothesis.settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    hypothesis.settings.load_profile("ci")


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A local Ray with 3 logical CPUs and a small object store."""
    import ray

    ray.init(
        address="local",
        num_cpus=3,
        object_store_memory=150 * 2**20,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="WARNING",
    )
    yield
    ray.shutdown()
