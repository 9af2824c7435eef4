"""MedIM: it learns, every recipe made of weights works, hidden features carry nothing, empty reports are harmless."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from medim_ray.masking import MASKINGS
from medim_ray.masking.base import Masking
from medim_ray.objectives import losses
from tests.unit.objectives.batches import batch_for, build, train

SMALL = {"projection_hidden": 64, "projection_dim": 32, "num_prototypes": 16, "decoder_widths": (32, 16, 8, 8)}
BOTH = {"name": "kdm+sdm"}
TERMS = {"ita_weight": 1.0, "local_weight": 1.0, "proto_weight": 1.0, "reconstruction_weight": 5.0}


def strategy(**options: Any) -> Masking:
    made: Masking = MASKINGS[options["name"]](MASKINGS[options["name"]].Config(**options))
    return made


def medim(masking: dict[str, Any] | None = None, encoder: dict[str, Any] | None = None, **options: Any) -> Any:
    return build("medim", masking or BOTH, encoder, **{**SMALL, **options})


def test_overfits() -> None:
    values = train(medim(), strategy(**BOTH), steps=60, lr=3e-3, num=32)
    start, end = values[0], sum(values[-5:]) / 5
    assert end < start / 2, f"{start:.3f} -> {end:.3f}"


@pytest.mark.parametrize(
    ("masking", "weights", "expected"),
    [
        (BOTH, {}, {"ita", "local", "proto", "reconstruction/kdm", "reconstruction/sdm"}),
        ({"name": "kdm"}, {}, {"ita", "local", "proto", "reconstruction/kdm"}),
        ({"name": "sdm"}, {}, {"ita", "local", "proto", "reconstruction/sdm"}),
        ({"name": "uniform", "on": "feature"}, {}, {"ita", "local", "proto", "reconstruction/uniform"}),
        ({"name": "uniform"}, {"local_weight": 0.0, "proto_weight": 0.0, "reconstruction_weight": 0.0}, {"ita"}),
        ({"name": "uniform"}, {"reconstruction_weight": 0.0}, {"ita", "local", "proto"}),
        ({"name": "kdm"}, {"ita_weight": 0.0, "local_weight": 0.0, "proto_weight": 0.0}, {"reconstruction/kdm"}),
    ],
)
@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_recipes_of_weights(masking: dict[str, Any], weights: dict[str, Any], expected: set[str], norm: str) -> None:
    objective = medim(masking, norm=norm, **weights)
    output = objective(batch_for(strategy(**masking), objective.encoder.grid, 4, 64))
    terms = {name for name in output.logs if name in ("ita", "local", "proto") or name.startswith("reconstruction")}
    assert terms == expected
    factors = {**TERMS, **weights}
    total = sum(factors[f"{name.split('/')[0]}_weight"] * value for name, value in output.logs.items() if name in terms)
    torch.testing.assert_close(output.loss, torch.as_tensor(total))
    output.loss.backward()
    idle = [name for name, p in objective.named_parameters() if p.requires_grad and p.grad is None]
    unused = ("backbone.cls_token",) if set(weights) >= {"ita_weight", "local_weight", "proto_weight"} else ()
    assert [name for name in idle if not name.endswith(unused or ("-",)) and not name.startswith("text.")] == []


def test_logs_masks_and_health() -> None:
    objective = medim()
    batch = batch_for(strategy(**BOTH), objective.encoder.grid, 8, 64, empty_row=3)
    logs = objective(batch).logs
    # 16 patches: 8 high, int(0.9 * 8) = 7 of them and int((1 - 0.9) * 8) = 0 others; the empty report hides 8.
    assert logs["mask/kdm/hidden_ratio"] == pytest.approx((7 * 7 + 8) / 128)
    assert logs["mask/kdm/fallback_ratio"] == logs["mask/sdm/fallback_ratio"] == 1 / 8
    assert 0 <= logs["acc1"] <= logs["acc5"] <= 1
    assert 0 < logs["attention_entropy_ratio"] < 1
    assert not any(value.requires_grad for value in logs.values())


def test_an_empty_report_gives_finite_gradients() -> None:
    objective = medim()
    output = objective(batch_for(strategy(**BOTH), objective.encoder.grid, 4, 64, empty_row=0))
    output.loss.backward()
    assert torch.isfinite(output.loss)
    assert all(torch.isfinite(p.grad).all() for p in objective.parameters() if p.grad is not None)


def test_hidden_features_do_not_reach_the_decoder() -> None:
    objective = medim().eval()
    masking, grid = strategy(**BOTH), objective.encoder.grid
    batch = batch_for(masking, grid, 2, 64)
    features = objective.encoder(batch.views["image"])
    report = objective.text(
        *(batch.columns[f"text/{name}_BT"] for name in ("token_ids", "token_is_pad", "word_of_token"))
    )
    attention = losses.word_patch_attention(
        objective.word_projection(report.words_BWD), objective.patch_projection(features.patches_BND), 0.1
    )
    hidden_SBN = masking.resolve(batch.columns, attention).hidden_SBN
    patches_BND = features.patches_BND.detach().requires_grad_()
    images = batch.views["image"]
    terms: dict[str, torch.Tensor] = {}
    masks = masking.resolve(batch.columns, attention)
    objective._add_reconstruction(images, features._replace(patches_BND=patches_BND), masks, terms, {})
    terms["reconstruction"].backward()
    assert patches_BND.grad is not None
    is_used_BN = patches_BND.grad.abs().sum(-1) > 0
    assert torch.equal(is_used_BN, ~hidden_SBN.all(dim=0))


@pytest.mark.parametrize("masking", [{"name": "kdm+sdm", "on": "input"}, {"name": "uniform", "ratio": 0.5}])
def test_input_masking_skips_hidden_patches(masking: dict[str, Any]) -> None:
    objective = medim(masking)
    lengths: list[int] = []
    block = objective.encoder.backbone.blocks[0]
    block.register_forward_hook(lambda _m, inputs, _o: lengths.append(inputs[0].shape[1]))
    output = objective(batch_for(strategy(**masking), objective.encoder.grid, 4, 64))
    assert lengths == [17, 9], "the whole image for the alignment, then CLS and the 8 visible patches"
    output.loss.backward()
    assert objective.mask_token.token_D.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("encoder", "grid"),
    [
        ({"image_size": 112, "width": 48, "depth": 1, "num_heads": 3}, 7),
        ({"name": "vit_small_patch14_dinov2", "image_size": 56, "width": 48, "depth": 1, "num_heads": 3}, 4),
        ({"name": "resnet18", "image_size": 64}, 2),
    ],
)
def test_any_grid_and_a_resnet(encoder: dict[str, Any], grid: int) -> None:
    objective = medim(encoder=encoder)
    size = encoder["image_size"]
    assert objective.encoder.grid.height == grid
    output = objective(batch_for(strategy(**BOTH), objective.encoder.grid, 3, size))
    output.loss.backward()
    assert torch.isfinite(output.loss)
    features = torch.zeros(2, 3, grid**2, objective.encoder.width)
    assert objective.decoder(features).shape == (2, 3, 1, size, size)


def test_prototypes_stand_still_at_first() -> None:
    objective = medim(prototype_freeze_ratio=0.03)  # of 100 steps
    before = objective.prototypes.directions_KD.detach().clone()
    train(objective, strategy(**BOTH), steps=3, lr=1e-3, num=4)
    torch.testing.assert_close(objective.prototypes.directions_KD.detach(), before, rtol=0, atol=0)
    train(objective, strategy(**BOTH), steps=5, lr=1e-3, num=4)
    assert (objective.prototypes.directions_KD - before).abs().max() > 1e-4
    grouped = [p for group in objective.parameter_groups() for p in group.parameters]
    assert len(grouped) == len(set(map(id, grouped))) == sum(p.requires_grad for p in objective.parameters())


def test_no_random_number_is_drawn_in_a_step() -> None:
    objective = medim()
    batch = batch_for(strategy(**BOTH), objective.encoder.grid, 4, 64)
    state = torch.get_rng_state()
    first = objective(batch).loss
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    torch.testing.assert_close(objective(dataclasses.replace(batch)).loss, first, rtol=0, atol=0)


def test_a_single_sample_works() -> None:
    objective = medim()
    assert torch.isfinite(objective(batch_for(strategy(**BOTH), objective.encoder.grid, 1, 64)).loss)


@pytest.mark.parametrize(
    ("masking", "encoder", "options", "message"),
    [
        (BOTH, None, {"ita_weight": -1.0}, "ita_weight"),
        (BOTH, None, dict.fromkeys(TERMS, 0.0), "all 0"),
        (BOTH, None, {"local_temperature": 0.001}, "local_temperature"),
        (BOTH, None, {"decoder_widths": ()}, "decoder_widths"),
        (BOTH, None, {"norm": "group"}, "norm"),
        (
            {"name": "uniform"},
            None,
            {"ita_weight": 0.0, "local_weight": 0.0, "proto_weight": 0.0},
            "no report is used",
        ),
        ({"name": "kdm", "on": "input"}, {"name": "resnet18", "image_size": 64}, {}, "ResNet"),
    ],
)
def test_bad_options(
    masking: dict[str, Any], encoder: dict[str, Any] | None, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        medim(masking, encoder, **options)


def test_words_of_the_same_pieces_have_one_key() -> None:
    token_ids = torch.tensor([[2, 7, 8, 9, 3], [2, 9, 7, 8, 3]])
    word_of_token = torch.tensor([[-1, 0, 0, 1, -1], [-1, 0, 1, 1, -1]], dtype=torch.int16)
    keys = losses.word_keys(token_ids, word_of_token, 4)
    assert keys[0, 0] == keys[1, 1] and keys[0, 1] == keys[1, 0] != keys[0, 0]
    assert not keys[:, 2:].any()


def test_the_word_contrast_leaves_out_images_that_tell_the_same_word() -> None:
    generator = torch.Generator().manual_seed(0)
    words = torch.nn.functional.normalize(torch.randn(3, 2, 5, generator=generator), dim=-1)
    patches = torch.nn.functional.normalize(torch.randn(3, 4, 5, generator=generator), dim=-1)
    keys = torch.tensor([[1, 2], [1, 3], [4, 2]])
    told = torch.tensor([[True, False], [True, True], [True, False]])
    expected = []
    for b, w in told.nonzero().tolist():
        others = [j for j in range(3) if j != b and not ((keys[j] == keys[b, w]) & told[j]).any()]
        masses = {j: (words[b, w] @ patches[j].T / 0.1).exp().sum() for j in [b, *others]}
        expected.append(-(masses[b] / sum(masses.values())).log())
    ours = losses.word_contrast(words, patches, keys, told, 0.1)
    torch.testing.assert_close(ours, torch.stack(expected).mean())
    assert float(losses.word_contrast(words, patches, keys, torch.zeros_like(told), 0.1)) == 0.0


def test_the_word_contrast_teaches_words_their_patches() -> None:
    """Each image has the marks of the words told, at random places among noise that all images share."""
    generator = torch.Generator().manual_seed(0)
    num, num_patches, kinds = 48, 16, 4
    marks = 6 * torch.eye(8)[:kinds]
    x = torch.randn(num, num_patches, 8, generator=generator)
    kind = torch.randint(kinds, (num,), generator=generator)
    place = torch.randint(num_patches, (num,), generator=generator)
    x[torch.arange(num), place] += marks[kind]
    torch.manual_seed(0)
    table, project = torch.nn.Embedding(kinds, 8), torch.nn.Linear(8, 8)
    optimizer = torch.optim.AdamW([*table.parameters(), *project.parameters()], lr=0.02)
    normalize = torch.nn.functional.normalize

    def share_found() -> float:
        attention = normalize(table(kind), dim=-1)[:, None] @ normalize(project(x), dim=-1).transpose(1, 2)
        return float((attention[:, 0].argmax(dim=1) == place).float().mean())

    before, first = share_found(), 0.0
    for _ in range(100):
        optimizer.zero_grad()
        words = normalize(table(kind), dim=-1)[:, None]
        loss = losses.word_contrast(words, normalize(project(x), dim=-1), kind[:, None], (kind >= 0)[:, None], 0.1)
        first = first or loss.item()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5 * first
    assert before < 0.2 and share_found() > 0.4, "chance is one in sixteen"


def test_a_warm_up_trains_the_encoder_alone_and_the_terms_begin_after_it() -> None:
    objective = medim(mae_ratio=0.4, word_contrast_weight=1.0)  # 40 of 100 steps
    batch = batch_for(strategy(**BOTH), objective.encoder.grid, 8, 64)
    warm = objective(dataclasses.replace(batch, step=39))
    warm.loss.backward()
    touched = {name.split(".")[0] for name, p in objective.named_parameters() if p.grad is not None}
    assert touched == {"encoder", "warm_up"} and set(warm.logs) == {"mae"}
    again, other = (
        objective(dataclasses.replace(batch, step=39)).loss,
        objective(dataclasses.replace(batch, step=38)).loss,
    )
    assert torch.equal(again, warm.loss) and not torch.equal(other, warm.loss)
    after = objective(dataclasses.replace(batch, step=40))
    assert {"ita", "local", "word_contrast"} <= set(after.logs) and "mae" not in after.logs
    values = train(objective, strategy(**BOTH), steps=40, lr=1e-3, num=8)
    assert values[39] < 0.95 * values[0], "the encoder learns to fill in"
