"""The planner against runs that happened."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from medim_ray.config.loader import load
from medim_ray.config.schema import RunConfig
from medim_ray.plan import constants
from medim_ray.plan.clusters import Cluster, load_cluster
from medim_ray.plan.facts import Check, calibrate, check, fact_of, implied_utilisation, setting_of
from medim_ray.plan.step_time import step_time
from medim_ray.plan.workload import workload

CONFIGS = Path(__file__).parents[3] / "configs"


def files(name: str) -> tuple[RunConfig, Cluster]:
    (fact,) = [f for f in constants.facts() if f.name == name]
    return (
        load(RunConfig, CONFIGS / "plan" / f"{fact.recipe}.yaml"),
        load_cluster(CONFIGS / "clusters" / f"{fact.cluster}.yaml"),
    )


def checked(name: str) -> Check:
    (fact,) = [f for f in constants.facts() if f.name == name]
    return check(fact, *files(name))


def test_the_utilisation_is_solved_from_its_fact_and_from_nothing_else() -> None:
    solved = calibrate(*files("dinov2-vit_large16-short"))
    assert constants.assumption("gpu_utilisation") == pytest.approx(solved, abs=5e-5)
    assert [f.name for f in constants.facts() if f.role == "calibrates"] == ["dinov2-vit_large16-short"]


def test_the_judged_fact_comes_out_within_thirty_percent() -> None:
    result = checked("dinov2-vit_large14")
    assert result.fact.hours == pytest.approx(3.3 * 24)
    assert result.hours == pytest.approx(result.fact.hours, rel=0.30)


def test_rad_dino_names_both_utilisations_the_ratio_and_its_cause() -> None:
    result = checked("rad_dino_public")
    few, many = result.implied[35_000], result.implied[100_000]
    assert few is not None and many is not None and few < many < result.utilisation
    text = "\n".join(result.sentences())
    for part in ("40 h for 35,000", "40 h for 100,000", f"{few:.3f}", f"{many:.3f}", f"{result.ratio:.2f}", "cause"):
        assert part in text


def test_an_implied_utilisation_gives_back_the_time() -> None:
    config, cluster = files("dinov2-vit_large14")
    work, setting = workload(config, cluster.code), setting_of(config)
    value = implied_utilisation(cluster, work, setting, 0.5)
    assert value is not None
    assert step_time(cluster, work, setting, value).total == pytest.approx(0.5, rel=1e-6)
    assert implied_utilisation(cluster, work, setting, 1e-9) is None


def test_the_runs_of_the_facts_are_those_of_the_papers() -> None:
    config, cluster = files("dinov2-vit_large16-short")
    assert (config.train.steps, config.train.global_batch, cluster.num_gpus) == (125_000, 2_048, 32)
    config, cluster = files("dinov2-vit_large14")
    assert (config.train.steps, config.train.global_batch, cluster.num_gpus) == (625_000, 3_072, 96)
    config, cluster = files("rad_dino_public")
    assert (config.train.local_micro_batch, config.train.global_batch, cluster.num_gpus) == (40, 2_560, 64)


def test_a_fact_is_known_by_its_values_whatever_the_files_are_called() -> None:
    config, cluster = files("dinov2-vit_large14")
    known = fact_of(config, dataclasses.replace(cluster.config, name="another title"))
    assert known is not None and known.role == "judges"
    assert fact_of(config, files("dinov2-vit_large16-short")[1].config) is None
    assert fact_of(config, dataclasses.replace(cluster.config, price_per_gpu_hour=1.0)) is None
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=625_001))
    assert fact_of(longer, cluster.config) is None


def test_no_number_without_a_source() -> None:
    for name, entry in constants.all_entries():
        assert entry["source"].strip(), name
        assert str(entry["date"])[:4].isdigit(), name
        assert entry["status"] in constants.STATUSES, name
