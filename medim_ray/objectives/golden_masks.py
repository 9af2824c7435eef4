"""Block masks against statistics of 2,000 masks a row drawn by DINOv2's code: dinov2_masks.npz (PAPERS.md).

Both sides are samples. Ours is 20 batches of 2,000, so that its own noise hardly counts. The command line and the
printed table are in check_golden.py; the law of a mask is in masking/block.py.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from medim_ray.draws import Draws
from medim_ray.masking.block import block_masks
from medim_ray.objectives.comparison import Arrays, Comparison
from medim_ray.types import Grid

BATCH, NUM_BATCHES = 2000, 20
SETTINGS = tuple((side, ratio) for side in (16, 37) for ratio in (0.1, 0.3, 0.5))  # patches a side, share hidden
MEANS = ("mean_masked", "p_centre", "p_corner", "mean_vertical_neighbour_pairs")
SHOWN = {"min_masked": " (nearest batch)", "max_masked": " (furthest batch)"}  # which of our batches stands as ours
COLUMNS = ("requested", "min_masked", "max_masked", *MEANS)
MASK_OUTPUTS = tuple(f"{side}x{side} {ratio} {column}" for side, ratio in SETTINGS for column in COLUMNS)


def mask_table(arrays: Arrays) -> dict[str, NDArray[np.float64]]:
    """The table `rows` [row, column] as quantities by name, e.g. `37x37 0.3 p_centre`.

    ValueError where `columns` or `rows` is missing, they do not belong together, or a quantity is there twice.
    """
    for name in ("columns", "rows"):
        if name not in arrays:
            raise ValueError(f"{name} is missing in the file")
    columns, rows = arrays["columns"].tolist(), arrays["rows"]
    if rows.ndim != 2 or rows.shape[1] != len(columns):
        raise ValueError(f"rows has the shape {rows.shape}, but there are {len(columns)} names in columns")
    if absent := {"grid", "ratio"} - set(columns):
        raise ValueError(f"column {min(absent)} is missing in the file: it says which masks a row is of")
    table: dict[str, NDArray[np.float64]] = {}
    for row in rows:
        side, ratio = (float(row[columns.index(name)]) for name in ("grid", "ratio"))
        for column, value in zip(columns, row, strict=True):
            name = f"{side:.12g}x{side:.12g} {ratio} {column}"
            if name in table:
                raise ValueError(f"{name} is in the file twice")
            table[name] = np.asarray(value)
    return {name: value for name, value in table.items() if name.split()[-1] not in ("grid", "ratio")}


def mask_names(arrays: Arrays) -> set[str]:
    """Names of the reference quantities of a file: the entries of its table, and any array beside the table."""
    return set(mask_table(arrays)) | (set(arrays) - {"columns", "rows"})


def compare_masks(arrays: Arrays) -> list[Comparison]:
    """The quantities of each row of the file.

    Means may differ by three standard errors of the difference between two samples of 2,000 draws each. Counts asked
    for are equal. The largest count of each of our batches is within 2 patches of the reference: the furthest stands as
    ours. The smallest of 2,000 is itself random (one mask in some thousand stops early), so the reference is within 2
    of the range over our batches: the nearest number of that range stands as ours.
    """
    table = mask_table(arrays)
    lines = []
    for side, ratio in SETTINGS:
        requested = int(side * side * ratio)
        drawn = drawn_values(side, requested)
        largest, smallest = drawn["mean_masked"].max(axis=1), drawn["mean_masked"].min(axis=1)
        row = f"{side}x{side} {ratio}"
        least, most = table[f"{row} min_masked"], table[f"{row} max_masked"]
        ours = {
            "requested": (np.array(requested), 0.0),
            "min_masked": (np.clip(least, smallest.min(), smallest.max()), 2.0),
            "max_masked": (largest[np.argmax(np.abs(largest - most))], 2.0),
        }
        for name in MEANS:
            standard_error = float(drawn[name].std()) * np.sqrt(2 / BATCH)
            ours[name] = (drawn[name].mean(), 3 * standard_error)
        for column, (value, tolerance) in ours.items():
            name = f"{row} {column}"
            what = name + SHOWN.get(column, "")
            lines.append(Comparison(name, what, table[name], np.asarray(value), tolerance, relative=False))
    return lines


@functools.cache
def drawn_values(side: int, requested: int) -> Mapping[str, NDArray[np.float64]]:
    """What each of our masks of side x side patches adds to each mean of MEANS, [NUM_BATCHES, BATCH].

    Patches hidden, whether the patch at (side // 2, side // 2) is, whether the one at (0, 0) is, and pairs of hidden
    patches one below the other. Always the same draws; some 3 s of one core, once a process.
    """
    middle = side // 2
    values: dict[str, list[NDArray[np.float64]]] = {name: [] for name in MEANS}
    for batch in range(NUM_BATCHES):
        draws = Draws.of(batch, np.zeros(BATCH, dtype=np.int64), [f"mask{i}" for i in range(BATCH)])
        counts_BG = np.full((BATCH, 1), requested, dtype=np.int64)
        hidden_BHW = block_masks(counts_BG, Grid(side, side), draws, "mask/block").reshape(BATCH, side, side)
        values["mean_masked"].append(hidden_BHW.sum(axis=(1, 2), dtype=np.float64))
        values["p_centre"].append(hidden_BHW[:, middle, middle].astype(np.float64))
        values["p_corner"].append(hidden_BHW[:, 0, 0].astype(np.float64))
        pairs_BHW = hidden_BHW[:, 1:] & hidden_BHW[:, :-1]
        values["mean_vertical_neighbour_pairs"].append(pairs_BHW.sum(axis=(1, 2), dtype=np.float64))
    return {name: np.stack(batches) for name, batches in values.items()}
