"""The shape of the package: dependencies flow one way, the loop stays short, recipes and README are true."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from medim_ray.cli import _parser
from medim_ray.config.loader import from_tree, load, parse_yaml, read_tree, to_yaml
from medim_ray.config.schema import RunConfig
from medim_ray.data.ingest import PrepareConfig
from medim_ray.objectives import OBJECTIVES
from medim_ray.studies.ablate import StudyConfig
from medim_ray.studies.sweep import SweepConfig

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "medim_ray"
# Lower layers first; a module imports from its own layer and from those below. config.loader is a leaf that owners of a
# Config may use; `plan` (cost model) reads configurations only.
LAYERS = [
    {"registry", "types", "draws", "schedules", "session", "__init__"},
    {"reports"},
    {"masking", "models"},
    {"data", "objectives"},
    {"config"},
    {"track", "plan"},
    {"train"},
    {"probes"},
    {"studies"},
    {"submit"},
    {"cli"},
]
RANK = {name: i for i, layer in enumerate(LAYERS) for name in layer}
MODULES = sorted(PACKAGE.rglob("*.py"))


def imports(file: Path) -> set[str]:
    """Modules of the package that a file imports, anywhere in it, but not for type checking only."""
    found: set[str] = set()
    tree = ast.parse(file.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("medim_ray"):
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found.update(a.name for a in node.names if a.name.startswith("medim_ray"))
    return {name for name in found if name not in ("medim_ray", "medim_ray.config.loader")}


@pytest.mark.parametrize("file", MODULES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_dependencies_flow_one_way(file: Path) -> None:
    own = RANK[file.relative_to(PACKAGE).parts[0].removesuffix(".py")]
    above = [name for name in imports(file) if RANK[name.split(".")[1]] > own]
    assert not above, f"{file.relative_to(ROOT)} imports {above}, which lie downstream of it"


def test_only_two_modules_of_the_data_plane_import_ray() -> None:
    with_ray = {
        f.name for f in (PACKAGE / "data").rglob("*.py") if re.search(r"^\s*(import|from) ray\b", f.read_text(), re.M)
    }
    assert with_ray <= {"pipeline.py", "ingest.py", "output.py", "progress.py"}
    for package in ("masking", "models", "objectives", "reports"):
        for file in (PACKAGE / package).rglob("*.py"):
            assert not re.search(r"^\s*(import|from) (ray|deepspeed)\b", file.read_text(), re.M), file


def test_the_loop_is_short_and_knows_no_objective_and_no_stage() -> None:
    text = (PACKAGE / "train" / "loop.py").read_text()
    assert len(text.splitlines()) < 250
    code = "\n".join(line.split("#")[0] for line in text.split('"""')[2::2])
    for name in [*OBJECTIVES, "medim.", "zero", "stage"]:
        assert not re.search(rf"\b{name}\b", code), name
    train = next(n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef) and n.name == "train")
    loop = next(n for n in train.body if isinstance(n, ast.For))
    assert len(loop.body) <= 8


@pytest.mark.parametrize("file", MODULES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_modules_say_what_they_are(file: Path) -> None:
    text = file.read_text()
    if text.strip():
        assert ast.get_docstring(ast.parse(text)), f"{file} has no opening lines"


RECIPES = [f for f in sorted((ROOT / "configs").rglob("*.yaml")) if "clusters" not in f.parts]


@pytest.mark.parametrize("file", RECIPES, ids=lambda f: str(f.relative_to(ROOT)))
def test_every_shipped_recipe_loads_and_reloads_equal(file: Path) -> None:
    roots = {"source": PrepareConfig, "space": SweepConfig, "arms": StudyConfig}
    root: type[Any] = next((roots[key] for key in read_tree(file) if key in roots), RunConfig)
    config = load(root, file)
    assert from_tree(root, parse_yaml(to_yaml(config))) == config
    assert file.read_text().startswith("#"), "a recipe's header says what was measured, or 'not yet run'"


def test_the_readme_names_commands_and_files_that_exist() -> None:
    text = (ROOT / "README.md").read_text()
    commands = re.findall(r"^ {4}medim-ray (.+?)(?: #.*)?$", text, re.M)
    assert len(commands) >= 7
    for command in commands:
        args = _parser().parse_args([part.replace("…", "x") for part in command.split()])
        assert callable(args.command)
        if getattr(args, "config", None):
            assert (ROOT / args.config).is_file(), args.config
    for path in re.findall(r"`((?:medim_ray|configs|tests|cluster|jobs|benchmarks)/[\w/.-]+)`", text):
        assert (ROOT / path).exists() or "mine" in path, path
    for target in re.findall(r"^ {4}make (\w[\w-]*)", text, re.M):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), target


@pytest.mark.parametrize(
    "modules",
    [
        "medim_ray.data.reader, medim_ray.data.pipeline, medim_ray.masking, medim_ray.train.stream",
        "medim_ray.probes.features, medim_ray.probes.scoring, medim_ray.probes.segment_linear",
    ],
    ids=["decoding actors", "tasks of probes"],
)
def test_what_comes_by_the_dozen_loads_neither_torch_nor_timm(modules: str) -> None:
    """Three seconds of start and 200 MB less in each process."""
    heavy = "{'torch', 'timm', 'transformers', 'deepspeed'} & set(sys.modules)"
    code = f"import sys, {modules}; print(sorted({heavy}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"
