"""From axes to points: how many there are, that they are different runs, and what is refused before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medim_ray.studies.space import MAX_CHECKED, Choices, Point, Range, SearchSpace, make_trial

RECIPE = Path(__file__).parents[3] / "configs/debug/medim-vit_tiny-2w-z1.yaml"
SPACE: dict[str, Any] = {
    "masking.ratio": [0.25, 0.5],
    "strategy": {"choices": {"uniform": ["masking.name=uniform", "masking.on=feature"], "KDM": ["masking.name=kdm"]}},
    "seed": [0, 1, 2],
}


def test_the_grid_has_every_combination_once_and_each_is_another_run() -> None:
    points = SearchSpace.parse(SPACE).grid()
    trials = [make_trial(RECIPE, ["track.aim=false"], point, "/runs") for point in points]
    assert len({trial.name for trial in trials}) == len(points) == 12
    assert len({point.cell for point in points}) == 4
    first = trials[0]
    assert (first.config.masking.name, first.config.masking.ratio, first.config.seed) == ("uniform", 0.25, 0)
    assert first.config.run.dir == f"/runs/{first.name}"


def test_a_value_that_equals_the_recipe_is_the_run_of_the_recipe() -> None:
    space = SearchSpace.parse({"masking.ratio": [0.5, 0.75]})
    half, more = (make_trial(RECIPE, [], point, "/runs") for point in space.grid())
    assert half.name == make_trial(RECIPE, [], Point({}, ()), "/runs").name != more.name


def test_random_points_begin_with_those_of_a_shorter_list_and_take_every_seed() -> None:
    space = SearchSpace.parse({"train.lr": {"loguniform": [1e-4, 1e-2]}, "text.depth": [1, 2], "seed": [3, 4]})
    some, more = space.random(3, seed=7), space.random(5, seed=7)
    assert more[: len(some)] == some and len(some) == 6
    assert len({point.cell for point in more}) == 5
    assert {point.values["seed"] for point in more} == {3, 4}
    assert space.random(3, seed=8) != some


@given(st.floats(0.0, 1.0, exclude_max=True), st.sampled_from(["uniform", "loguniform", "randint"]))
def test_a_range_draws_within_its_ends(share: float, kind: Any) -> None:
    axis = Range("train.lr", kind, 2.0, 9.0)
    value = axis.at(share)
    assert 2.0 - 1e-9 <= value <= 9.0 + 1e-9
    assert kind != "randint" or isinstance(value, int)


def test_whole_numbers_are_drawn_evenly() -> None:
    axis = Range("train.steps", "randint", 1, 4)
    drawn = [axis.at((i + 0.5) / 400) for i in range(400)]
    assert [drawn.count(value) for value in (1, 2, 3, 4)] == [100] * 4


def test_the_ends_of_ranges_are_among_what_is_checked() -> None:
    space = SearchSpace.parse({"masking.ratio": {"uniform": [0.1, 1.5]}, "seed": [0, 1]})
    assert len(list(space.corners())) == 4
    with pytest.raises(ValueError, match=r"masking\.ratio"):
        for point in space.corners():
            make_trial(RECIPE, [], point, "/runs")


def test_whole_numbers_are_checked_at_both_ends_as_whole_numbers() -> None:
    space = SearchSpace.parse({"train.global_batch": {"randint": [8, 64]}})
    trials = [make_trial(RECIPE, [], point, "/runs") for point in space.corners()]
    assert [trial.config.train.global_batch for trial in trials] == [8, 64]
    with pytest.raises(ValueError, match=r"randint=\[8\.5, 64\]: needs whole numbers"):
        SearchSpace.parse({"train.global_batch": {"randint": [8.5, 64]}})


def test_of_a_space_too_large_to_check_every_value_of_every_axis_is_checked() -> None:
    space = SearchSpace.parse({f"axis{i}": list(range(6)) for i in range(6)})
    corners = space.corners()
    assert space.num_corners == 6**6 and MAX_CHECKED <= len(corners) <= MAX_CHECKED + 36
    assert len({point.cell for point in corners}) == len(corners)
    for key in space.keys:
        assert {point.values[key] for point in corners} == set(range(6))
    pairs = {(point.values["axis0"], point.values["axis5"]) for point in corners}
    assert len(pairs) == 36, "spread over the whole space, not its beginning"


def test_an_unknown_key_names_the_nearest() -> None:
    (point,) = SearchSpace.parse({"masking.ration": [0.5]}).grid()
    with pytest.raises(ValueError, match=r"masking.ration=0.5: .*unknown key.*masking.ratio"):
        make_trial(RECIPE, [], point, "/runs")


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({}, "space is empty"),
        ({"seed": []}, "at least one value"),
        ({"seed": [1, 1]}, "stands twice"),
        ({"seed": 3}, "give a list"),
        ({"seed": {"normal": [0, 1]}}, "unknown kind 'normal'"),
        ({"train.lr": {"loguniform": [0, 1]}}, "0 < low < high"),
        ({"train.lr": {"uniform": [2, 1]}}, "low < high"),
        ({"train.lr": {"uniform": ["a", 1]}}, "two numbers"),
        ({"x": {"choices": {}}}, "at least one NAME"),
        ({"x": {"choices": {"a": "masking.name=kdm"}}}, "a list of overrides"),
    ],
)
def test_what_is_no_space_is_refused(space: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SearchSpace.parse(space)


def test_a_grid_of_a_range_is_refused() -> None:
    space = SearchSpace.parse({"train.lr": {"uniform": [0.1, 0.2]}, "seed": [0]})
    assert isinstance(space.axes[1], Choices)
    with pytest.raises(ValueError, match=r"space.train.lr is a range"):
        space.grid()


def test_points_that_differ_in_what_the_hash_does_not_see_are_runs_of_their_own() -> None:
    """They have equal weights, but not equal speed and memory, which a study may ask for."""
    space = SearchSpace.parse({"train.activation_checkpointing": [False, True], "masking.ratio": [0.5]})
    off, on = (make_trial(RECIPE, [], point, "/runs") for point in space.grid())
    plain = make_trial(RECIPE, [], Point({}, ("masking.ratio=0.5",)), "/runs")
    assert len({off.name, on.name, plain.name}) == 3
    assert {off.name[:12], on.name[:12]} == {plain.name} and on.config.run.dir == f"/runs/{on.name}"


@pytest.mark.parametrize("other", ["masking.ratio", "masking"])
def test_two_axes_that_set_the_same_option_are_refused(other: str) -> None:
    space = {"masking.ratio": [0.5], "s": {"choices": {"a": [f"{other}=0.25"], "b": []}}}
    with pytest.raises(ValueError, match=r"space\.masking\.ratio and space\.s both set masking\.ratio"):
        SearchSpace.parse(space)


def test_random_cells_need_a_list_of_seeds() -> None:
    space = SearchSpace.parse({"masking.ratio": [0.25, 0.5], "seed": {"randint": [0, 9]}})
    with pytest.raises(ValueError, match=r"space\.seed is a range"):
        space.random(2, seed=0)


def test_a_space_holds_what_lies_on_all_of_its_axes_and_on_no_other() -> None:
    space = SearchSpace.parse({"train.lr": {"loguniform": [1e-4, 1e-2]}, "masking.ratio": [0.25, 0.5]})
    assert space.holds({"train.lr": 1e-3, "masking.ratio": "0.5"})
    for values in (
        {"train.lr": 1e-3},
        {"train.lr": 0.5, "masking.ratio": "0.5"},
        {"train.lr": 1e-3, "masking.ratio": "0.75"},
        {"train.lr": 1e-3, "masking.ratio": "0.5", "seed": 1},
    ):
        assert not space.holds(values)
