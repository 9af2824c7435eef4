"""`medim-ray plan`: its JSON, its table, its page, and what it says to bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from medim_ray.plan.clusters import BOUNDS, load_cluster
from medim_ray.plan.command import run_plan

ROOT = Path(__file__).parents[3]
CLUSTERS = ROOT / "configs" / "clusters"
RAD_DINO = ROOT / "configs" / "plan" / "rad_dino_public.yaml"
CLUSTER = f"cluster={CLUSTERS / 'rad_dino_public.yaml'}"


def as_json(capsys: pytest.CaptureFixture[str], *overrides: str, compare: bool = False) -> dict[str, Any]:
    capsys.readouterr()
    assert run_plan(RAD_DINO, [CLUSTER, *overrides], as_json=True, compare=compare) == 0
    tree = json.loads(capsys.readouterr().out)
    assert isinstance(tree, dict)
    return tree


def test_json_has_the_promised_keys_and_nothing_else_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    tree = as_json(capsys)
    assert tree["hours"] > 0
    assert tree["cost"] == pytest.approx(tree["hours"] * 64 * 4.777)
    assert "compute" in tree["bottleneck"]
    assert set(tree["memory_bytes"]) == {"0", "1", "2", "3"}
    assert tree["memory_bytes"]["2"] < tree["memory_bytes"]["1"]
    assert tree["fact"]["sentences"] and not tree["warnings"]
    assert max(point["num_gpus"] for point in tree["curve"]) == 10_000
    assert 0 < tree["goodput"]["simulated"] <= 1


def test_hours_follow_the_steps_and_the_workers(capsys: pytest.CaptureFixture[str]) -> None:
    whole, half = as_json(capsys), as_json(capsys, "train.num_workers=32", "train.micro_batch=40")
    assert half["hours"] == pytest.approx(2 * whole["hours"], rel=0.05)
    assert as_json(capsys, "train.steps=70000")["hours"] == pytest.approx(2 * whole["hours"])
    assert "fact" not in half


def test_a_slow_network_becomes_the_bottleneck(capsys: pytest.CaptureFixture[str]) -> None:
    tree = as_json(capsys, "cluster.inter_node=0.05", "cluster.code=medim_ray")
    assert tree["bottleneck_kind"] == "communication"
    assert "between nodes" in tree["lift"]


def test_few_cores_make_decoding_the_bottleneck(capsys: pytest.CaptureFixture[str]) -> None:
    tree = as_json(capsys, "cluster.cores_per_node=4")
    assert tree["bottleneck_kind"] == "decode"
    assert tree["decode_cores"] > 1


def test_a_small_model_on_a_core_waits_for_python(capsys: pytest.CaptureFixture[str]) -> None:
    recipe, cluster = ROOT / "configs" / "debug" / "mae-vit_tiny-2w-z1.yaml", CLUSTERS / "this_machine.yaml"
    assert run_plan(recipe, [f"cluster={cluster}", "cluster.peak_tflops=0.08", "train.zero=3"], as_json=True) == 0
    tree = json.loads(capsys.readouterr().out)
    assert tree["bottleneck_kind"] == "dispatch"
    assert "micro_batch" in tree["lift"]


def test_a_resnet_is_planned_where_the_objective_takes_one(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = ROOT / "configs" / "demo-medim-vit_tiny-2w-z1.yaml"
    options = [CLUSTER, "train.num_workers=2", "encoder.name=resnet18", "encoder.depth=null", "encoder.image_size=128"]
    assert run_plan(recipe, options, as_json=True) == 0
    assert json.loads(capsys.readouterr().out)["flops_per_image"] > 1e9
    with pytest.raises(ValueError, match=r"encoder\.name=resnet50: objective rad_dino needs a ViT"):
        run_plan(RAD_DINO, [CLUSTER, "encoder.name=resnet50", "encoder.image_size=512", "encoder.drop_path=0"])


def test_spot_nodes_stragglers_and_waiting_cost_goodput(capsys: pytest.CaptureFixture[str]) -> None:
    calm = as_json(capsys)["goodput"]
    spot = ("cluster.preemptions_per_node_day=4", "cluster.restart_s=300")
    elastic, waiting = as_json(capsys, *spot)["goodput"], as_json(capsys, *spot, "cluster.elastic=false")["goodput"]
    assert calm["simulated"] > 0.99 > elastic["simulated"] > waiting["simulated"] > 0
    assert waiting["lost_to"]["waiting"] > 0 == elastic["lost_to"]["waiting"]
    slow = as_json(capsys, "cluster.stragglers_per_node_day=1")["goodput"]
    assert slow["lost_to"]["slow"] > 0.01
    assert slow["hours"] > calm["hours"]


def test_compare_marks_the_fastest_and_the_cheapest(capsys: pytest.CaptureFixture[str]) -> None:
    comparison = as_json(capsys, compare=True)["comparison"]
    fitting = [row for row in comparison["rows"] if row["fits"]]
    assert 0 < len(fitting) < len(comparison["rows"])
    assert comparison["fastest"]["hours"] == min(row["hours"] for row in fitting)
    assert comparison["cheapest"]["cost"] == min(row["cost"] for row in fitting)
    assert {row["stage"] for row in comparison["rows"]} == {0, 1, 2, 3}


def test_the_table_and_the_page(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "new" / "page.html"
    assert run_plan(RAD_DINO, [CLUSTER], compare=True, html=out) == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in ("bottleneck", "Memory of one GPU", "40 h for 100,000 iterations", "Daly"):
        assert part in text
    page = out.read_text(encoding="utf-8")
    assert page.count("<svg") == 4
    assert "NVIDIA A100 datasheet" in page
    assert "src=" not in page
    assert run_plan(RAD_DINO, [CLUSTER], as_json=True, html=tmp_path) == 0
    assert "<svg" in (tmp_path / "plan.html").read_text(encoding="utf-8")


def test_plan_imports_neither_ray_nor_deepspeed() -> None:
    code = (
        "import sys; from medim_ray.plan.command import run_plan; "
        f"run_plan({str(RAD_DINO)!r}, [{CLUSTER!r}], as_json=True); "
        "assert not {'ray', 'deepspeed'} & set(sys.modules), 'imported'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["hours"] > 0


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("cluster.gpu=a100-80gb", ["cluster.gpu", "a100-80gb-sxm", "h100-80gb-sxm"]),
        ("cluster.gpu=''", ["cluster.gpu is missing", "a100-80gb-sxm", "cpu-core"]),
        ("cluster.price_per_gpu_hour=-1", ["cluster.price_per_gpu_hour=-1", "0 or more"]),
        ("cluster.price_per_gpu_hour=null", ["price_per_gpu_hour is missing", "azure_nc96ads_a100_v4"]),
        ("cluster.price_per_gpu_hour=cheap", ["cluster.price_per_gpu_hour", "aws_p5_capacity_block"]),
        ("cluster.inter_node=0", ["inter_node=0", "above 0", "ethernet_100g"]),
        ("cluster.intra_node=0", ["intra_node=0", "above 0", "nvlink3"]),
        ("cluster.storage=-1", ["storage=-1", "above 0"]),
        ("cluster.inter_node=inf", ["inter_node=inf", "finite"]),
        ("cluster.price_per_gpu_hour=inf", ["price_per_gpu_hour=inf", "finite"]),
        ("cluster.pue=0.5", ["pue=0.5", "at least 1"]),
        ("cluster=no/such.yaml", ["cluster is given 2 times", "cluster=FILE once"]),
        ("cluster.num_nodes=8", ["train.num_workers=64", "32 GPUs", "cluster.num_nodes=16"]),
        ("cluster.num_nodes=0", ["cluster.num_nodes=0", "at least 1"]),
        ("cluster.straggler_slowdown=0.5", ["straggler_slowdown", "at least 1"]),
        ("cluster.code=other", ["cluster.code", "medim_ray"]),
        ("cluster.gpu_kind=x", ["gpu_kind", "Did you mean"]),
        ("cluster.peak_tflops=much", ["peak_tflops", "probe"]),
        ("train.num_wokers=4", ["train.num_wokers", "train.num_workers"]),
    ],
)
def test_bad_input_names_the_field_and_the_fix(override: str, expected: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        run_plan(RAD_DINO, [CLUSTER, override], as_json=True)
    for part in expected:
        assert part in str(error.value)


FINITE = [key for key, (least, _, _) in BOUNDS.items() if key != "mtbf_gpu_hours" and least != 1] + [
    "pue",
    "straggler_slowdown",
]


@pytest.mark.parametrize("value", [".inf", ".nan", "1e300"])
@pytest.mark.parametrize("key", FINITE)
def test_what_is_not_finite_or_absurd_is_refused_with_its_field(key: str, value: str) -> None:
    with pytest.raises(ValueError, match=rf"cluster\.{key}=.*must be (finite|at most .*); give "):
        load_cluster(CLUSTERS / "rad_dino_public.yaml", [f"{key}={value}"])


def test_a_folder_is_no_cluster_file() -> None:
    with pytest.raises(ValueError, match="this is a folder"):
        load_cluster(CLUSTERS)


def test_a_page_that_can_not_be_written_names_the_option(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    for out, expected in (("", "--html is empty"), (tmp_path / "file" / "page.html", "--html=.*can't be written")):
        with pytest.raises(ValueError, match=expected):
            run_plan(RAD_DINO, [CLUSTER], html=out)


def test_a_cluster_file_that_is_not_there_or_has_another_key_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cluster=no/such\.yaml: there is no such file"):
        run_plan(RAD_DINO, ["cluster=no/such.yaml"])
    own = tmp_path / "own.yaml"
    own.write_text((CLUSTERS / "rad_dino_public.yaml").read_text(encoding="utf-8") + "gpu_cost: 3\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"(?s)own\.yaml.*unknown key 'gpu_cost'"):
        run_plan(RAD_DINO, [f"cluster={own}"])


def test_a_copy_with_other_content_is_no_fact_and_is_warned_of_the_code(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    copy = tmp_path / RAD_DINO.name
    copy.write_text(RAD_DINO.read_text(encoding="utf-8").replace("steps: 35000", "steps: 10"), encoding="utf-8")
    assert run_plan(copy, [CLUSTER], as_json=True) == 0
    tree = json.loads(capsys.readouterr().out)
    assert "fact" not in tree
    assert tree["code"] == "dinov2" and "cluster.code=medim_ray" in tree["warnings"][-1]
    assert run_plan(copy, [CLUSTER, "cluster.code=medim_ray"], as_json=True) == 0
    ours = json.loads(capsys.readouterr().out)
    assert ours["code"] == "medim_ray" and not ours["warnings"]


def test_json_stays_json_where_a_run_never_fails_or_never_ends(capsys: pytest.CaptureFixture[str]) -> None:
    calm = as_json(capsys, "cluster.mtbf_gpu_hours=inf")["goodput"]
    assert calm["mtbf_hours"] is calm["interval_daly_s"] is None
    assert calm["simulated"] > 0.99
    storm = as_json(capsys, "cluster.preemptions_per_node_day=5000")["goodput"]
    assert storm["hours"] is None or storm["hours"] > 1e4


def test_a_batch_that_fits_nowhere_says_what_would_fit() -> None:
    with pytest.raises(ValueError, match=r"train\.micro_batch=1280: .* use train\.micro_batch=(\d+) with") as error:
        run_plan(RAD_DINO, [CLUSTER, "train.num_workers=2"], as_json=True)
    micro = int(str(error.value).split("use train.micro_batch=")[1].split(" ")[0])
    assert run_plan(RAD_DINO, [CLUSTER, "train.num_workers=2", f"train.micro_batch={micro}"], as_json=True) == 0


def test_a_model_that_fits_nowhere_is_said_to_be_too_large() -> None:
    with pytest.raises(ValueError, match="not even one image fits"):
        run_plan(RAD_DINO, [CLUSTER, "cluster.memory_gb=1"], as_json=True)


def test_a_batch_that_fits_only_with_checkpointing_is_planned_with_it(capsys: pytest.CaptureFixture[str]) -> None:
    tree = as_json(capsys, "train.num_workers=32")
    assert not tree["fits"]
    assert tree["setting"]["checkpointed"]
    assert "train.micro_batch=80 does not fit" in tree["warnings"][0]


def test_the_cluster_must_be_named_once() -> None:
    for overrides in ([], ["cluster="]):
        with pytest.raises(ValueError, match="cluster is missing"):
            run_plan(RAD_DINO, overrides)
    with pytest.raises(ValueError, match="cluster is given 2 times"):
        run_plan(RAD_DINO, [CLUSTER, CLUSTER])


@pytest.mark.parametrize("file", sorted(CLUSTERS.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_shipped_cluster_loads_and_names_its_sources(file: Path) -> None:
    cluster = load_cluster(file)
    assert cluster.num_gpus >= 2
    given = {key for key, value in yaml.safe_load(file.read_text(encoding="utf-8")).items() if isinstance(value, str)}
    assert given >= {"gpu", "intra_node", "inter_node", "storage", "price_per_gpu_hour"}
