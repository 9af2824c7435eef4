"""Shards that the system tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from medim_ray.data.ingest import PrepareConfig, prepare
from medim_ray.data.sources import SOURCES


@pytest.fixture(scope="session")
def phantom_shards(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> str:
    """96 phantoms with reports, in row groups of 8."""
    from medim_ray.data.ingest import ShardConfig

    out = str(tmp_path_factory.mktemp("shards") / "phantom")
    source = SOURCES["phantom"].Config(num_images=96, size=128)
    prepare(PrepareConfig(source=source, out=out, shards=ShardConfig(rows_per_file=32, row_group_rows=8)))
    return str(Path(out))
