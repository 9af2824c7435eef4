"""`medim-ray masks`: what each masking strategy sees and hides on some images of a run, as one HTML file.

Images, heat maps, hidden patches and outlines are layers of inline SVG over one copy of the image. No Ray: few images.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import cv2
import fsspec
import jinja2
import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from medim_ray.data.collate import to_batch
from medim_ray.data.rows import decode_gray
from medim_ray.data.texts import TextRows
from medim_ray.data.transforms import cut
from medim_ray.masking.anatomy import AnatomyMasking
from medim_ray.masking.base import Masks
from medim_ray.masking.dino_report import DinoReportMasking
from medim_ray.masking.report import SENTENCE, ReportMasking
from medim_ray.masking.uniform import UniformMasking
from medim_ray.objectives.pixels import IMAGE_VIEW
from medim_ray.probes.localise import ModelMaps
from medim_ray.probes.rows import Columns, RowReader, centre_columns, centre_samples, list_rows, work_items
from medim_ray.probes.truth import crop_mask
from medim_ray.studies.figures import outline
from medim_ray.studies.panels import Panel, heat_uri, picture_pixels, picture_uri
from medim_ray.studies.phrases import Phrases, phrases
from medim_ray.train.build import build_crop, build_masking, needs_text, report_encoder
from medim_ray.train.runs import LoadedRun, load_run
from medim_ray.train.snapshots import snapshot_run
from medim_ray.types import BOX

_SHOWN_SIZE = 256  # pixels of the image in the page; the model's crop may be smaller
_SHEET_INCHES = 1.6  # a panel of a contact sheet
_TITLES = {"kdm": "KDM", "sdm": "SDM", "anatomy_sentence": "anatomy of a sentence"}
_SPLIT_ORDER = {"test": 0, "val": 1, "train": 2}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One image. outlines: (finding, SVG path in per mille of the side) of the truth, where known.

    sentence: what SDM drew, '' without text; phrases: the maps of each mention and sentence, None without text.
    """

    image: str
    split: str
    outlines: Sequence[tuple[str, str]]
    sentence: str
    phrases: Phrases | None
    panels: Sequence[Panel]


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """ratios: strategy -> mean share hidden over the entries. note: what is not shown."""

    grid_width: int
    grid_height: int
    entries: Sequence[Entry]
    ratios: Mapping[str, float]
    checkpoint: str
    step: int
    note: str

    @property
    def has_truth(self) -> bool:
        """Lesions are outlined."""
        return any(entry.outlines for entry in self.entries)

    @property
    def has_words(self) -> bool:
        """Words of reports are shown."""
        return any(entry.phrases or entry.sentence for entry in self.entries)


def templates() -> jinja2.Environment:
    """The page templates; everything put into them is escaped."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader("medim_ray.studies"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def write_gallery(run_dir: str, *, num: int = 16, out: str = "masks.html", text: bool = True) -> str:
    """Writes the gallery of `num` images (all, where there are fewer) to `out`, any fsspec URL; returns `out`.

    text: show mentions and sentences of the reports. ValueError: no run, no checkpoint, num below 1.
    """
    if num < 1:
        raise ValueError(f"num={num}: a gallery shows at least 1 image")
    page = templates().get_template("masks.html.j2").render(gallery=make_gallery(load_run(run_dir), num, text))
    with fsspec.open(out, "w", encoding="utf-8") as file:
        file.write(page)
    return out


def make_gallery(run: LoadedRun, num: int, text: bool = True) -> Gallery:
    """The gallery's content: held-out images first, in the order of the shards, masks of epoch 0."""
    config = run.config
    reports = None
    if needs_text(config):
        reports = report_encoder(config, run.shards)
    crop = build_crop(config)
    rows = _rows(run, num)
    columns, encoded = centre_columns(rows, crop, reports)
    attention_BWN, sees = None, _sees(run)
    if not ModelMaps.of_no_use(sees):
        batch = to_batch(columns, crop.views[:1], torch.device("cpu"))
        first_crops_BCHW = batch.views[crop.views[0].name][: len(rows)]
        attention_BWN = ModelMaps(sees)(replace(batch, views={IMAGE_VIEW: first_crops_BCHW}), encoded)
    strategies = _strategies(run, has_attention=attention_BWN is not None)
    layers, ratios = _layers(run, strategies, columns, encoded, attention_BWN)
    grid = run.objective.encoder.grid
    size = crop.views[0].size
    note = "" if text or reports is None else "The words of the reports are not shown (text=false)."
    spoken: list[Phrases | None] = [None] * len(rows)
    if text and reports is not None:
        attention = None if attention_BWN is None else attention_BWN.float().cpu().numpy()
        spoken = [
            phrases(row, reports, columns, encoded, i, grid, None if attention is None else attention[i])
            for i, row in enumerate(rows)
        ]
    entries = [
        Entry(
            image=_image_uri(row, columns[BOX][i]),
            split=row["split"],
            outlines=_outlines(row, columns[BOX][i], size),
            sentence=_sentence(row, layers, i) if text else "",
            phrases=spoken[i],
            panels=[panel for panels in layers.panels for panel in panels[i]],
        )
        for i, row in enumerate(rows)
    ]
    return Gallery(
        grid_width=grid.width,
        grid_height=grid.height,
        entries=entries,
        ratios=ratios,
        checkpoint=run.checkpoint,
        step=run.step,
        note=note,
    )


def contact_sheet(entry: Entry) -> bytes:
    """One image of the gallery with its panels side by side, as a PNG; no word of its report."""
    figure = Figure(figsize=(_SHEET_INCHES * (1 + len(entry.panels)), _SHEET_INCHES * 1.15), layout="constrained")
    every = figure.subplots(1, 1 + len(entry.panels), squeeze=False)[0]
    image = picture_pixels(entry.image)
    extent = (0, 1, 1, 0)
    for axes in every:
        axes.imshow(image, cmap="gray", extent=extent)
        axes.set_axis_off()
    every[0].set_title(entry.split, fontsize=8)
    for axes, panel in zip(every[1:], entry.panels, strict=True):
        share = "" if panel.hidden_HW is None else f", {panel.ratio:.0%}"
        axes.set_title(f"{panel.title}{share}", fontsize=8)
        if panel.heat:
            axes.imshow(picture_pixels(panel.heat), extent=extent)
        if panel.hidden_HW is not None:
            veil_HW4 = np.zeros((*panel.hidden_HW.shape, 4))
            veil_HW4[panel.hidden_HW] = (0.54, 0.58, 0.64, 1.0)
            axes.imshow(veil_HW4, extent=extent, interpolation="nearest")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=128)
    return buffer.getvalue()


def _sees(run: LoadedRun) -> Any:
    """The objective whose attention guides the masks: the run's own, or that of the run its snapshots are of."""
    of_run = snapshot_run(run.config)
    return load_run(of_run).objective if of_run else run.objective


def _rows(run: LoadedRun, num: int) -> list[dict[str, Any]]:
    every = list_rows(run.shards)
    order = sorted(range(len(every)), key=lambda i: _SPLIT_ORDER.get(every.splits[i], 3))
    chosen = every.take(order[:num])
    reader = RowReader.of(run.shards, "image_id", "image", "split", "report", "sentences", "truth")
    found: dict[int, dict[str, Any]] = {}
    for item in work_items(chosen):
        found.update(zip(item["positions"], reader(item), strict=True))
    return [found[i] for i in range(len(chosen))]


def _strategies(run: LoadedRun, has_attention: bool) -> list[tuple[str, Any]]:
    """(remark, masking): the run's own, both report-guided ones where the run can make maps, the anatomy prior where it
    reads reports, and uniform as control."""
    config = run.config.masking
    own: Any = build_masking(run.config)
    if isinstance(config, ReportMasking.Config):  # whatever training took it from, here the attention is at hand
        own = ReportMasking(replace(config, attention="step", snapshot_every=0, snapshot_run=""))
    strategies: list[tuple[str, Any]] = [("", own)] if has_attention or not own.needs_attention else []
    if has_attention and not isinstance(run.config.masking, ReportMasking.Config):
        strategies.append(("not used in training", ReportMasking(ReportMasking.Config())))
    if needs_text(run.config) and not isinstance(run.config.masking, AnatomyMasking.Config):
        strategies.append(("not used in training", AnatomyMasking(AnatomyMasking.Config(on="feature"))))
    if not isinstance(run.config.masking, UniformMasking.Config):
        ratio = float(getattr(run.config.masking, "ratio", 0.5))
        strategies.append(("control", UniformMasking(UniformMasking.Config(ratio=ratio))))
    return strategies


@dataclass(frozen=True, kw_only=True)
class _Layers:
    """panels: for each strategy, the panels of each image; sentence_B: what SDM drew, None without SDM."""

    panels: list[list[list[Panel]]]
    sentence_B: NDArray[np.int16] | None


def _layers(
    run: LoadedRun,
    strategies: Sequence[tuple[str, Any]],
    columns: Columns,
    encoded: TextRows,
    attention_BWN: Tensor | None,
) -> tuple[_Layers, dict[str, float]]:
    samples, draws = centre_samples(columns, encoded, run.config.seed)
    samples = replace(samples, steps_B=samples.steps_B + run.step)  # a cold start is over in a trained run
    grid = run.objective.encoder.grid
    sentence_B = None
    panels, ratios = [], {}
    for remark, masking in strategies:
        planned = masking.plan(samples, grid, draws)
        if isinstance(masking, DinoReportMasking) and attention_BWN is not None:
            planned |= masking.attend(planned, [attention_BWN] * len(masking.names))
        sentence_B = planned.get(SENTENCE, sentence_B)
        tensors = {name: torch.from_numpy(np.ascontiguousarray(v)) for name, v in (encoded.columns | planned).items()}
        masks = masking.resolve(tensors, attention_BWN)
        for s, name in enumerate(masking.names):
            title = _TITLES.get(name, name)
            panels.append([_panels(masks, s, i, title, remark, grid.width) for i in range(len(samples))])
            ratios[title] = float(masks.hidden_SBN[s].float().mean())
    return _Layers(panels=panels, sentence_B=sentence_B), ratios


def _panels(masks: Masks, s: int, i: int, title: str, remark: str, grid_width: int) -> list[Panel]:
    """The map of a strategy, where it has one, and what it hides."""
    hidden_N = masks.hidden_SBN[s, i].numpy()
    is_fallback = bool(masks.fallback_SB[s, i])
    panels = []
    if masks.maps_SBN is not None:
        caption = "no word to go by" if is_fallback else remark
        heat = "" if is_fallback else heat_uri(masks.maps_SBN[s, i].float().numpy(), grid_width)
        panels.append(Panel(title=f"{title} map", caption=caption, heat=heat))
    remark = "fallback: random patches" if is_fallback else remark if masks.maps_SBN is None else ""
    panels.append(
        Panel(
            title=f"{title} hides",
            caption=remark,
            hidden_HW=hidden_N.reshape(-1, grid_width),
        )
    )
    return panels


def _image_uri(row: Mapping[str, Any], box_4: NDArray[np.float32]) -> str:
    return picture_uri(".jpg", cut(decode_gray(row["image"], row["image_id"]), box_4, _SHOWN_SIZE))


def _outlines(row: Mapping[str, Any], box_4: NDArray[np.float32], size: int) -> list[tuple[str, str]]:
    found = []
    for lesion in row["truth"]:
        mask_HW = crop_mask(lesion["mask"], box_4, max(size, _SHOWN_SIZE))
        contours, _ = cv2.findContours(mask_HW.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
        if contours:
            found.append((lesion["finding"], outline(contours, mask_HW.shape[0])))
    return found


def _sentence(row: Mapping[str, Any], layers: _Layers, i: int) -> str:
    if layers.sentence_B is None or layers.sentence_B[i] < 0:
        return ""
    return str(row["sentences"][int(layers.sentence_B[i])])
