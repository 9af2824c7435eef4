"""Inline SVG: valid, themed, without anything of the outside world; paths that cover exactly what they should."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medim_ray.studies.figures import (
    _VARIABLES,
    _buckets,
    _light_colours,
    _smooth,
    curve,
    interval_bar,
    outline,
    squares,
    to_png,
)


def test_a_curve_follows_the_page_colours_and_names_nothing_outside() -> None:
    steps = np.arange(50.0)
    svg = str(curve(steps, np.exp(-steps / 20), "loss"))
    assert ET.fromstring(svg.replace("xlink:href", "href")).attrib["viewBox"]
    assert "http" not in svg and "url(#" in svg
    assert "var(--c1)" in svg and not re.search(r"#(?:[1-9a]0){3}", svg)
    assert "<text" in svg, "text must stay text"


def test_a_png_has_the_light_colours_of_the_style_sheet() -> None:
    drawing = curve(np.arange(40.0), np.linspace(0.0, 1.0, 40), "loss")
    decoded = cv2.imdecode(np.frombuffer(to_png(drawing), np.uint8), cv2.IMREAD_COLOR)
    assert decoded is not None
    pixels = decoded[:, :, ::-1].reshape(-1, 3)
    colours, counts = np.unique(pixels, axis=0, return_counts=True)
    known = dict(zip(_VARIABLES, _light_colours().astype(int).tolist(), strict=True))
    assert colours[counts.argmax()].tolist() == known["--card"], "the paper"
    for name in ("--c1", "--muted", "--line"):  # the curve, the ticks' text, the grid
        assert known[name] in colours.tolist(), name
    assert known["--c2"] not in colours.tolist()


def test_ids_of_two_figures_on_a_page_differ_and_every_reference_holds() -> None:
    values = np.arange(5.0)
    pages = [str(curve(values, values, "x")) for _ in range(2)]
    ids = [set(re.findall(r' id="([^"]+)"', page)) for page in pages]
    assert ids[0] and not ids[0] & ids[1]
    for page, known in zip(pages, ids, strict=True):
        assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', page)) <= known


def test_long_series_become_buckets_with_their_range_and_keep_spikes() -> None:
    steps = np.arange(10_000.0)
    values = np.zeros(10_000)
    values[4321] = 7.0
    x, low, middle, high = _buckets(steps, values)
    assert len(x) == len(high) <= 300 and high.max() == 7.0 and low.max() == 0.0 and middle.max() < 1.0


def test_smoothing_keeps_a_constant_and_gaps() -> None:
    values = np.full(100, 3.0)
    values[40:43] = np.nan
    smoothed = _smooth(values)
    assert np.isnan(smoothed[40:43]).all()
    np.testing.assert_allclose(np.delete(smoothed, [40, 41, 42]), 3.0)


@pytest.mark.parametrize("values", [[1.0], [np.nan, 2.0], [5.0, 5.0, 5.0]])
def test_short_flat_and_gappy_series_are_drawn(values: list[float]) -> None:
    assert "<path" in str(curve(np.arange(len(values), dtype=float), np.array(values), "x", floor=0.0))


def test_interval_bar_clips_to_its_axis_and_draws_no_dot_without_a_value() -> None:
    bar = str(interval_bar({"value": 5.0, "low": -1.0, "high": 5.0}, 0, 1, 0.5, "trained"))
    assert 'x1="0.0" x2="100.0"' in bar and "left:100.0%" in bar and 'class="chance" x1="50.0"' in bar
    assert "<i" not in str(interval_bar({"value": None, "low": None, "high": None}, 0, 1, None, "x"))


@settings(max_examples=50, deadline=None)
@given(bits=st.lists(st.booleans(), min_size=12, max_size=12))
def test_squares_cover_exactly_the_hidden_patches(bits: list[bool]) -> None:
    path = squares(np.array(bits), 4)
    covered = np.zeros((3, 4), dtype=int)
    for x, y, width in re.findall(r"M(\d+) (\d+)h(\d+)v1h-\d+z", path):
        covered[int(y), int(x) : int(x) + int(width)] += 1
    np.testing.assert_array_equal(covered.ravel(), np.array(bits, dtype=int))


def test_outline_lies_on_the_mask() -> None:
    mask = np.zeros((100, 100), dtype=np.uint8)
    mask[20:40, 50:80] = 1
    contours, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    points = np.array(re.findall(r"(\d+) (\d+)", outline(contours, 100)), dtype=int)
    assert points.min(axis=0).tolist() == [505, 205] and points.max(axis=0).tolist() == [795, 395]
