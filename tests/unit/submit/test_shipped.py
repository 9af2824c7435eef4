"""What cluster/ ships beside manifests: launcher files by Ray's own schema, the Dockerfile by hadolint, scripts."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import jsonschema
import pytest
import yaml

from medim_ray.submit.manifests import USER_ID, WORKING_DIR

CLUSTER = Path(__file__).parents[3] / "cluster"
LAUNCHERS = sorted((CLUSTER / "ray-launcher").glob("*.yaml"))
BIN = Path(sys.executable).parent


@pytest.mark.parametrize("file", LAUNCHERS, ids=lambda f: f.stem)
def test_launcher_files_are_valid_private_and_authenticated(file: Path) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load(file.read_text())
    prepared = prepare_config(config)  # as `ray up` does
    validate_config(prepared)
    for kind in ("head", "worker"):
        (start,) = (line for line in prepared[f"{kind}_start_ray_commands"] if "ray start" in line)
        assert "RAY_AUTH_MODE=token" in start and "0.0.0.0" not in start
    assert "--num-cpus=0" in config["head_start_ray_commands"][1], "the head runs no work"
    assert "/home/medim/.ray/auth_token" in config["file_mounts"]
    with pytest.raises(jsonschema.ValidationError, match="'max_worker' was unexpected"):
        validate_config({**prepared, "max_worker": 3})


def test_the_three_kinds_are_there() -> None:
    assert [file.stem for file in LAUNCHERS] == ["aws", "gcp", "local"]


def test_the_dockerfile_passes_hadolint_and_drops_root() -> None:
    file = CLUSTER / "docker/Dockerfile"
    done = subprocess.run([BIN / "hadolint", "--no-color", file], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    lines = file.read_text().splitlines()
    users = [line for line in lines if line.startswith("USER")]
    assert users == [f"USER {USER_ID}:{USER_ID}"] and f"WORKDIR {WORKING_DIR}" in lines
    assert sum(line.startswith("FROM") for line in lines) == 2, "the compiler stays behind"


def test_the_constraints_pin_every_dependency_that_runs() -> None:
    pinned = {
        line.partition("==")[0].lower().replace("_", "-")
        for line in (CLUSTER / "docker/constraints.txt").read_text().splitlines()
        if "==" in line
    }
    needed = {
        name.split(";")[0].split("[")[0].split(">")[0].split("<")[0].strip().lower().replace("_", "-")
        for name in requires("medim-ray") or []
        if "extra ==" not in name
    }
    assert needed and needed <= pinned, f"pin {sorted(needed - pinned)}"


def test_scripts_pass_shellcheck() -> None:
    scripts = [CLUSTER / "slurm/two-nodes"]
    done = subprocess.run([BIN / "shellcheck", "--exclude=SC2016", *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
