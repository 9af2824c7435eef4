"""The loader: layers, overrides, types, errors that help, hashes, and a round trip through YAML."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from medim_ray.config.loader import (
    component,
    describe,
    from_tree,
    leaves,
    load,
    option,
    parse_yaml,
    run_hash,
    to_tree,
    to_yaml,
)
from medim_ray.registry import Registry

PAINTS: Registry[Any] = Registry("paint")


@PAINTS.register("oil")
class Oil:
    @dataclass(frozen=True, kw_only=True)
    class Config:
        name: str = "oil"
        layers: int = 3


@PAINTS.register("water")
class Water:
    @dataclass(frozen=True, kw_only=True)
    class Config:
        name: str = "water"
        drops: float = 0.5

        def __post_init__(self) -> None:
            if self.drops < 0:
                raise ValueError(f"drops={self.drops}: must be at least 0")


@dataclass(frozen=True, kw_only=True)
class Frame:
    size: tuple[int, int] = (2, 3)
    dir: str = option("", "place", hashed=False, fixed=False)


@dataclass(frozen=True, kw_only=True)
class Root:
    seed: int = 0
    ratio: float = 0.5
    names: tuple[str, ...] = ()
    limit: int | None = None
    paint: Any = component(PAINTS, "oil", "what it is painted with")
    frame: Frame = field(default_factory=Frame)


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_file_over_parent_and_overrides_over_file(tmp_path: Path) -> None:
    write(tmp_path / "parent.yaml", "seed: 1\nratio: 0.1\nframe: {size: [4, 5]}\n")
    child = write(tmp_path / "child.yaml", "inherits: parent.yaml\nratio: 0.2\n")
    config = load(Root, child, ["names=[a,b]", "limit=3"])
    assert (config.seed, config.ratio, config.frame.size) == (1, 0.2, (4, 5))
    assert config.names == ("a", "b") and config.limit == 3


def test_switching_a_component_drops_the_keys_of_the_old_one(tmp_path: Path) -> None:
    file = write(tmp_path / "c.yaml", "paint: {name: oil, layers: 9}\n")
    assert load(Root, file).paint == Oil.Config(layers=9)
    assert load(Root, file, ["paint.name=water"]).paint == Water.Config()
    assert load(Root, file, ["paint=water", "paint.drops=1"]).paint == Water.Config(drops=1.0)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rati=1", "unknown key 'rati'. Did you mean 'ratio'"),
        ("frame.sise=1", "unknown key 'frame.sise'. Did you mean 'frame.size'"),
        ("paint.drops=1", "unknown key 'paint.drops'"),
        ("paint.name=oyl", "unknown paint 'oyl'. Did you mean 'oil'"),
        ("seed=many", "seed='many' is not of type int"),
        ("seed=1.5", "seed=1.5 is not of type int"),
        ("seed=true", "seed=True is not of type int"),
        ("frame=3", "frame is a group of options"),
        ("frame.size=[1]", r"frame.size=\[1\] is not of type"),
        ("seed", "not of the form key.sub=value"),
    ],
)
def test_errors_name_the_key_and_the_nearest(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(Root, None, [override])


def test_a_check_of_a_component_runs_and_names_its_group() -> None:
    with pytest.raises(ValueError, match=r"paint: drops=-1\.0: must be at least 0"):
        load(Root, None, ["paint.name=water", "paint.drops=-1"])


def test_scalars_are_those_of_yaml_1_2() -> None:
    assert load(Root, None, ["ratio=1e-4"]).ratio == 1e-4
    assert parse_yaml("{on: input, a: 1, b: 1., c: 2e3, d: true, e: no, f: -3, g: null}") == {
        "on": "input",
        "a": 1,
        "b": 1.0,
        "c": 2000.0,
        "d": True,
        "e": "no",
        "f": -3,
        "g": None,
    }
    assert [parse_yaml(text) for text in ("007", "1_000", "1:30", "2026-11-22")] == [
        "007",
        "1_000",
        "1:30",
        "2026-11-22",
    ]
    assert isinstance(parse_yaml("12"), int)


def test_circular_parents_and_missing_files_are_errors(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", "inherits: b.yaml\n")
    write(tmp_path / "b.yaml", "inherits: a.yaml\n")
    with pytest.raises(ValueError, match="circle"):
        load(Root, tmp_path / "a.yaml")
    with pytest.raises(ValueError, match="does not exist"):
        load(Root, tmp_path / "none.yaml")
    with pytest.raises(ValueError, match="not valid YAML"):
        load(Root, write(tmp_path / "c.yaml", "a: [1"))


def test_yaml_reloads_to_an_equal_object() -> None:
    config = load(Root, None, ["paint.name=water", "names=[x]", "frame.size=[7,8]"])
    assert from_tree(Root, parse_yaml(to_yaml(config))) == config


def test_secrets_are_hidden_where_asked() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Vault:
        salt: str = field(default="", metadata={"secret": True})

    assert parse_yaml(to_yaml(Vault(salt="pepper"), hide_secrets=True)) == {"salt": "***"}
    assert parse_yaml(to_yaml(Vault(salt="pepper"))) == {"salt": "pepper"}


def test_hash_ignores_where_and_follows_what() -> None:
    config = Root()
    moved = dataclasses.replace(config, frame=Frame(dir="elsewhere"))
    assert run_hash(moved) == run_hash(config)
    assert run_hash(dataclasses.replace(config, seed=1)) != run_hash(config)
    assert run_hash(load(Root, None, ["paint.name=water"])) != run_hash(config)
    assert {key for key, _, _ in leaves(config)} >= {"frame.dir", "paint.layers", "seed"}


def test_interpolations_are_resolved(tmp_path: Path) -> None:
    assert load(Root, write(tmp_path / "i.yaml", "seed: 5\nlimit: ${seed}\n")).limit == 5


def test_describe_lists_the_options_of_every_component() -> None:
    keys = [key for key, *_ in describe(Root)]
    assert "paint.layers [oil]" in keys and "paint.drops [water]" in keys and "frame.size" in keys
    assert to_tree(Root())["frame"]["size"] == [2, 3]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("inherits: [a.yaml, b.yaml]\n", r"inherits=\['a.yaml', 'b.yaml'\]: one parent"),
        ("seed: 1\nsize: 2\nseed: 3\n", "key 'seed' stands twice"),
    ],
)
def test_files_that_can_be_read_in_two_ways_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        load(Root, tmp_path / "recipe.yaml")
    with pytest.raises(ValueError, match="is a folder"):
        load(Root, tmp_path)
