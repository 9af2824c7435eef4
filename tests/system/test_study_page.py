"""The pages of a sweep and of a study in a real browser: heat map, curves, parallel coordinates, a scaling fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from medim_ray.studies.fit import Measured, fit_line
from medim_ray.studies.outcome import Number
from medim_ray.studies.page import Study, write_study
from medim_ray.studies.results import Run, Table, make_table
from tests.system.browser import check_in_browser, needs_chromium

pytestmark = [pytest.mark.system, needs_chromium]
STRATEGIES = ("uniform", "block", "anatomy", "KDM", "SDM", "KDM+SDM")
RATIOS = (0.25, 0.5, 0.6, 0.75, 0.9)


def _run(values: dict[str, object], score: float, learned: bool, error: str = "") -> Run:
    numbers = {
        "auroc.mean": Number(score, score - 0.04, score + 0.04), "auprc.mean": Number(score - 0.2, 0.2, 0.6),
        "lesion_lift.kdm": Number(1.4, 1.2, 1.7), "loss": Number(2.0 - score), "samples_per_s": Number(31.5),
    }  # fmt: skip
    return Run(
        name="-".join(map(str, values.values())), values=values, state="failed" if error else "finished", error=error,
        seconds=260.0, step=300, numbers={} if error else numbers,
        gains={} if error else {"auroc.mean": Number(0.05 if learned else -0.01, 0.02, 0.08)},
    )  # fmt: skip


def _sweep(three_axes: bool) -> Table:
    """The named study's size, with cells that failed and cells that are not learned."""
    runs = []
    for i, strategy in enumerate(STRATEGIES):
        for k, ratio in enumerate(RATIOS):
            values = {"masking.ratio": ratio, "strategy": strategy, **({"train.lr": 1e-4 * 3**k} if three_axes else {})}
            for seed in range(3):
                error = "RuntimeError: no room\nat step 3" if (i, k) == (1, 1) else ""
                score = 0.55 + 0.02 * i + 0.03 * (k == 2) + 0.003 * seed
                runs.append(_run({**values, "seed": seed}, score, i != 0 or seed == 2, error))
    return make_table(runs, "auroc.mean")


def _scaling(out: str) -> str:
    """A power law over five arms, a reference, and the encoders beside them."""
    points = [
        Measured(n, Number(0.2 + 1.5 * n**-0.5, 0.19 + 1.4 * n**-0.5, 0.21 + 1.6 * n**-0.5))
        for n in (5, 10, 30, 100, 300)
    ]
    baselines = {"untrained": {"auroc.mean": Number(0.4, 0.3, 0.5)}, "pixels": {"auroc.mean": Number(0.5, 0.4, 0.6)}}
    runs = [
        replace(_run({"arm": f"{x:g} images", "seed": seed}, 1 - float(n.value or 0), True), baselines=baselines)
        for x, n, *_ in points
        for seed in range(3)
    ]
    study = Study(
        kind="study", title="Data quantity", question="how fast does the error fall?", config={"out": "x"},
        reference="arm=5 images", report=("auprc.mean", "lesion_lift.kdm", "loss", "samples_per_s"),
        lines=(fit_line("", points, "power", hold_out=True),), law="power", line_names=("images", "1 - auroc.mean"),
    )  # fmt: skip
    return write_study(study, make_table(runs, "auroc.mean"), out)


def _speed_up(out: str) -> str:
    """Eight lines of one and two workers, as workers_zero-phantoms has them: no interval, a law of its own each."""
    lines = [
        fit_line(
            f"{kind}, ZeRO {zero}",
            [Measured(1.0, Number(20.0)), Measured(2.0, Number(30.0 + zero + 5 * k))],
            "amdahl",
            False,
        )
        for k, kind in enumerate(("strong", "weak"))
        for zero in range(4)
    ]
    runs = [
        _run({"arm": f"{int(x)} workers, {line.name}", "seed": 0}, 0.5, True) for line in lines for x, *_ in line.points
    ]
    study = Study(
        kind="study", title="Workers x ZeRO", question="what do they cost?", config={"out": "x"},
        reference="arm=1 workers, weak, ZeRO 0", lines=lines, law="amdahl", line_names=("workers", "samples_per_s"),
    )  # fmt: skip
    return write_study(study, make_table(runs, "samples_per_s"), out)


@pytest.mark.parametrize(
    ("width", "dark", "shown"),
    [
        (1280, False, ("heat map and curves", "scaling")),
        (1280, True, ("parallel coordinates",)),
        (1280, False, ("speed-up",)),
        (520, False, ("heat map and curves", "scaling", "nothing yet")),
    ],
)
def test_every_figure_is_drawn_apart_from_the_others(
    tmp_path: Path, width: int, dark: bool, shown: tuple[str, ...]
) -> None:
    sweep = Study(kind="sweep", title="Mask ratio x strategy", question="which hides best?", config={"out": "x"})
    pages = {
        "heat map and curves": lambda out: write_study(sweep, _sweep(three_axes=False), out),
        "parallel coordinates": lambda out: write_study(sweep, _sweep(three_axes=True), out),
        "scaling": _scaling,
        "speed-up": _speed_up,
        "nothing yet": lambda out: write_study(sweep, make_table([], "auroc.mean"), out),
    }
    for name in shown:
        text = Path(pages[name](str(tmp_path / name))).read_text(encoding="utf-8")
        assert (text.count("<figure") > 0) == (name != "nothing yet")
        check_in_browser(text, tmp_path, width, dark)
