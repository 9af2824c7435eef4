"""The files of a sweep or study: what they say, that the page needs nothing else, and that every figure is drawn."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from medim_ray.studies.fit import Measured, fit_line
from medim_ray.studies.outcome import Number, told
from medim_ray.studies.page import Study, figures, read_study, write_study
from medim_ray.studies.results import Run, Table, make_table

STUDY = Study(kind="sweep", title="Sweep of x", question="which?", config={"out": "x"})
ORIGIN = ("written", "commit", "machine", "versions")


def _table(*axes: str, failed: bool = False) -> Table:
    """Two values of every axis, three seeds; the first cell is not learned."""
    runs = []
    for i in range(2 ** len(axes)):
        values = {
            axis: (["uniform", "KDM"] if axis == "strategy" else [0.25, 0.5])[i >> k & 1] for k, axis in enumerate(axes)
        }
        for seed in range(3):
            gain = Number(0.1 + seed / 100) if i else Number(0.0 + seed / 100 - 0.01)
            state = "failed" if failed and i == 1 and seed == 0 else "finished"
            numbers = {"auroc.mean": Number(0.6 + i / 20 + seed / 100, 0.5, 0.8), "loss": Number(2.0 - i / 10)}
            runs.append(
                Run(
                    name=f"r{i}{seed}",
                    values={**values, "seed": seed},
                    state=state,
                    error="RuntimeError: <no> room" if state == "failed" else "",
                    seconds=3600.0,
                    step=300,
                    numbers=numbers if state == "finished" else {},
                    gains={"auroc.mean": gain} if state == "finished" else {},
                )
            )
    return make_table(runs, "auroc.mean")


def test_the_four_files_agree_and_the_page_needs_no_network(tmp_path: Path) -> None:
    table = _table("masking.ratio", "strategy", failed=True)
    page = Path(write_study(STUDY, table, str(tmp_path / "out"))).read_text()
    tree = json.loads((tmp_path / "out/sweep.json").read_text())
    assert [cell["verdict"] for cell in tree["cells"]] == [cell.verdict for cell in table.cells]
    assert tree["cells"][0]["numbers"]["auroc.mean"]["value"] == table.cells[0].numbers["auroc.mean"].value
    assert len((tmp_path / "out/trials.csv").read_text().splitlines()) == 13
    assert "not learned" in page and "failed" in page and "&lt;no&gt; room" in page
    assert not re.search(r"(src|href)=\"(?!data:|#)", page), "nothing is fetched"
    assert page.count("<svg") - page.count('aria-hidden="true"') == 2, "heat map and curves"


def test_a_page_is_written_again_from_its_json(tmp_path: Path) -> None:
    table = _table("masking.ratio", "strategy", failed=True)
    write_study(STUDY, table, str(tmp_path))
    again = read_study(str(tmp_path))
    assert again is not None
    origin = json.loads((tmp_path / "sweep.json").read_text())
    assert again == (replace(STUDY, origin={key: origin[key] for key in ORIGIN}), table)
    told_before = {"written": "2026-01-01 00:00 UTC", "commit": "abc", "machine": "m", "versions": "v"}
    write_study(replace(STUDY, origin=told_before), table, str(tmp_path))  # says where its runs were made, not the page
    found = read_study(str(tmp_path))
    assert found is not None and found[0].origin == told_before


def test_a_law_that_was_refused_is_not_fitted_when_the_page_is_written_again(tmp_path: Path) -> None:
    points = [Measured(x, Number(1.0 / x)) for x in (1.0, 2.0, 4.0)]
    line = fit_line("", points, "power", hold_out=True)
    assert line.fit is None and "beside the one held out" in line.note
    write_study(replace(STUDY, lines=(line,), law="power", line_names=("x", "y")), _table("strategy"), str(tmp_path))
    again = read_study(str(tmp_path))
    assert again is not None and again[0].lines == (line,)


def test_a_grid_says_what_each_axis_does(tmp_path: Path) -> None:
    space = {"masking.ratio": [0.25, 0.5], "strategy": {"choices": {"uniform": [], "KDM": []}}}
    study = replace(STUDY, config={"search": "grid", "space": space})
    page = Path(write_study(study, _table("masking.ratio", "strategy"), str(tmp_path))).read_text()
    assert "What each axis does" in page and '>KDM</td><td data-name="less">uniform</td>' in page
    told_effects = json.loads((tmp_path / "sweep.json").read_text())["effects"]
    assert [(effect["axis"], effect["num_pairs"]) for effect in told_effects] == [("masking.ratio", 6), ("strategy", 6)]


def test_no_folder_is_no_page(tmp_path: Path) -> None:
    assert read_study(str(tmp_path / "nothing")) is None


def test_two_axes_make_a_heat_map_that_says_what_is_not_learned() -> None:
    (_, heat), (_, lines) = figures(STUDY, _table("masking.ratio", "strategy"))
    assert "not learned" in heat and "uniform" in heat and "0.25" in heat
    assert "KDM" in lines


def test_three_axes_make_parallel_coordinates() -> None:
    ((caption, svg),) = figures(STUDY, _table("masking.ratio", "strategy", "train.lr"))
    assert "Each line is a cell" in caption and "train.lr" in svg


def test_nothing_is_drawn_where_nothing_is_known() -> None:
    assert figures(STUDY, make_table([], "auroc.mean")) == []


def test_numbers_are_told_with_their_interval() -> None:
    assert told(Number(0.7123, 0.61, 0.8)) == "0.712 [0.61, 0.8]"
    assert told(Number(0.5)) == "0.5" and told(None) == "-"


@pytest.mark.parametrize("text", ["{}", '{"kind": "sw', "[]"])
def test_a_damaged_page_is_named_with_what_to_do(tmp_path: Path, text: str) -> None:
    (tmp_path / "sweep.json").write_text(text)
    with pytest.raises(ValueError, match=r"sweep\.json is damaged .* the command that wrote it writes it anew"):
        read_study(str(tmp_path))
