"""Options of `medim-ray probe`: which tasks, on what, by which encoders, and how what is trained is trained.

Downstream options only: a run's identity (schema.RunConfig) knows none of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from medim_ray.config.loader import option

DEFAULT_TASKS = ("labels", "localise", "retrieve", "segment")
PROBE_TASKS = (*DEFAULT_TASKS, "finetune", "generate")
UNCERTAIN = ("ignore", "ones", "zeros")
MIN_BOOTSTRAP = 100  # draws: the ends of a 95 % interval are the third lowest and highest of these
SEGMENT_HEADS = ("linear", "upernet", "setr")


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """Training of what stands on an encoder: AdamW, a cosine after a warm-up, the best of ten looks kept."""

    steps: int = option(300, "optimizer steps at most; ends after three looks without gain", hashed=False)
    batch: int = option(8, "images a step", hashed=False)
    lr: float = option(1e-3, "peak learning rate of the head", hashed=False)
    weight_decay: float = option(0.05, "AdamW weight decay; none on one-dimensional parameters", hashed=False)

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 2:
            raise ValueError(f"steps={self.steps}, batch={self.batch}: at least 1 step of 2 images")
        if not self.lr > 0 or not self.weight_decay >= 0:
            raise ValueError(f"lr={self.lr}, weight_decay={self.weight_decay}: above 0, and at least 0")


@dataclass(frozen=True, kw_only=True)
class TuneConfig(FitConfig):
    """The same, of encoders too."""

    layer_decay: float = option(
        0.75, "learning rate factor from a layer of a trained encoder to the one below", hashed=False
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay={self.layer_decay}: must lie in (0, 1], e.g. 0.75")


@dataclass(frozen=True, kw_only=True)
class SegmentConfig:
    """What is segmented and by which heads."""

    heads: tuple[str, ...] = option(
        ("linear",),
        "linear: a ridge regression on frozen patch tokens; upernet, setr: trained on maps of four depths",
        hashed=False,
    )
    targets: tuple[str, ...] = option(
        ("pneumothorax", "any lesion"),
        "findings of the shards' masks, any lesion, or parts of the body, by side and zone if named: left upper lung",
        hashed=False,
    )
    tune_encoder: bool = option(False, "train the encoder below each head too, with layer decay", hashed=False)
    tune: TuneConfig = field(default_factory=TuneConfig, metadata={"hashed": False})

    def __post_init__(self) -> None:
        if unknown := [name for name in self.heads if name not in SEGMENT_HEADS]:
            raise ValueError(f"heads: {unknown[0]!r} is none of {', '.join(SEGMENT_HEADS)}")
        if not self.heads or not self.targets or len(set(self.targets)) < len(self.targets):
            raise ValueError(f"heads={list(self.heads)}, targets={list(self.targets)}: at least one, each once")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Classification by an encoder that is trained with its head, on the folds and shares of the frozen probe."""

    num_seeds: int = option(3, "trainings of each fold, of which the metrics are averaged", hashed=False)
    tune: TuneConfig = field(default_factory=TuneConfig, metadata={"hashed": False})

    def __post_init__(self) -> None:
        if self.num_seeds < 1:
            raise ValueError(f"num_seeds={self.num_seeds}: at least 1")


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Reports from patch tokens by a causal language model."""

    lm: str = option("", "any causal language model of Hugging Face, by id or folder; asked for by task generate")
    lora_rank: int = option(0, "rank of LoRA updates of the language model (package peft); 0: it stays frozen")
    num_tokens: int = option(112, "tokens of a report, at most: learned from and written")
    num_images: int = option(200, "held-out images that reports are written for, evenly spread")
    fit: FitConfig = field(default_factory=FitConfig)

    def __post_init__(self) -> None:
        if self.lora_rank < 0 or self.num_tokens < 1 or self.num_images < 2:
            given = f"lora_rank={self.lora_rank}, num_tokens={self.num_tokens}, num_images={self.num_images}"
            raise ValueError(f"{given}: at least 0, 1 and 2")


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """Frozen-feature probes."""

    tasks: tuple[str, ...] = option(
        DEFAULT_TASKS,
        "labels: linear, k-NN and ridge probes; localise: word-to-patch maps; retrieve: image-report retrieval and "
        "zero-shot classification; segment: heads on patch tokens (probe.segment); finetune: labels by trained "
        "encoders; generate: reports by a language model (probe.generate)",
        hashed=False,
    )
    labels: tuple[str, ...] = option(
        (),
        "label columns of the shards, or age_group; empty: view, every 0/1 label and every label of numbers",
        hashed=False,
    )
    uncertain: dict[str, str] = option(
        {},
        "of 0/1 labels with uncertain values (-1, CheXpert): label -> ones, zeros or ignore; all: for those not named; "
        "without any: ignore",
        hashed=False,
    )
    encoders: tuple[str, ...] = option(
        ("untrained", "pixels"),
        "beside trained, untrained and pixels, which are always there: run:PATH, timm:NAME, hf:ID_OR_FOLDER",
        hashed=False,
    )
    fractions: tuple[float, ...] = option(
        (0.01, 0.1, 1.0), "shares of the labels to learn from beside all, by patient, stratified, nested", hashed=False
    )
    num_draws: int = option(3, "draws of each share below 1", hashed=False)
    cache: str = option("", "folder of cached features, any fsspec URL; empty: RUN/features, off: none", hashed=False)
    segment: SegmentConfig = field(default_factory=SegmentConfig, metadata={"hashed": False})
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig, metadata={"hashed": False})
    generate: GenerateConfig = field(default_factory=GenerateConfig, metadata={"hashed": False})
    num_bootstrap: int = option(1000, "bootstrap draws over patients behind each 95 % interval", hashed=False)
    num_folds: int = option(5, "patient-grouped folds where fewer than 1,000 images carry the label", hashed=False)
    seed: int = option(0, "seed of folds, shares and bootstrap", hashed=False)

    def __post_init__(self) -> None:
        if self.num_folds < 2 or self.num_bootstrap < MIN_BOOTSTRAP:
            given = f"num_folds={self.num_folds}, num_bootstrap={self.num_bootstrap}"
            raise ValueError(f"{given}: at least 2 and {MIN_BOOTSTRAP}")
        if unknown := [name for name in self.tasks if name not in PROBE_TASKS]:
            raise ValueError(f"probe.tasks: {unknown[0]!r} is none of {', '.join(PROBE_TASKS)}")
        if ("generate" in self.tasks) != bool(self.generate.lm):
            raise ValueError(
                f"probe.generate.lm={self.generate.lm!r}, probe.tasks={list(self.tasks)}: the task generate and its "
                "language model come together, e.g. probe.generate.lm=gpt2"
            )
        if not self.tasks:
            raise ValueError(f"probe.tasks is empty: name some of {', '.join(PROBE_TASKS)}")
        for name in self.encoders:
            kind, _, where = name.partition(":")
            if name not in ("trained", "untrained", "pixels") and (kind not in ("run", "timm", "hf") or not where):
                raise ValueError(
                    f"probe.encoders: {name!r} is none of untrained, pixels, run:PATH, timm:NAME, hf:ID_OR_FOLDER"
                )
        for label, policy in self.uncertain.items():
            if policy not in UNCERTAIN:
                raise ValueError(f"probe.uncertain: {label}: {policy!r} is none of {', '.join(UNCERTAIN)}")
        for fraction in self.fractions:
            if not 0 < fraction <= 1:
                raise ValueError(f"probe.fractions: {fraction} must lie in (0, 1], as in [0.01, 0.1, 1.0]")
        if not self.fractions or self.num_draws < 1:
            raise ValueError(f"probe.fractions={list(self.fractions)}, probe.num_draws={self.num_draws}: at least one")
