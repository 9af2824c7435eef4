"""From a RunConfig to the pieces of a run: plan, reader, objective. The same calls serve training, probes and exports.

The driver builds the reader of the decoding actors, each worker its own objective; no weight is shipped.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from medim_ray.config.schema import RunConfig
from medim_ray.data.plan import RowGroup, StreamPlan
from medim_ray.data.reader import BlockReader
from medim_ray.data.rows import ShardFiles
from medim_ray.data.shards import TOKENIZER, ShardSet
from medim_ray.data.texts import ReportEncoder
from medim_ray.data.transforms import CROPS, Crop
from medim_ray.masking import MASKINGS
from medim_ray.masking.base import Masking
from medim_ray.masking.dino_report import DinoReportMasking
from medim_ray.models.text import TextEncoder, load_tokenizer
from medim_ray.models.vit import ImageEncoder
from medim_ray.objectives import OBJECTIVES
from medim_ray.objectives.base import Objective, Parts
from medim_ray.reports.mesh import Vocabulary
from medim_ray.types import Grid

_BLOCKS = 12  # of the stream that are alive, for each decoding actor and each worker
HEADS = ("init_head", "init_ibot_head")  # options of an objective that name files of first weights


def stream_bytes(config: RunConfig) -> int:
    """What the stream of a run has on its way at a time, in bytes of pixels: a smaller object store lets its actors
    wait for room. With RAD-DINO's crops of 518 px a sample is 0.6 MB, and a block of 64 rows 39 MB."""
    sample = sum(view.num_crops * view.size**2 for view in build_crop(config).views)
    rows = config.data.window_steps * config.train.global_batch // config.granules_per_step
    return _BLOCKS * (config.data.num_actors + config.train.max_workers) * rows * sample


def stream_plan(config: RunConfig, shards: ShardSet) -> StreamPlan:
    """The plan of the run over the shards' training split."""
    files = shards.files(config.data.split)
    weights = config.data.weights
    origins = sorted({file.origin for file in files})
    if strange := set(config.data.leave_out) - set(origins):
        raise ValueError(f"data.leave_out names {', '.join(sorted(strange))}; the origins are {', '.join(origins)}")
    origins = [name for name in origins if name not in config.data.leave_out]
    if weights and origins != sorted(weights):
        known = ", ".join(name for name in origins if name) or "none, it is no merged set: see `medim-ray shards merge`"
        raise ValueError(
            f"data.weights names {', '.join(sorted(weights))}; the origins in {config.data.shards}: {known}"
        )
    groups = [
        RowGroup(f, i, rows, origins.index(file.origin) if weights else 0)
        for f, file in enumerate(files)
        if file.origin not in config.data.leave_out
        for i, rows in enumerate(file.row_groups)
    ]
    if not groups:
        raise ValueError(f"data.split={config.data.split!r}: {config.data.shards} has no rows in it")
    total = sum(group.num_rows for group in groups)
    num_kept = config.data.num_images or max(1, round(config.data.fraction * total))
    if num_kept > total:
        raise ValueError(f"data.num_images={num_kept}: {config.data.shards} has {total} images to train on")
    return StreamPlan(
        groups,
        num_kept=num_kept,
        seed=config.seed,
        global_batch=config.train.global_batch,
        granules_per_step=config.granules_per_step,
        shuffle_window=config.data.shuffle_window,
        window_steps=config.data.window_steps,
        weights=[weights[name] for name in origins] if weights else (),
    )


def build_crop(config: RunConfig) -> Crop:
    """The views of a sample; ValueError where they are not what the objective looks at."""
    crop: Crop = CROPS[config.crop.name](config.crop, config.encoder.image_size)
    wanted = OBJECTIVES[config.objective.name].view
    if crop.views[0].name != wanted:
        fits = "xray or multi_crop" if wanted == "global" else "pad_crop"
        raise ValueError(
            f"crop.name={config.crop.name}: makes {crop.views[0].name} views, objective.name={config.objective.name} "
            f"looks at {wanted} views; use crop.name={fits}"
        )
    return crop


def build_masking(config: RunConfig) -> Masking:
    """The masking strategy; ValueError where it needs reports and the objective has no text encoder."""
    masking: Masking = MASKINGS[config.masking.name](config.masking)
    if masking.needs_attention and not OBJECTIVES[config.objective.name].needs_text:
        raise ValueError(
            f"masking.name={config.masking.name} needs the attention of a text encoder, which "
            f"objective.name={config.objective.name} lacks: use masking.name=uniform or objective.name=medim"
        )
    OBJECTIVES[config.objective.name].check_masking(masking)
    if isinstance(config.masking, DinoReportMasking.Config) and getattr(config.crop, "flip_prob", 0.0) > 0:
        raise ValueError(
            f"crop.flip_prob={config.crop.flip_prob}: masking.name=dinov2_report hides the sides that the report "
            "tells, and a flip exchanges them; use crop.flip_prob=0"
        )
    return masking


def needs_text(config: RunConfig) -> bool:
    """Reports are tokenised and tagged where the objective or the masking reads them."""
    return bool(OBJECTIVES[config.objective.name].needs_text or build_masking(config).needs_text)


def open_tokenizer(config: RunConfig, shards: ShardSet) -> Any:
    """The tokenizer of the run: the one stored with the shards, or the text encoder's own."""
    folder = f"{shards.root}/{TOKENIZER}"
    if not shards.fs.exists(folder):
        return load_tokenizer(config.text, "")
    with tempfile.TemporaryDirectory(prefix="medim-ray-") as local:
        for file in shards.fs.ls(folder, detail=False):
            shards.fs.get_file(file, str(Path(local) / Path(file).name))
        return load_tokenizer(config.text, local)


def check_ratio(config: RunConfig, grid: Grid) -> None:
    """ValueError where a mask of the given ratio would hide no patch of the grid, or all of them."""
    ratio, num = getattr(config.masking, "ratio", None), grid.num_patches
    if ratio is None:
        return
    hidden = round(num * ratio) if config.masking.name == "uniform" else int(num * ratio)
    if 0 < hidden < num:
        return
    works = (1.1 if not hidden else num - 0.9) / num
    raise ValueError(
        f"masking.ratio={ratio}: hides {hidden} of the {num} patches of encoder.image_size="
        f"{config.encoder.image_size}; at least one must be hidden and one seen, e.g. masking.ratio={works:.3f}"
    )


def check_crops(config: RunConfig, grid: Grid) -> None:
    """ValueError where local crops can't be cut into whole patches (ImageEncoder checks encoder.image_size)."""
    patch_size, local_size = config.encoder.image_size // grid.width, getattr(config.crop, "local_size", 0)
    if local_size % patch_size:
        works = max(1, round(local_size / patch_size)) * patch_size
        raise ValueError(
            f"crop.local_size={local_size}: must be a multiple of the patch size {patch_size} of "
            f"{config.encoder.name}; use {works}"
        )


def report_encoder(config: RunConfig, shards: ShardSet) -> ReportEncoder:
    """Tokens and mentions of the run's reports; ValueError where text.mesh can't be read."""
    vocabulary = None
    if config.text.mesh:
        try:
            vocabulary = Vocabulary.default().merged(Vocabulary.from_nlm(config.text.mesh))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"text.mesh={config.text.mesh}: {error}; give NLM's desc20xx.xml, or leave it empty"
            ) from None
    return ReportEncoder(open_tokenizer(config, shards), config.text.num_tokens, vocabulary)


def make_reader(config: RunConfig, shards: ShardSet) -> BlockReader:
    """The reader of the decoding actors; it holds nothing that loads torch or timm when it is unpickled there."""
    grid, files = ImageEncoder.grid_of(config.encoder), shards.files(config.data.split)
    check_ratio(config, grid)
    check_crops(config, grid)
    reports = None
    if needs_text(config):
        reports = report_encoder(config, shards)
    return BlockReader(
        stream_plan(config, shards),
        ShardFiles(shards.root, [f.path for f in files], [f.bytes for f in files], shards.arrow_fs()),
        build_crop(config),
        build_masking(config),
        grid,
        reports,
        config.data.max_broken_ratio,
        config.data.decode,
    )


def build_objective(config: RunConfig, shards: ShardSet) -> Objective:
    """The objective with its encoders, initialised from `seed`; call it once a process."""
    torch.manual_seed(config.seed)
    cls = OBJECTIVES[config.objective.name]
    text = None
    if cls.needs_text:
        text = TextEncoder(config.text, vocab_size=len(open_tokenizer(config, shards)))
    parts = Parts(
        encoder=ImageEncoder(config.encoder),
        text=text,
        masking=build_masking(config),
        num_steps=config.train.steps,
        global_batch=config.train.global_batch,
    )
    objective: Objective = cls(config.objective, parts)
    return objective
