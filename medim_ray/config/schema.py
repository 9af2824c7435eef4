"""RunConfig, the tree behind `medim-ray pretrain`, and the groups that have no component to own them.

Components (crop, encoder, text, masking, objective) own their `Config`; here they are only put together and checked
against each other. Components never see RunConfig.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from medim_ray.config.loader import component, option
from medim_ray.data.plan import StreamPlan
from medim_ray.data.transforms import CROPS
from medim_ray.masking import MASKINGS
from medim_ray.models.text import TextEncoder
from medim_ray.models.vit import ImageEncoder
from medim_ray.objectives import OBJECTIVES


@dataclass(frozen=True, kw_only=True)
class RunGroup:
    """Where a run lives and which cluster it joins; never part of the run's identity."""

    dir: str = option("", "folder or fsspec URL of the run; required by `pretrain`")
    ray_address: str = option("", "Ray cluster to join, e.g. auto or ray://host:10001; empty: start Ray here")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The optimizer steps of a run and how they are spread over workers. Schedules are functions of the step."""

    steps: int = option(100, "optimizer steps of the whole run")
    stop_after: int | None = option(
        None,
        "commit a checkpoint after this step and end with success; the same command goes on",
        hashed=False,
        fixed=False,
    )
    num_workers: int | tuple[int, int] = option(
        1, "Ray Train workers (data-parallel ranks); [least, most]: as many as the cluster has at the time", fixed=False
    )
    zero: int | Literal["auto"] = option(
        0, "DeepSpeed ZeRO stage, 0 to 3; auto: the lowest one that fits by the planner's estimate", fixed=False
    )
    device_memory_gb: float | None = option(
        None, "memory of a worker's device, for train.zero=auto; null: as seen from here", hashed=False, fixed=False
    )
    global_batch: int = option(8, "images per optimizer step, over all workers and accumulation steps")
    micro_batch: int | None = option(
        None, "images per forward and worker; null: global_batch / num_workers", fixed=False
    )
    precision: Literal["fp32", "bf16", "fp16"] = option(
        "fp32", "number format of parameters and activations on the device; fp16: with a dynamic loss scale, GPUs only"
    )
    offload_optimizer: bool = option(
        False,
        "fp32 parameters and AdamW's moments in the host's memory, stepped there; GPUs with zero=1, 2 or 3",
        hashed=False,
        fixed=False,
    )
    activation_checkpointing: bool = option(
        False,
        "transformer blocks (of a ResNet: stages) keep only their inputs and are computed again in the backward pass",
        hashed=False,
        fixed=False,
    )
    compile: bool = option(
        False, "torch.compile of transformer blocks but an encoder's last; not with zero=3", fixed=False
    )
    lr: float = option(1e-3, "peak learning rate")
    min_lr: float = option(1e-6, "learning rate at the last step")
    warmup_ratio: float = option(0.1, "share of the steps with linear warm-up")
    weight_decay: float = option(0.05, "AdamW weight decay; none on biases, norms and other one-dimensional parameters")
    weight_decay_end: float | None = option(
        None, "weight decay at the last step, half a cosine from weight_decay (DINOv2: 0.04 to 0.4); null: constant"
    )
    betas: tuple[float, float] = option((0.9, 0.95), "AdamW moments")
    clip_norm: float = option(1.0, "gradient norm that is clipped to; 0: no clipping")
    clip_by: Literal["global", "part"] = option(
        "global", "global: by the norm of all gradients; part: each submodel by its own norm, as DINOv2 does"
    )
    checkpoint_every: int = option(
        50, "steps between checkpoints; one is always committed at the end", hashed=False, fixed=False
    )
    keep_last: int = option(2, "newest checkpoints that are kept", hashed=False, fixed=False)
    max_pending_saves: int = option(
        1,
        "checkpoints that may be on their way to the storage while training goes on (each is a copy of the state in "
        "memory); a save beyond waits",
        hashed=False,
        fixed=False,
    )
    storage_patience_s: float = option(
        180.0,
        "seconds in which a storage of run.dir that fails for a moment (503, cut connections) is asked again",
        hashed=False,
        fixed=False,
    )
    use_gpu: bool = option(False, "one GPU per worker", hashed=False, fixed=False)
    cpus_per_worker: float = option(1.0, "logical CPUs of Ray per worker", hashed=False, fixed=False)
    max_failures: int = option(
        3, "losses of workers or nodes after which the run ends with the error", hashed=False, fixed=False
    )
    max_preemptions: int = option(
        -1, "preemptions after which the run ends; -1: no bound, they are nobody's fault", hashed=False, fixed=False
    )
    max_errors: int = option(
        3, "times that an exception may stop the same step before the run ends with it", hashed=False, fixed=False
    )
    hang_timeout_s: float = option(
        600.0, "seconds of silence after which a worker counts as hung, and is replaced", hashed=False, fixed=False
    )
    resize_every_s: float = option(
        60.0, "seconds between looks for more workers, where num_workers is a range", hashed=False, fixed=False
    )
    on_bad_step: Literal["stop", "skip", "rewind"] = option(
        "stop",
        "loss or gradient not finite, or a spike: stop the run; skip: leave the global batch out; rewind: go back to "
        "the newest checkpoint, then leave it out",
        hashed=False,
        fixed=False,
    )
    spike_factor: float = option(
        0.0,
        "a gradient norm over this many medians of the last 64 is a bad step; 0: none is",
        hashed=False,
        fixed=False,
    )

    def __post_init__(self) -> None:
        if self.min_workers < 1 or self.min_workers > self.max_workers:
            raise ValueError(f"num_workers={self.num_workers}: a number from 1 on, or [least, most]")
        for key in ("steps", "global_batch", "checkpoint_every", "keep_last", "max_pending_saves", "max_errors"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)}: must be at least 1")
        if self.zero not in (0, 1, 2, 3, "auto"):
            raise ValueError(f"zero={self.zero}: ZeRO stages are 0, 1, 2 and 3, or auto")
        if self.device_memory_gb is not None and not self.device_memory_gb > 0:
            raise ValueError(f"device_memory_gb={self.device_memory_gb}: must be above 0, e.g. 80")
        if self.stop_after is not None and self.stop_after < 1:
            raise ValueError(f"stop_after={self.stop_after}: must be at least 1, or null for no stop")
        for num in self.worker_counts:
            share, rest = divmod(self.global_batch, num)
            if rest:
                common = math.lcm(*self.worker_counts)
                fix = f"use global_batch={_up(self.global_batch, common)}"
                if common > _MAX_COMMON:
                    fix = f"no usable batch divides by every count of num_workers={list(self.worker_counts)[:3]}…; "
                    fix += f"use a narrower range, e.g. [{self.min_workers}, {self.min_workers + 1}]"
                raise ValueError(
                    f"global_batch={self.global_batch} is not divisible by num_workers={num}: every worker takes the "
                    f"same share; {fix}"
                )
            if self.micro_batch is not None and (self.micro_batch < 1 or share % self.micro_batch):
                raise ValueError(
                    f"micro_batch={self.micro_batch} does not divide the {share} images of a worker "
                    f"(global_batch={self.global_batch} / num_workers={num}): use a divisor of {share}"
                )
        if not self.hang_timeout_s > 0 or not self.resize_every_s > 0:
            raise ValueError(f"hang_timeout_s={self.hang_timeout_s}, resize_every_s={self.resize_every_s}: above 0")
        if self.spike_factor and self.spike_factor <= 1:
            raise ValueError(f"spike_factor={self.spike_factor}: must be above 1, e.g. 10, or 0 for none")
        if self.max_preemptions < -1:
            raise ValueError(f"max_preemptions={self.max_preemptions}: a number from 0 on, or -1 for no bound")
        for key in ("lr", "min_lr", "weight_decay", "clip_norm", "max_failures", "storage_patience_s"):
            if not getattr(self, key) >= 0:
                raise ValueError(f"{key}={getattr(self, key)}: must be at least 0")
        if self.clip_by == "part" and not self.clip_norm:
            raise ValueError("clip_by=part with clip_norm=0: nothing is clipped; give the norm, e.g. clip_norm=3.0")
        self._check_device()
        if self.weight_decay_end is not None and not self.weight_decay_end >= 0:
            raise ValueError(f"weight_decay_end={self.weight_decay_end}: must be at least 0, or null for a constant")
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ValueError(f"betas={list(self.betas)}: each must lie in [0, 1)")
        if not self.cpus_per_worker > 0:
            raise ValueError(f"cpus_per_worker={self.cpus_per_worker}: must be above 0")
        if not 0.0 <= self.warmup_ratio <= 1.0:
            raise ValueError(f"warmup_ratio={self.warmup_ratio}: a share of the steps, between 0 and 1")

    def _check_device(self) -> None:
        """What a device or a stage cannot do is refused: nothing is left out in silence."""
        if self.precision == "fp16" and not self.use_gpu:
            raise ValueError(
                "precision=fp16 with use_gpu=false: DeepSpeed runs fp16 on GPUs only, CPUs lack its arithmetic; use "
                "precision=bf16, or use_gpu=true"
            )
        if self.offload_optimizer and not self.use_gpu:
            raise ValueError(
                "offload_optimizer=true with use_gpu=false: the optimizer is in the host's memory already; drop it, or "
                "use_gpu=true"
            )
        if self.offload_optimizer and self.zero == 0:
            raise ValueError("offload_optimizer=true with zero=0: DeepSpeed offloads shards; use zero=1, 2, 3 or auto")
        if self.compile and self.zero == 3:
            raise ValueError(
                "compile=true with zero=3: its hooks gather parameters between the operations of a block, which breaks "
                "each graph; use zero=0, 1 or 2, or compile=false"
            )

    @property
    def stage(self) -> int:
        """The ZeRO stage as a number; `auto` is resolved before a run starts."""
        assert self.zero != "auto", "train.zero=auto was not resolved"
        return self.zero

    @property
    def possible_stages(self) -> tuple[int, ...]:
        """The ZeRO stages that `auto` may choose from."""
        least, most = int(self.offload_optimizer), 2 if self.compile else 3
        return tuple(range(least, most + 1))

    @property
    def min_workers(self) -> int:
        """The smallest number of workers that the run may have."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        """The largest number of workers that the run may have."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @property
    def worker_counts(self) -> range:
        """Every number of workers that the run may have."""
        return range(self.min_workers, self.max_workers + 1)

    @property
    def local_micro_batch(self) -> int:
        """Images per forward and worker, at the largest number of workers."""
        return self.micro_batch or self.global_batch // self.max_workers

    @property
    def accumulation(self) -> int:
        """Forwards per optimizer step and worker, at the largest number of workers."""
        return self.global_batch // (self.max_workers * self.local_micro_batch)

    @property
    def last_step(self) -> int:
        """The step at which this process ends: `stop_after`, or the end of the run."""
        return self.steps if self.stop_after is None else min(self.steps, self.stop_after)


@dataclass(frozen=True, kw_only=True)
class TrackConfig:
    """Views of metrics.jsonl; losing them loses nothing."""

    aim: bool = option(True, "write to Aim; metrics.jsonl is written either way")
    aim_repo: str = option("", "Aim repository (folder or aim://host:port); empty: next to the run folder, in .aim")


@dataclass(frozen=True, kw_only=True)
class ValidateConfig:
    """Probes of each committed checkpoint while the run goes on, as Ray tasks of their own."""

    labels: tuple[str, ...] = option(
        (), "label columns that are probed: AUROC of classes by linear and k-NN probes, R2 of numbers"
    )
    retrieve: bool = option(False, "recall at 10 between held-out images and their reports, both ways; needs MedIM")
    segment: tuple[str, ...] = option((), "Dice of targets (probe.segment.targets) by a linear head on patch tokens")
    num_images: int = option(2000, "images that are probed, the first of the shards by a hash of their ids")
    best_by: str = option(
        "mean",
        "which number chooses the checkpoint that is kept: mean (AUROC over the labels of classes), knn_mean, LABEL, "
        "knn_LABEL, r2_LABEL, recall_at_10, dice_TARGET",
    )
    num_cpus: float = option(1.0, "logical CPUs of a validation task; it waits until they are free")

    def __post_init__(self) -> None:
        if self.num_images < 20:
            raise ValueError(f"validate.num_images={self.num_images}: at least 20, to learn from and to judge by")
        if not self.num_cpus > 0:
            raise ValueError(f"validate.num_cpus={self.num_cpus}: must be above 0")
        known = ["mean", "knn_mean"] if self.labels else []
        known += [name for label in self.labels for name in (label, f"knn_{label}", f"r2_{label}")]
        known += ["recall_at_10"] if self.retrieve else []
        known += [f"dice_{target}" for target in self.segment]
        if self.best_by not in known and (self.is_asked or self.best_by != "mean"):
            has = f"what is validated has {', '.join(known)}" if known else "nothing is validated: name validate.labels"
            raise ValueError(f"validate.best_by={self.best_by!r}: {has}")

    @property
    def is_asked(self) -> bool:
        """Something is validated."""
        return bool(self.labels or self.retrieve or self.segment)


@dataclass(frozen=True, kw_only=True)
class MapsConfig:
    """A look at the word-to-patch maps of a run that aligns words with patches, on a fixed small batch."""

    every: int = option(50, "steps between looks, which are written to metrics.jsonl under maps/; 0: none")
    num_images: int = option(32, "images that are looked at: held-out ones with truth where there are any")
    lung_boxes: str = option(
        "", "CSV with boxes of the lungs (medim_ray/probes/README.md): its images are looked at, for lung lift"
    )

    def __post_init__(self) -> None:
        if self.every < 0 or self.num_images < 2:
            raise ValueError(
                f"maps.every={self.every}, maps.num_images={self.num_images}: at least 0 and 2 (an interval needs two)"
            )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything one pretraining run is a function of."""

    seed: int = option(42, "seed of weights, epoch order, crops and masks")
    data: StreamPlan.Config = field(default_factory=StreamPlan.Config)
    crop: Any = component(CROPS, "pad_crop", "how a stored image becomes the views of a sample")
    encoder: ImageEncoder.Config = field(default_factory=ImageEncoder.Config)
    text: TextEncoder.Config = field(default_factory=TextEncoder.Config)
    masking: Any = component(MASKINGS, "uniform", "what is hidden from the encoder or from its features")
    objective: Any = component(OBJECTIVES, "mae", "the loss")
    train: TrainConfig = field(default_factory=TrainConfig)
    validate: ValidateConfig = field(default_factory=ValidateConfig, metadata={"hashed": False, "fixed": False})
    maps: MapsConfig = field(default_factory=MapsConfig, metadata={"hashed": False, "fixed": False})
    run: RunGroup = field(default_factory=RunGroup, metadata={"hashed": False, "fixed": False})
    track: TrackConfig = field(default_factory=TrackConfig, metadata={"hashed": False, "fixed": False})

    def __post_init__(self) -> None:
        granules = self.granules_per_step
        common = math.lcm(*self.train.worker_counts)
        if granules % common:
            raise ValueError(
                f"data.granules_per_step={granules} is not divisible by train.num_workers={self.train.num_workers}: "
                f"granules are dealt in turn; use data.granules_per_step={_up(granules, common)}"
            )
        if self.train.global_batch % granules:
            raise ValueError(
                f"train.global_batch={self.train.global_batch} is not divisible by data.granules_per_step={granules}: "
                f"a global batch is a whole number of granules; use train.global_batch="
                f"{_up(self.train.global_batch, granules)}"
            )

    @property
    def granules_per_step(self) -> int:
        """Granules a global batch; by default the largest of 4, 2, 1 that divides it, or one a worker."""
        if self.data.granules_per_step is not None:
            return self.data.granules_per_step
        common = math.lcm(*self.train.worker_counts)
        for num in (4, 2, 1):
            if self.train.global_batch % num == 0 and num % common == 0:
                return num
        return common


_MAX_COMMON = 100_000  # the least common multiple of the worker counts of a range that can be asked for


def _up(value: int, divisor: int) -> int:
    return -(-value // divisor) * divisor
