"""RAD-DINO: DINOv2's objective on radiographs (DINO + iBOT + KoLeo, student and EMA teacher, 2 + n crops).

Follows PAPERS.md, "DINOv2", and its golden notes. Left out on purpose: crops and masks (data, masking), the optimizer
and gradient clipping (train). Where this leaves DINOv2's code: masks are stratified over the global batch, not a rank's
(masking/block.py); a centre is the mean over all ranks' rows, which DINOv2 divides by the own rank's count (the same
where ranks hold equally many); separate heads have one configuration; KoLeo may be gathered; under bf16 the EMA is
float32 and its source the student's bf16 weights.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from medim_ray.masking.base import Masking
from medim_ray.models.collectives import all_reduce_sum, num_ranks
from medim_ray.models.heads_dino import DinoHead
from medim_ray.models.layouts import MASK_TOKEN
from medim_ray.models.load import load_head
from medim_ray.models.vit import ImageEncoder, MaskToken
from medim_ray.objectives import dino_losses as losses
from medim_ray.objectives.base import OBJECTIVES, ParameterGroup, Parts
from medim_ray.objectives.pixels import mask_warnings
from medim_ray.schedules import cosine, linear_warmup
from medim_ray.types import Batch, StepOutput

NUM_GLOBAL = 2
_SAME = 1e-3  # mean distance of unit features to their nearest neighbours


@dataclass(frozen=True)
class _Targets:
    """What the teacher says: probabilities of the global crops' CLS [2, B, K], of their masked patches [M, K]."""

    cls_2BK: Tensor
    masked_MK: Tensor


@OBJECTIVES.register("rad_dino")
class RadDino(nn.Module):
    """Student against EMA teacher. `encoder` is the TEACHER's (what DINOv2 evaluates and publishes); both start equal.

    batch.views: "global" [2B, 1, H, W] and optionally "local" [nB, 1, h, w], crop-major. The masking gives one mask
    for each global crop (`masking.name: dinov2_block`). Raises ValueError for a masking or an encoder that does not
    fit, and for KoLeo on a single image.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        name: str = "rad_dino"
        head: DinoHead.Config = field(default_factory=DinoHead.Config)
        separate_heads: bool = field(default=False, metadata={"help": "iBOT gets a head of its own"})
        init_head: str = field(
            default="",
            metadata={
                "help": "file of the DINO head's first weights: dino_head.safetensors, or a training checkpoint that "
                "holds it; '': random"
            },
        )
        init_ibot_head: str = field(
            default="", metadata={"help": "file of the iBOT head's first weights, with separate_heads; '': random"}
        )
        ibot_weight: float = field(default=1.0, metadata={"help": "weight of the masked patches' loss; DINO has 1"})
        koleo_weight: float = field(default=0.1, metadata={"help": "weight of KoLeo, summed over the 2 global crops"})
        koleo_gather: bool = field(
            default=False, metadata={"help": "KoLeo looks for neighbours on all workers (DINOv2: on its own only)"}
        )
        centring: Literal["centre", "sinkhorn"] = field(
            default="centre", metadata={"help": "how teacher scores are kept from collapse"}
        )
        centre_momentum: float = field(default=0.9, metadata={"help": "of the running mean of teacher scores"})
        student_temperature: float = field(default=0.1, metadata={"help": "softmax temperature of the student"})
        teacher_temperature_start: float = field(default=0.04, metadata={"help": "teacher's temperature at step 0"})
        teacher_temperature: float = field(default=0.07, metadata={"help": "teacher's temperature after the warm-up"})
        temperature_warmup_ratio: float = field(default=0.3, metadata={"help": "share of the steps of that warm-up"})
        ema_start: float = field(default=0.992, metadata={"help": "EMA momentum at step 0"})
        ema_end: float = field(default=1.0, metadata={"help": "EMA momentum at the end, by a cosine"})
        layer_decay: float = field(default=0.9, metadata={"help": "learning rate factor from a block to the one below"})
        patch_embed_lr_ratio: float = field(default=0.2, metadata={"help": "further factor of the patch embedding"})
        frozen_ratio: float = field(default=0.01, metadata={"help": "share of the steps with frozen prototypes"})
        pack: Literal["auto", "on", "off"] = field(
            default="auto",
            metadata={
                "help": "local and global crops through the student's blocks in one pass; auto: on a GPU, where it "
                "saves half of the launches (on a CPU it costs 3 %); compiled blocks take one pass a size",
                "hashed": False,
                "fixed": False,
            },
        )

        def __post_init__(self) -> None:
            if self.init_ibot_head and not self.separate_heads:
                raise ValueError(
                    f"init_ibot_head={self.init_ibot_head}: iBOT has no head of its own; set "
                    "objective.separate_heads=true"
                )
            for key in ("student_temperature", "teacher_temperature_start", "teacher_temperature", "layer_decay"):
                if getattr(self, key) <= 0:
                    raise ValueError(f"{key}={getattr(self, key)}: must be above 0")
            for key in ("temperature_warmup_ratio", "ema_start", "ema_end", "centre_momentum", "frozen_ratio"):
                if not 0 <= getattr(self, key) <= 1:
                    raise ValueError(f"{key}={getattr(self, key)}: must lie in [0, 1]")
            for key in ("ibot_weight", "koleo_weight", "patch_embed_lr_ratio"):
                if getattr(self, key) < 0:
                    raise ValueError(f"{key}={getattr(self, key)}: must be 0 or more")

    needs_text = False
    view = "global"

    def __init__(self, config: Config, parts: Parts) -> None:
        super().__init__()
        _check(parts)
        self.config = config
        self._num_steps = parts.num_steps
        self._masking = parts.masking
        width = parts.encoder.width
        self.student_encoder = parts.encoder
        self.student_dino_head = DinoHead(config.head, width)
        self.student_ibot_head = DinoHead(config.head, width) if config.separate_heads else None
        if config.init_head:
            load_head(self.student_dino_head, config.init_head, "dino_head")
        if config.init_ibot_head and self.student_ibot_head is not None:
            load_head(self.student_ibot_head, config.init_ibot_head, "ibot_head")
        self.mask_token = MaskToken(width, parts.encoder.init_extras.get(MASK_TOKEN))
        self.encoder: ImageEncoder = copy.deepcopy(self.student_encoder)
        self.dino_head = copy.deepcopy(self.student_dino_head)
        self.ibot_head = copy.deepcopy(self.student_ibot_head)
        for _, teacher in self._pairs():
            teacher.requires_grad_(False)
        self.dino_centre_K: Tensor
        self.ibot_centre_K: Tensor
        self.register_buffer("dino_centre_K", torch.zeros(config.head.num_prototypes))
        self.register_buffer("ibot_centre_K", torch.zeros(config.head.num_prototypes))
        self._pending: dict[str, Tensor] = {}
        self._pending_step = -1
        warmup = round(config.temperature_warmup_ratio * parts.num_steps)
        self._temperature = linear_warmup(config.teacher_temperature_start, config.teacher_temperature, warmup)
        self._momentum = cosine(config.ema_start, config.ema_end, parts.num_steps)
        self._num_frozen = round(config.frozen_ratio * parts.num_steps)
        self.train()

    def _pairs(self) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
        """(student, teacher) parameters; the mask token has no teacher, which sees whole crops."""
        modules = [(self.student_encoder, self.encoder), (self.student_dino_head, self.dino_head)]
        if self.student_ibot_head is not None and self.ibot_head is not None:
            modules.append((self.student_ibot_head, self.ibot_head))
        for student, teacher in modules:
            yield from zip(student.parameters(), teacher.parameters(), strict=True)

    def train(self, mode: bool = True) -> RadDino:
        """The teacher never drops anything."""
        super().train(mode)
        for teacher in (self.encoder, self.dino_head, self.ibot_head):
            if teacher is not None:
                teacher.eval()
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RadDino:
        # The teacher and the centres stay float32: an EMA whose increment lies below the precision of bf16 would stand
        # still. DeepSpeed casts each parameter to bf16 in place, then moves the module: the move casts them back.
        kept = {id(tensor) for _, tensor in self._pairs()} | {id(tensor) for tensor in self.buffers(recurse=False)}

        def keep(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            is_half = moved.dtype in (torch.bfloat16, torch.float16)
            return tensor.to(moved.device, torch.float32) if is_half and id(tensor) in kept else moved

        super()._apply(keep, recurse)
        return self

    def forward(self, batch: Batch) -> StepOutput:
        config, num = self.config, len(batch)
        has_neighbour = num * (num_ranks() if config.koleo_gather else 1) > 1
        if config.koleo_weight and not has_neighbour:
            raise ValueError(
                "train.micro_batch=1: KoLeo needs a neighbour; use objective.koleo_gather=true with two workers, "
                "objective.koleo_weight=0, or a micro batch of at least 2"
            )
        if batch.step != self._pending_step:  # what a step that was left out had collected moves no centre
            self._pending.clear()
            self._pending_step = batch.step
        images_GCHW = batch.views["global"]
        assert len(images_GCHW) == NUM_GLOBAL * num, "the global view holds two crops of each image"
        masks = self._masking.resolve(batch.columns, None)
        hidden_GN = masks.hidden_SBN.flatten(0, 1)
        masked_M = hidden_GN.flatten().nonzero().squeeze(1)
        temperature = self._temperature(batch.step)
        targets = self._teach(images_GCHW, masked_M, temperature)

        local_LCHW = batch.views.get("local")
        packs = config.pack == "on" or (config.pack == "auto" and images_GCHW.device.type != "cpu")
        packed_LCHW = local_LCHW if packs and self.student_encoder.packs else None
        crops = self.student_encoder(
            images_GCHW,
            hidden_BN=hidden_GN,
            mask_token_D=self.mask_token(),
            wanted_M=masked_M,
            more_BCHW=packed_LCHW,
        )
        cls_SD, patches_MD = crops.global_BD, crops.patches_BND
        if local_LCHW is not None and packed_LCHW is None:
            cls_SD = torch.cat([cls_SD, self.student_encoder(local_LCHW, wanted_M=masked_M[:0]).global_BD])
        cls_GD = cls_SD[: len(images_GCHW)]
        scores, masked_MK = _scores(self.student_dino_head, self.student_ibot_head, cls_SD, patches_MD)
        scores_SBK = scores.unflatten(0, (-1, num))

        terms, logs = self._dino(scores_SBK, targets.cls_2BK)
        weights_M = 1.0 / hidden_GN.sum(dim=1, keepdim=True).expand_as(hidden_GN).flatten()[masked_M]
        ibot = losses.ibot_loss(masked_MK, targets.masked_MK, weights_M, len(hidden_GN), config.student_temperature)
        koleo = [losses.koleo_loss(x_BD, config.koleo_gather) for x_BD in cls_GD.unflatten(0, (NUM_GLOBAL, num))]
        koleo_sum = koleo[0][0] + koleo[1][0]
        loss = terms + config.ibot_weight * ibot + config.koleo_weight * koleo_sum
        # DINOv2 displays half of what it adds up for these two.
        logs |= {"ibot": ibot / NUM_GLOBAL, "koleo": config.koleo_weight * koleo_sum / NUM_GLOBAL}
        logs |= self._health(scores_SBK[:NUM_GLOBAL], targets, cls_GD)
        if has_neighbour:
            logs["koleo_distance"] = (koleo[0][1] + koleo[1][1]) / 2
        logs["masked_ratio"] = hidden_GN.float().mean()
        if self._masking.needs_text:
            # Of the crops that are masked.
            logs["mask/ibot/fallback_ratio"] = masks.fallback_SB.sum() / hidden_GN.any(dim=1).sum().clamp_min(1)
        return StepOutput(loss=loss, logs={name: value.detach() for name, value in logs.items()})

    def _teach(self, images_GCHW: Tensor, masked_M: Tensor, temperature: float) -> _Targets:
        """Targets from whole global crops; only CLS tokens and masked patches reach the heads."""
        device, dtype = images_GCHW.device.type, next(self.student_encoder.parameters()).dtype
        # In the student's precision: that of its parameters, or of the autocast around this step.
        half = torch.get_autocast_dtype(device) if dtype == torch.float32 else dtype
        is_half = dtype != torch.float32 or torch.is_autocast_enabled(device)
        with torch.no_grad(), torch.autocast(device, dtype=half, enabled=is_half):
            crops = self.encoder(images_GCHW, wanted_M=masked_M)
            cls_GK, masked_MK = _scores(self.dino_head, self.ibot_head, crops.global_BD, crops.patches_BND)
        if self.config.centring == "sinkhorn":
            cls_GK, masked_MK = losses.sinkhorn(cls_GK, temperature), losses.sinkhorn(masked_MK, temperature)
        else:
            self._collect("dino_centre_K", cls_GK)
            self._collect("ibot_centre_K", masked_MK)
            cls_GK = losses.centred_softmax(cls_GK, self.dino_centre_K, temperature)
            masked_MK = losses.centred_softmax(masked_MK, self.ibot_centre_K, temperature)
        return _Targets(cls_GK.unflatten(0, (NUM_GLOBAL, -1)), masked_MK)

    def _dino(self, scores_SBK: Tensor, targets_2BK: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The DINO loss: each global crop against the other one's target, each local crop against both."""
        temperature, num_local = self.config.student_temperature, len(scores_SBK) - NUM_GLOBAL
        num_terms = max(NUM_GLOBAL * num_local, 1) + NUM_GLOBAL * (NUM_GLOBAL - 1)
        swapped_2BK = targets_2BK.flip(0)
        first, second = (
            losses.dino_loss(scores_SBK[i : i + 1], swapped_2BK[i : i + 1], temperature) for i in range(NUM_GLOBAL)
        )
        logs = {"dino_global": (first + second) / num_terms}
        if not num_local:
            return logs["dino_global"], logs
        logs["dino_local"] = losses.dino_loss(scores_SBK[NUM_GLOBAL:], targets_2BK, temperature) / num_terms
        return logs["dino_global"] + logs["dino_local"], logs

    @torch.no_grad()
    def _health(self, scores_2BK: Tensor, targets: _Targets, cls_GD: Tensor) -> dict[str, Tensor]:
        """Signs of collapse, over the images of this rank."""
        teacher_GK = targets.cls_2BK.flatten(0, 1)
        student_GK = (scores_2BK.flatten(0, 1).float() / self.config.student_temperature).softmax(dim=-1)
        used = teacher_GK.argmax(dim=1).unique().numel()
        return {
            "teacher_entropy": losses.entropy(teacher_GK),
            "student_entropy": losses.entropy(student_GK),
            "prototypes_used": teacher_GK.new_tensor(used),
            "prototypes_used_ratio": teacher_GK.new_tensor(used / min(teacher_GK.shape)),
            "effective_rank": losses.effective_rank(cls_GD),
        }

    def export_extras(self) -> dict[str, Tensor]:
        return self.mask_token.extras()

    @staticmethod
    def check_masking(masking: Masking) -> None:
        """ValueError unless there is one mask for each global crop, from the plan."""
        if len(masking.names) != NUM_GLOBAL or masking.needs_attention:
            raise ValueError(
                f"masking with masks {masking.names}: objective rad_dino needs one mask for each of its two global "
                "crops; use masking.name=dinov2_block or dinov2_report"
            )

    def warnings(self, step: int, logs: Mapping[str, float]) -> list[str]:
        """Reports without a place to mask; and, once the first tenth of the run is over, signs of collapse: all images
        one prototype, or all prototypes alike for every image, or features without variety. Their effective rank has no
        scale, so that features which are one constant are told by KoLeo's distance alone."""
        told = mask_warnings(logs)
        if step < self._num_steps // 10:
            return told
        most = math.log(self.config.head.num_prototypes)
        if logs["teacher_entropy"] < 0.01 * most and (
            logs["prototypes_used"] < 2 or logs["prototypes_used_ratio"] < 0.1
        ):
            told.append("the teacher gives nearly every image the same prototype: raise the teacher's temperature")
        if logs["student_entropy"] > 0.999 * most:
            told.append("the student finds all prototypes alike for every image: it has collapsed, or not begun")
        if logs["teacher_entropy"] > 0.999 * most:
            told.append(
                "the teacher finds all prototypes alike for every image: the student has nothing to learn from it"
            )
        if logs.get("koleo_distance", 1.0) < _SAME:
            told.append(
                "the features of different images are the same (koleo_distance below 0.001): they have collapsed"
            )
        if logs["effective_rank"] < 1.5:
            told.append("the features of a batch lie on a line (effective rank below 1.5): they have collapsed")
        return told

    def _collect(self, centre: str, scores_MK: Tensor) -> None:
        """Add teacher scores to the sum that moves a centre in `after_step`; the last column counts the rows."""
        sums = torch.cat([scores_MK.float().sum(dim=0), scores_MK.new_tensor([len(scores_MK)], dtype=torch.float32)])
        self._pending[centre] = self._pending[centre] + sums if centre in self._pending else sums

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Teacher = m * teacher + (1 - m) * student; centres move towards the mean over all ranks and micro-batches."""
        weight = 1.0 - self._momentum(step)
        for student, teacher in self._pairs():
            source, target = _held(student), _held(teacher)
            assert source.shape == target.shape, "student and teacher must be sharded alike"
            target.lerp_(source.to(target.dtype), weight)
        for name in sorted(self._pending):
            sums = all_reduce_sum(self._pending.pop(name))
            if sums[-1] > 0:
                getattr(self, name).lerp_(sums[:-1] / sums[-1], 1.0 - self.config.centre_momentum)

    def parameter_groups(self) -> list[ParameterGroup]:
        """DINOv2's groups: layer decay and a slower patch embedding; no weight decay on vectors; prototypes frozen at
        first."""
        depth = len(self.student_encoder.backbone.blocks)
        groups: dict[tuple[float, float, int], list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                lr_ratio = self._lr_ratio(name, depth)
                frozen = self._num_frozen if ".last_layer." in name else 0
                decay_ratio = float(parameter.ndim > 1 or name.startswith("mask_token"))
                groups.setdefault((lr_ratio, decay_ratio, frozen), []).append(parameter)
        return [
            ParameterGroup(parameters=tuple(group), lr_ratio=lr_ratio, decay_ratio=decay_ratio, frozen_steps=frozen)
            for (lr_ratio, decay_ratio, frozen), group in groups.items()
        ]

    def part_of(self, name: str) -> str:
        """DINOv2's submodels: backbone with the mask token, DINO head, iBOT head."""
        child = name.partition(".")[0]
        return "student_encoder" if child == "mask_token" else child

    def _lr_ratio(self, name: str, depth: int) -> float:
        """Tokens, positions and patch embedding are layer 0, block i layer i + 1, everything else layer depth + 1."""
        part = name.removeprefix("student_encoder.backbone.")
        layer = depth + 1
        if part.startswith("blocks."):
            layer = int(part.split(".")[1]) + 1
        elif part.startswith(("cls_token", "reg_token", "mask_token", "pos_embed", "patch_embed.")):
            layer = 0
        ratio = self.config.layer_decay ** (depth + 1 - layer)
        return ratio * (self.config.patch_embed_lr_ratio if ".patch_embed." in name else 1.0)


def _scores(
    dino_head: DinoHead, ibot_head: DinoHead | None, cls_GD: Tensor, patches_MD: Tensor
) -> tuple[Tensor, Tensor]:
    """Head scores of CLS tokens and masked patches: one call where the head is shared."""
    if ibot_head is not None:
        return dino_head(cls_GD), ibot_head(patches_MD)
    scores = dino_head(torch.cat([cls_GD, patches_MD]))
    return scores[: len(cls_GD)], scores[len(cls_GD) :]


def _held(parameter: Any) -> Tensor:
    """What this rank holds of a parameter: its shard under ZeRO-3, else all of it."""
    held: Tensor = parameter.ds_tensor if hasattr(parameter, "ds_tensor") else parameter
    return held.data


def _check(parts: Parts) -> None:
    if not parts.encoder.takes_tokens or not parts.encoder.has_cls:
        raise ValueError(
            f"encoder.name={parts.encoder.config.name}: objective rad_dino needs a ViT with a CLS token; "
            "use e.g. vit_base_patch14_dinov2"
        )
    RadDino.check_masking(parts.masking)
