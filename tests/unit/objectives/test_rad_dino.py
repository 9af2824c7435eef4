"""RAD-DINO as a module: EMA, precision, groups, refusals. A step at parity: tests/golden; ZeRO: tests/system."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from medim_ray.masking.base import MASKINGS
from medim_ray.masking.block import BlockMasking, StepBlockMasking
from medim_ray.models.export import export
from medim_ray.models.heads_dino import DinoHead
from medim_ray.models.vit import ImageEncoder
from medim_ray.objectives import OBJECTIVES
from medim_ray.objectives.base import Parts
from medim_ray.objectives.rad_dino import RadDino
from medim_ray.types import Batch

HEAD = DinoHead.Config(num_prototypes=32, hidden=24, bottleneck=12)
NUM, NUM_LOCAL = 4, 3


def make_parts(name: str = "vit_small_patch14_dinov2", drop_path: float = 0.0) -> Parts:
    config = ImageEncoder.Config(name=name, image_size=64)
    if not name.startswith("resnet"):
        config = ImageEncoder.Config(name=name, image_size=56, drop_path=drop_path, width=48, depth=2, num_heads=3)
    masking = StepBlockMasking(StepBlockMasking.Config())
    return Parts(encoder=ImageEncoder(config), text=None, masking=masking, num_steps=100, global_batch=NUM)


def make(drop_path: float = 0.0, **options: Any) -> RadDino:
    torch.manual_seed(0)
    objective = OBJECTIVES["rad_dino"](RadDino.Config(head=HEAD, **options), make_parts(drop_path=drop_path))
    assert isinstance(objective, RadDino)
    return objective


def make_batch(step: int = 0, num: int = NUM, masked: bool = True) -> Batch:
    generator = torch.Generator().manual_seed(step)
    hidden_BSN = torch.rand(num, 2, 16, generator=generator) < 0.4
    hidden_BSN[::2, 0] = False
    views = {
        "global": torch.rand(2 * num, 1, 56, 56, generator=generator),
        "local": torch.rand(NUM_LOCAL * num, 1, 28, 28, generator=generator),
    }
    ids = tuple(str(i) for i in range(num))
    return Batch(step=step, image_ids=ids, views=views, columns={"mask/block_BSN": hidden_BSN & masked})


def teacher_of(objective: RadDino) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in objective.state_dict().items() if k.startswith(("encoder.", "dino_head."))}


def test_the_loss_falls_and_only_the_student_learns() -> None:
    objective = make()
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=1e-3)
    before = teacher_of(objective)
    batch, values = make_batch(), []
    for _ in range(12):
        optimizer.zero_grad()
        output = objective(batch)
        output.loss.backward()
        optimizer.step()
        values.append(float(output.loss.detach()))
    assert values[-1] < values[0] - 0.5
    assert all(torch.equal(before[key], value) for key, value in teacher_of(objective).items())


def test_one_pass_for_crops_of_both_sizes_gives_the_same_step() -> None:
    steps = []
    for pack in ("off", "on"):
        objective, batch = make(pack=pack), make_batch()
        passes: list[int] = []
        objective.student_encoder.register_forward_hook(lambda *_, passes=passes: passes.append(1))
        output = objective(batch)
        output.loss.backward()
        assert len(passes) == (1 if pack == "on" else 2)
        gradients = {name: p.grad for name, p in objective.named_parameters() if p.grad is not None}
        steps.append((output.logs, gradients))
    (logs, gradients), (packed_logs, packed_gradients) = steps
    torch.testing.assert_close(packed_logs, logs, rtol=1e-5, atol=1e-6)
    assert gradients.keys() == packed_gradients.keys()
    scale = max(float(gradient.norm()) for gradient in gradients.values())
    for name, gradient in gradients.items():
        assert (packed_gradients[name] - gradient).norm() < 1e-4 * gradient.norm() + 1e-5 * scale, name


def test_after_step_moves_the_teacher_by_the_schedule() -> None:
    objective = make(ema_start=0.9, ema_end=1.0)
    with torch.no_grad():
        for student, _ in objective._pairs():
            student.add_(1.0)
    before = teacher_of(objective)
    objective.after_step(50)  # halfway down the cosine from 0.9 to 1: momentum 0.95
    for key, value in teacher_of(objective).items():
        torch.testing.assert_close(value, before[key] + 0.05)


def test_centre_is_the_mean_over_micro_batches() -> None:
    objective = make(centre_momentum=0.9)
    whole, parts = make_batch(num=NUM), []
    for rows in (slice(0, 2), slice(2, 4)):
        views = {name: view.unflatten(0, (-1, NUM))[:, rows].flatten(0, 1) for name, view in whole.views.items()}
        columns = {name: column[rows] for name, column in whole.columns.items()}
        parts.append(Batch(step=0, image_ids=whole.image_ids[rows], views=views, columns=columns))
    objective(whole)
    objective.after_step(0)
    expected = {name: buffer.clone() for name, buffer in objective.named_buffers() if "centre" in name}
    assert all(buffer.abs().max() > 0 for buffer in expected.values())
    other = make(centre_momentum=0.9)
    for part in parts:
        other(part)
    other.after_step(0)
    for name, buffer in other.named_buffers():
        if name in expected:
            torch.testing.assert_close(buffer, expected[name], rtol=1e-4, atol=1e-6)


def test_bf16_leaves_teacher_and_centres_in_float32_and_small_steps_count() -> None:
    objective = make(ema_start=0.9999).bfloat16()
    assert objective.student_encoder.backbone.norm.weight.dtype == torch.bfloat16
    assert {p.dtype for p in objective.encoder.parameters()} == {torch.float32}
    assert objective.dino_centre_K.dtype == torch.float32
    before = teacher_of(objective)["encoder.backbone.norm.weight"]
    with torch.no_grad():
        objective.student_encoder.backbone.norm.weight.add_(0.5)
    output = objective(make_batch())
    output.loss.backward()
    assert torch.isfinite(output.loss) and output.loss.dtype == torch.float32
    objective.after_step(0)
    moved = teacher_of(objective)["encoder.backbone.norm.weight"] - before
    torch.testing.assert_close(moved, torch.full_like(moved, 5e-5), rtol=1e-2, atol=0)


def test_teacher_never_drops_paths() -> None:
    objective = make(drop_path=0.8).train()
    images = torch.rand(4, 1, 56, 56)
    assert torch.equal(objective.encoder(images).global_BD, objective.encoder(images).global_BD)
    with torch.no_grad():
        for parameter in objective.student_encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    features = (objective.student_encoder(images).global_BD for _ in range(2))
    assert not torch.equal(*features)


def test_a_step_without_any_mask_and_without_local_crops() -> None:
    batch = make_batch(masked=False)
    output = make()(
        Batch(step=0, image_ids=batch.image_ids, views={"global": batch.views["global"]}, columns=batch.columns)
    )
    output.loss.backward()
    assert float(output.logs["ibot"]) == 0.0 and "dino_local" not in output.logs
    assert torch.isfinite(output.loss)


def test_separate_heads_are_separate() -> None:
    objective = make(separate_heads=True)
    objective(make_batch()).loss.backward()
    assert objective.student_ibot_head is not None
    for head in (objective.student_dino_head, objective.student_ibot_head):
        assert head.last_layer.weight_v.grad is not None and head.last_layer.weight_v.grad.abs().max() > 0
    assert {name.split(".")[0] for name in objective.state_dict()} >= {"ibot_head", "student_ibot_head"}


def test_groups_cover_each_trainable_parameter_once_with_dinov2s_rates() -> None:
    objective = make(layer_decay=0.5, patch_embed_lr_ratio=0.2, frozen_ratio=0.05)
    names = {id(parameter): name for name, parameter in objective.named_parameters()}
    group_of = {names[id(p)]: group for group in objective.parameter_groups() for p in group.parameters}
    assert set(group_of) == {name for name, p in objective.named_parameters() if p.requires_grad}
    assert sum(len(group.parameters) for group in objective.parameter_groups()) == len(group_of)
    vit = "student_encoder.backbone."
    expected = {  # depth 2: learning rate, decay, frozen
        f"{vit}pos_embed": (0.5**3, 1.0, 0),
        f"{vit}patch_embed.proj.weight": (0.5**3 * 0.2, 1.0, 0),
        f"{vit}patch_embed.proj.bias": (0.5**3 * 0.2, 0.0, 0),
        "mask_token.token_D": (0.5**3, 1.0, 0),
        f"{vit}blocks.0.ls1.gamma": (0.5**2, 0.0, 0),
        f"{vit}blocks.1.mlp.fc1.weight": (0.5, 1.0, 0),
        f"{vit}norm.weight": (1.0, 0.0, 0),
        "student_dino_head.mlp.0.weight": (1.0, 1.0, 0),
        "student_dino_head.last_layer.weight_v": (1.0, 1.0, 5),
    }
    for name, (lr_ratio, decay_ratio, frozen) in expected.items():
        group = group_of[name]
        assert math.isclose(group.lr_ratio, lr_ratio)
        assert (group.decay_ratio, group.frozen_steps) == (decay_ratio, frozen)


def test_health_is_logged_and_within_its_bounds() -> None:
    logs = make()(make_batch()).logs
    for name in ("teacher_entropy", "student_entropy"):
        assert 0 <= float(logs[name]) <= math.log(32) + 1e-4
    assert 0 < float(logs["prototypes_used_ratio"]) <= 1
    assert 0 < float(logs["masked_ratio"]) < 0.5
    assert all(not value.requires_grad for value in logs.values())


def test_what_does_not_fit_is_refused_with_a_fix() -> None:
    parts = make_parts()
    one_mask = Parts(
        encoder=parts.encoder,
        text=None,
        masking=BlockMasking(BlockMasking.Config()),
        num_steps=1,
        global_batch=2,
    )
    with pytest.raises(ValueError, match=r"use masking\.name=dinov2_block"):
        RadDino(RadDino.Config(head=HEAD), one_mask)
    with pytest.raises(ValueError, match=r"needs a ViT with a CLS token"):
        RadDino(RadDino.Config(head=HEAD), make_parts("resnet18"))
    with pytest.raises(ValueError, match=r"train\.micro_batch=1: KoLeo needs a neighbour"):
        make()(make_batch(num=1))
    with pytest.raises(ValueError, match=r"ema_start=1\.5: must lie in"):
        RadDino.Config(ema_start=1.5)
    assert "dinov2_block" in MASKINGS


def test_collapse_is_told_in_words_after_the_first_tenth() -> None:
    module = make()
    most = math.log(module.config.head.num_prototypes)
    well = {"teacher_entropy": 0.5 * most, "student_entropy": 0.6 * most}
    well |= {"prototypes_used": 8.0, "prototypes_used_ratio": 0.5, "effective_rank": 4.0, "koleo_distance": 0.4}
    well |= {"mask/ibot/fallback_ratio": 0.5}
    late = 99
    assert module.warnings(late, well) == []
    few = {**well, "teacher_entropy": 0.0, "prototypes_used_ratio": 0.05}
    one = {**well, "teacher_entropy": 0.0, "prototypes_used": 1.0, "prototypes_used_ratio": 0.25}  # of two images
    flat, line = {**well, "student_entropy": most}, {**well, "effective_rank": 1.1}
    idle, same = {**well, "teacher_entropy": most}, {**well, "koleo_distance": 1e-6}
    told = ((few, "same prototype"), (one, "same prototype"), (flat, "student finds all prototypes alike"))
    for logs, word in (
        *told,
        (line, "on a line"),
        (idle, "teacher finds all prototypes alike"),
        (same, "are the same"),
    ):
        assert word in " ".join(module.warnings(late, logs))
        assert module.warnings(0, logs) == [], "every run begins so"
    assert "ibot finds no word" in " ".join(module.warnings(0, {**well, "mask/ibot/fallback_ratio": 0.6}))


def test_a_batch_of_one_image_again_and_again_is_told_as_a_collapse() -> None:
    module, batch = make(koleo_weight=0.0), make_batch()
    images = {name: view[:1].expand_as(view) for name, view in batch.views.items()}
    logs = module(dataclasses.replace(batch, views=images)).logs
    words = " ".join(module.warnings(99, {name: float(value) for name, value in logs.items()}))
    assert "are the same" in words and float(logs["effective_rank"]) > 1.5, "the rank of rounding errors says nothing"


def test_a_step_that_is_left_out_moves_no_centre() -> None:
    module, straight = make(), make()
    broken = make_batch(1)
    broken = dataclasses.replace(broken, views={name: view * torch.nan for name, view in broken.views.items()})
    for step in (0, 2):
        batch = make_batch(step)
        for one in (module, straight):
            one(batch)
            one.after_step(step)
        if step == 0:
            module(broken)  # the guard skips the step: no after_step
    assert torch.equal(module.dino_centre_K, straight.dino_centre_K) and module.dino_centre_K.isfinite().all()
    assert module.dino_centre_K.abs().sum() > 0


def test_koleo_of_one_image_on_one_worker_is_refused_gathered_or_not() -> None:
    for gather in (False, True):
        with pytest.raises(ValueError, match=r"train\.micro_batch=1: KoLeo needs a neighbour"):
            make(koleo_gather=gather)(make_batch(num=1))
    assert "koleo_distance" not in make(koleo_weight=0.0)(make_batch(num=1)).logs


def test_heads_and_mask_token_begin_from_files_and_go_out_again(tmp_path: Path) -> None:
    published = make()
    with torch.no_grad():
        published.mask_token.token_D.fill_(0.25)
    save_file(published.student_dino_head.state_dict(), tmp_path / "dino_head.safetensors")
    export(published.student_encoder, "hf", str(tmp_path / "hf"), published.export_extras())
    config = dataclasses.replace(published.encoder.config, init=str(tmp_path / "hf"))
    parts = dataclasses.replace(make_parts(), encoder=ImageEncoder(config))
    head_file = str(tmp_path / "dino_head.safetensors")
    begun = RadDino(RadDino.Config(head=HEAD, init_head=head_file), parts)
    for head in (begun.student_dino_head, begun.dino_head):
        for key, value in published.student_dino_head.state_dict().items():
            assert torch.equal(head.state_dict()[key], value), key
    assert torch.equal(begun.mask_token(), published.mask_token())
    export(begun.student_encoder, "hf", str(tmp_path / "again"), begun.export_extras())
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("hf", "again"))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    with pytest.raises(ValueError, match=r"init_ibot_head=.*objective\.separate_heads=true"):
        RadDino.Config(init_ibot_head=head_file)
