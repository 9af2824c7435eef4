"""The model against runs that happened: one fact calibrates the utilisation, another judges it, a third is shown.

`python -m medim_ray.plan.facts configs` prints all of them.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

from medim_ray.config.loader import load
from medim_ray.config.schema import RunConfig
from medim_ray.plan import constants
from medim_ray.plan.clusters import Cluster, ClusterConfig, load_cluster
from medim_ray.plan.constants import Fact
from medim_ray.plan.step_time import Setting, step_time
from medim_ray.plan.workload import Workload, workload

CONFIGS = Path(__file__).parents[2] / "configs"
RAD_DINO_FULL_STEPS = 100_000
RAD_DINO_CAUSE = (
    "the card's 40 h most likely cover all 100,000 iterations, of which 35,000 was chosen afterwards; what is left "
    "fits a lower utilisation: fp16 with FSDP at 518 px (1,370 tokens), 4-GPU nodes without a fast network, images "
    "decoded from full-size files"
)


@dataclass(frozen=True, kw_only=True)
class Check:
    """A prediction beside its fact. utilisation: the constant; implied: by number of steps, the utilisation with which
    the model gives exactly the fact's hours (None: no utilisation does); ratio: fact over prediction."""

    fact: Fact
    hours: float
    utilisation: float
    implied: dict[int, float | None]
    cause: str

    @property
    def ratio(self) -> float:
        return self.fact.hours / self.hours

    def sentences(self) -> list[str]:
        """The comparison in words."""
        lines = [
            f"fact {self.fact.name} ({self.fact.role}): {self.fact.hours:.1f} h; this plan {self.hours:.1f} h at a "
            f"utilisation of {self.utilisation:.3f}; fact over plan {self.ratio:.2f} ({self.fact.source})"
        ]
        for steps, value in self.implied.items():
            text = "no utilisation" if value is None else f"a utilisation of {value:.3f}"
            lines.append(f"{self.fact.hours:.0f} h for {steps:,} iterations imply {text}")
        return [*lines, f"likely cause: {self.cause}"] if self.cause else lines


def fact_of(config: RunConfig, cluster: ClusterConfig) -> Fact | None:
    """The fact that this run is: the one whose shipped recipe and cluster have the same resolved values, whatever the
    files are called (folder, title and trackers of the run aside). None without the folder `configs` of the project."""
    for fact in constants.facts():
        recipe_file, cluster_file = files_of(fact, CONFIGS)
        if not recipe_file.is_file() or not cluster_file.is_file():
            continue
        if replace(load(ClusterConfig, cluster_file), name=cluster.name) != cluster:
            continue
        shipped = load(RunConfig, recipe_file)
        if replace(shipped, run=config.run, track=config.track) == config:
            return fact
    return None


def files_of(fact: Fact, configs: Path) -> tuple[Path, Path]:
    """The recipe and the cluster of a fact below `configs`."""
    return configs / "plan" / f"{fact.recipe}.yaml", configs / "clusters" / f"{fact.cluster}.yaml"


def check(fact: Fact, config: RunConfig, cluster: Cluster) -> Check:
    """The plan of the fact's run at the calibrated utilisation, and the utilisation that the fact implies."""
    work = workload(config, cluster.code)
    setting = setting_of(config)
    full = fact.name == "rad_dino_public"
    counts = [config.train.steps, RAD_DINO_FULL_STEPS] if full else [config.train.steps]
    return Check(
        fact=fact,
        hours=config.train.steps * step_time(cluster, work, setting).total / 3600.0,
        utilisation=cluster.utilisation,
        implied={steps: implied_utilisation(cluster, work, setting, fact.hours * 3600.0 / steps) for steps in counts},
        cause=RAD_DINO_CAUSE if full else "",
    )


def setting_of(config: RunConfig) -> Setting:
    """The layout of a recipe, without checkpointing."""
    train = config.train
    return Setting(
        num_gpus=train.max_workers,
        stage=train.stage,
        micro_batch=train.local_micro_batch,
        accumulation=train.accumulation,
        checkpointed=False,
        precision=train.precision,
    )


def implied_utilisation(cluster: Cluster, work: Workload, setting: Setting, step_s: float) -> float | None:
    """The utilisation at which a step takes `step_s`, by bisection; None where no utilisation in (0, 1] gives it."""
    low, high = 1e-4, 1.0
    if step_time(cluster, work, setting, high).total > step_s or step_time(cluster, work, setting, low).total < step_s:
        return None
    for _ in range(60):
        middle = (low + high) / 2
        if step_time(cluster, work, setting, middle).total > step_s:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def calibrate(config: RunConfig, cluster: Cluster) -> float:
    """The utilisation constant, from the one fact whose role it is; constants.yaml holds it to four digits."""
    (fact,) = [f for f in constants.facts() if f.role == "calibrates"]
    value = implied_utilisation(
        cluster, workload(config, cluster.code), setting_of(config), fact.hours * 3600.0 / config.train.steps
    )
    assert value is not None
    return value


def main(configs: Path) -> None:
    """Prints every fact with its prediction, from the recipes and clusters below `configs`."""
    for fact in constants.facts():
        recipe_file, cluster_file = files_of(fact, configs)
        config, cluster = load(RunConfig, recipe_file), load_cluster(cluster_file)
        if fact.role == "calibrates":
            print(f"calibrated utilisation: {calibrate(config, cluster):.4f}")
        for line in check(fact, config, cluster).sentences():
            print(line)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "configs"))
