"""`python -m medim_ray.probes.lung_lift`: do masks on real radiographs, without outlined lesions, fall on the lungs?

Lung lift = share of the hidden patches' area inside the boxes of the lungs, over that share of all patches (uniform
masking, chance 1.0). All strategies hide int(0.25 * N) patches of the centre crop.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import fsspec
import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor

from medim_ray.data.collate import to_batch
from medim_ray.data.rows import decode_gray
from medim_ray.data.texts import TextRows
from medim_ray.draws import Draws
from medim_ray.masking.anatomy import AnatomyMasking
from medim_ray.masking.block import BlockMasking
from medim_ray.masking.report import ReportMasking
from medim_ray.masking.uniform import UniformMasking
from medim_ray.probes.bootstrap import Estimate, bootstrap, mean
from medim_ray.probes.localise import RATIO, ModelMaps
from medim_ray.probes.rows import Columns, centre_columns, centre_samples
from medim_ray.train.build import build_crop, report_encoder
from medim_ray.train.runs import LoadedRun, load_run
from medim_ray.types import BOX, Grid

BOX_COLUMNS = ("right_lung_xywh", "left_lung_xywh")  # JSON [x, y, width, height] in pixels of the file
_NUM_DRAWS = 16  # of each mask, as in as many epochs
_BATCH = 32


@dataclass(frozen=True, kw_only=True)
class LungLift:
    """strategy -> (lift, share of rows that fell back to random patches). KDM and SDM also by the weights they used."""

    num_images: int
    num_patients: int
    lifts: Mapping[str, tuple[Estimate, float]]

    def to_json(self) -> dict[str, Any]:
        return {
            "num_images": self.num_images,
            "num_patients": self.num_patients,
            "ratio": RATIO,
            "strategies": {
                name: {"lung_lift": lift.to_json(), "fallback_ratio": share}
                for name, (lift, share) in self.lifts.items()
            },
        }


def read_rows(path: str, image_root: str, report_column: str) -> list[dict[str, Any]]:
    """Rows of a CSV with image_id, patient_id, file, a report column and BOX_COLUMNS; only those with a report.

    ValueError: a column is missing, or no row has a report.
    """
    with fsspec.open(path, "rt", encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(io.StringIO(file.read())))
    missing = {"image_id", "patient_id", "file", report_column, *BOX_COLUMNS} - set(table[0] if table else ())
    if missing:
        raise ValueError(
            f"{path} lacks the columns {', '.join(sorted(missing))}: name a table that has boxes of the lungs"
        )
    rows = []
    for entry in table:
        if entry[report_column].strip():
            with fsspec.open(f"{image_root.rstrip('/')}/{entry['file']}", "rb") as image:
                encoded = image.read()
            boxes = [json.loads(entry[column]) for column in BOX_COLUMNS if entry[column]]
            rows.append(
                {
                    "image_id": entry["image_id"],
                    "patient_id": entry["patient_id"],
                    "image": encoded,
                    "report": entry[report_column],
                    "boxes": boxes,
                }
            )
    if not rows:
        raise ValueError(f"{path}: no row has text in {report_column}")
    return rows


def lung_shares(
    boxes: Sequence[Sequence[float]], shape: tuple[int, int], crop_4: NDArray[np.float32], grid: Grid
) -> Any:
    """[N] share of each patch of the crop inside the boxes (x, y, width, height; pixels of an image of this shape).

    Counted on 16 x 16 points a patch, so that boxes that overlap count once.
    """
    y = crop_4[0] + (crop_4[2] - crop_4[0]) * (np.arange(16 * grid.height) + 0.5) / (16 * grid.height)
    x = crop_4[1] + (crop_4[3] - crop_4[1]) * (np.arange(16 * grid.width) + 0.5) / (16 * grid.width)
    inside_HW = np.zeros((len(y), len(x)), dtype=np.bool_)
    for left, top, width, height in boxes:
        rows = (y >= top / shape[0]) & (y < (top + height) / shape[0])
        columns = (x >= left / shape[1]) & (x < (left + width) / shape[1])
        inside_HW |= rows[:, None] & columns[None, :]
    return inside_HW.reshape(grid.height, 16, grid.width, 16).mean(axis=(1, 3)).ravel()


def strategies() -> list[tuple[str, Any]]:
    """(name, masking): all hide the same number of patches of every image."""
    report = partial(ReportMasking.Config, name="kdm+sdm", ratio=RATIO, on="input")
    return [
        ("uniform", UniformMasking(UniformMasking.Config(ratio=RATIO))),
        ("block", BlockMasking(BlockMasking.Config(ratio=RATIO))),
        ("anatomy", AnatomyMasking(AnatomyMasking.Config(of="both", ratio=RATIO))),
        ("attention", ReportMasking(report())),
        ("attention x prior", ReportMasking(report(prior="multiply"))),
    ]


def lung_lift(run_dir: str, rows: Sequence[Mapping[str, Any]], num_bootstrap: int = 1000, seed: int = 0) -> LungLift:
    """Lung lift of each strategy with the trained and the untrained weights of a MedIM run, intervals over patients.

    ValueError where the run aligns no words with patches, or has no checkpoint.
    """
    runs = {"trained": load_run(run_dir), "untrained": load_run(run_dir, trained=False)}
    run = runs["trained"]
    if problem := ModelMaps.of_no_use(run.objective):
        raise ValueError(problem)
    crop = build_crop(run.config)
    reports = report_encoder(run.config, run.shards)
    found: dict[str, list[NDArray[np.float64]]] = {}
    for first in range(0, len(rows), _BATCH):
        some = rows[first : first + _BATCH]
        columns, text = centre_columns(some, crop, reports)
        batch = to_batch(columns, crop.views, torch.device("cpu"))
        attention = {name: ModelMaps(_ready(loaded))(batch, text).float() for name, loaded in runs.items()}
        for name, lifts_B2 in _judge(some, columns, text, run.objective.encoder.grid, attention, seed).items():
            found.setdefault(name, []).append(lifts_B2)
    patients = [row["patient_id"] for row in rows]
    lifts = {}
    for name, blocks in found.items():
        values_K2 = np.concatenate(blocks)
        estimate = bootstrap(partial(mean, values_K2[:, 0]), patients, num_bootstrap, seed)
        lifts[name] = (estimate, float(values_K2[:, 1].mean()))
    return LungLift(num_images=len(rows), num_patients=len(set(patients)), lifts=lifts)


def _ready(run: LoadedRun) -> Any:
    assert isinstance(run.objective, torch.nn.Module)
    return run.objective.eval()


def _judge(
    rows: Sequence[Mapping[str, Any]],
    columns: Columns,
    text: TextRows,
    grid: Grid,
    attention: Mapping[str, Tensor],
    seed: int,
) -> dict[str, NDArray[np.float64]]:
    """strategy -> [B, 2]: lift and share of fallbacks of each image, mean over draws."""
    samples, _ = centre_samples(columns, text, seed)
    inside_BN = np.stack(
        [
            lung_shares(row["boxes"], decode_gray(row["image"], row["image_id"]).shape, columns[BOX][i], grid)
            for i, row in enumerate(rows)
        ]
    )
    uniform_B = inside_BN.mean(axis=1)
    text_columns = {name: torch.from_numpy(np.ascontiguousarray(column)) for name, column in text.columns.items()}
    totals: dict[str, NDArray[np.float64]] = {}
    for epoch in range(_NUM_DRAWS):
        draws = Draws.of(seed, np.full(len(rows), epoch), samples.image_ids)
        for name, masking in strategies():
            planned = {key: torch.from_numpy(value) for key, value in masking.plan(samples, grid, draws).items()}
            for weights in attention if masking.needs_attention else ("",):
                masks = masking.resolve(text_columns | planned, attention[weights] if weights else None)
                for s, mask in enumerate(masking.names):
                    hidden_BN = masks.hidden_SBN[s].numpy()
                    lift_B = (hidden_BN * inside_BN).sum(axis=1) / hidden_BN.sum(axis=1) / uniform_B
                    kind = mask if mask == name else f"{mask}: {name}"
                    key = f"{kind}, {weights}" if weights else kind
                    numbers_B2 = np.stack([lift_B, masks.fallback_SB[s].numpy()], axis=1) / _NUM_DRAWS
                    totals[key] = totals.get(key, np.zeros((len(rows), 2))) + numbers_B2
    return totals


def main() -> None:
    """Prints a table; --out writes it as JSON."""
    parser = argparse.ArgumentParser(prog="python -m medim_ray.probes.lung_lift", description=__doc__)
    parser.add_argument("run", help="folder of a MedIM run")
    parser.add_argument("csv", help=f"table with image_id, patient_id, file, {', '.join(BOX_COLUMNS)}")
    parser.add_argument("--image-root", default="", help="folder of the column `file`; the table's by default")
    parser.add_argument("--report-column", default="notes")
    parser.add_argument("--out", default="", help="JSON file, any fsspec URL")
    args = parser.parse_args()
    rows = read_rows(args.csv, args.image_root or args.csv.rpartition("/")[0] or ".", args.report_column)
    result = lung_lift(args.run, rows)
    table = Table(
        title=f"Lung lift at ratio {RATIO}: {result.num_images} images of {result.num_patients} patients with a report"
    )
    for heading in ("strategy", "lung lift [95 % over patients]", "fallback"):
        table.add_column(heading, no_wrap=True)
    for name, (lift, share) in result.lifts.items():
        low, high = lift.interval()
        table.add_row(name, f"{lift.value:.3f} [{low:.3f}, {high:.3f}]", f"{share:.0%}")
    Console().print(table)
    if args.out:
        with fsspec.open(args.out, "w", encoding="utf-8") as file:
            file.write(json.dumps(result.to_json(), indent=1) + "\n")


if __name__ == "__main__":
    main()
