"""The command line: exit codes, and messages that tell the option, the value and the fix. Nothing here starts Ray."""

from __future__ import annotations

from pathlib import Path

import pytest

from medim_ray.cli import main
from medim_ray.config.loader import parse_yaml
from tests.unit.data.test_shards import write_set

ROOT = Path(__file__).parents[2]
RECIPE = str(ROOT / "configs/debug/medim-vit_tiny-2w-z1.yaml")


def test_config_prints_the_resolved_tree_and_its_hash(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--config", RECIPE, "train.steps=7"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("# run_hash ") and parse_yaml(out)["train"]["steps"] == 7


def test_fields_of_pretrain_and_of_prepare(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--fields"]) == 0
    assert "train.steps: int = 100" in capsys.readouterr().out
    assert main(["config", "--config", str(ROOT / "configs/sources/csv.yaml"), "--fields"]) == 0
    assert "source.report_column" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["pretrain", "--config", RECIPE, "train.step=3"], 2, "unknown key 'train.step'. Did you mean 'train.steps'"),
        (["pretrain", "--config", RECIPE, "data.shards=x"], 2, "run.dir is empty"),
        (["pretrain", "--config", RECIPE, "run.dir={tmp}/r"], 2, "data.shards is empty"),
        (["pretrain", "--config", RECIPE, "run.dir={tmp}/r", "data.shards={tmp}"], 2, "not a finished shard set"),
        (["pretrain", "--config", "none.yaml"], 2, "does not exist"),
        (["prepare", "--config", str(ROOT / "configs/sources/csv.yaml")], 2, "out is not set"),
        (["probe"], 2, "run has no default: give it as run=VALUE"),
        (["probe", "run={tmp}"], 2, "is not a run folder"),
        (["export", "run={tmp}", "out={tmp}/e"], 2, "is not a run folder"),
        (["tag", "{tmp}/none.csv", "--out", "{tmp}/tags.csv"], None, "none.csv"),
        (["shards", "verify", "{tmp}"], 1, "not a finished shard set"),
    ],
)
def test_what_is_refused_and_how(
    argv: list[str], code: int | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = main([part.replace("{tmp}", str(tmp_path)) for part in argv])
    said = capsys.readouterr()
    assert result == code or (code is None and result in (1, 2))
    assert message in said.err + said.out
    assert not list(tmp_path.iterdir()), "something was left behind"


def test_an_image_size_that_the_patch_does_not_divide_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = write_set(tmp_path / "shards")
    options = ["train.global_batch=2", "train.num_workers=1", "encoder.image_size=110", f"run.dir={tmp_path}/run"]
    assert main(["pretrain", "--config", RECIPE, f"data.shards={shards}", *options]) == 2
    assert "encoder.image_size=110: must be a multiple of the patch size 16" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
