"""Maps during a run: the numbers are those of localise.py, a look changes nothing, and chance is told in words."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from medim_ray.config.schema import RunConfig
from medim_ray.data.collate import to_batch
from medim_ray.data.phantom import render
from medim_ray.data.texts import ReportEncoder
from medim_ray.data.transforms import PadCrop
from medim_ray.masking.report import ReportMasking
from medim_ray.models.text import TextEncoder, load_tokenizer
from medim_ray.models.vit import ImageEncoder
from medim_ray.objectives.base import Parts
from medim_ray.objectives.medim import MedIM
from medim_ray.probes.localise import ModelMaps, judge_map, kdm_masking, questions
from medim_ray.probes.rows import centre_columns, centre_samples
from medim_ray.probes.watch import MapWatch, in_words
from medim_ray.reports.sections import split_sentences
from medim_ray.reports.wordpiece import train_tokenizer
from medim_ray.train.before import LOOK_S, BeforeStep

CONFIG = RunConfig(
    crop=PadCrop.Config(),
    encoder=ImageEncoder.Config(image_size=64, width=48, depth=2, num_heads=3),
    text=TextEncoder.Config(num_tokens=48, width=32, dropout=0.1),
    masking=ReportMasking.Config(name="kdm+sdm"),
    objective=MedIM.Config(projection_hidden=32, projection_dim=16, decoder_widths=(8, 8, 8, 8), num_prototypes=8),
)


def phantom_rows(num: int, truth: bool = True) -> list[dict[str, Any]]:
    rows = []
    for index in range(num):
        study = render(index, seed=77, size=64)
        report = " ".join(study.sentences)
        where = [sentence.text for sentence in split_sentences(report)]
        lesions = [
            {
                "finding": lesion.finding,
                "sentence": where.index(study.sentences[lesion.sentence]) if lesion.sentence >= 0 else -1,
                "mask": cv2.imencode(".png", lesion.mask_HW.astype(np.uint8) * 255)[1].tobytes(),
            }
            for lesion in study.lesions
        ]
        image = cv2.imencode(".png", study.image_HW)[1].tobytes()
        rows.append({"image_id": study.image_id, "image": image, "report": report, "truth": lesions if truth else []})
    return rows


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> ReportEncoder:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([row["report"] for row in phantom_rows(24)], folder, vocab_size=200)
    return ReportEncoder(load_tokenizer(CONFIG.text, folder), CONFIG.text.num_tokens)


def objective() -> MedIM:
    torch.manual_seed(0)
    text = TextEncoder(CONFIG.text, 200)
    masking: Any = ReportMasking(CONFIG.masking)
    parts = Parts(encoder=ImageEncoder(CONFIG.encoder), text=text, masking=masking, num_steps=10, global_batch=8)
    return MedIM(CONFIG.objective, parts)


def test_numbers_are_those_of_the_probe(reports: ReportEncoder) -> None:
    rows, model = phantom_rows(12), objective()
    look = MapWatch(CONFIG, model, reports, rows)()
    crop: Any = PadCrop(PadCrop.Config(), 64)
    columns, text = centre_columns(rows, crop, reports)
    batch = to_batch(columns, crop.views, torch.device("cpu"))
    attention = ModelMaps(model.eval())(batch, text)
    by_image: dict[int, list[float]] = {}
    for q in questions(rows, columns, text, kdm_masking(CONFIG), model.encoder.grid, 64):
        if q.strategy == "sdm" and not q.problem:
            map_N = q.maps({"trained": attention})["trained"]
            area, _ = judge_map(map_N, q.pixels_N, q.patch_pixels, rows[q.row]["image_id"])
            by_image.setdefault(q.row, []).append(area)
    assert len(by_image) > 3
    assert look.numbers["maps/sdm/map_auroc"] == pytest.approx(np.mean([np.mean(v) for v in by_image.values()]))
    assert look.numbers["maps/kdm/prior_map_auroc"] > 0.8 > look.numbers["maps/kdm/map_auroc"]
    assert {"lesion_lift", "both_lesion_lift", "prior_agreement"} <= {k.split("/")[-1] for k in look.numbers}
    assert any("KDM map AUROC" in words for words in look.words), "random weights localise nothing, and it is said"


def test_images_without_truth_are_judged_by_proxies(reports: ReportEncoder) -> None:
    rows = [{**row, "boxes": [[4, 8, 24, 44], [36, 8, 24, 44]]} for row in phantom_rows(12, truth=False)]
    look = MapWatch(CONFIG, objective(), reports, rows)()
    assert set(look.numbers) == {f"maps/{s}/{m}" for s in ("kdm", "sdm") for m in ("prior_agreement", "lung_lift")}
    assert 0 < look.numbers["maps/kdm/prior_agreement"] < 1 and 0 < look.numbers["maps/sdm/lung_lift"] < 4


def test_training_with_looks_is_bit_equal_to_training_without(reports: ReportEncoder) -> None:
    rows = phantom_rows(8)
    crop: Any = PadCrop(PadCrop.Config(), 64)
    masking = ReportMasking(CONFIG.masking)
    columns, text = centre_columns(rows, crop, reports)
    start = objective()
    ends, watched = [], []
    for every in (0, 1):
        model = copy.deepcopy(start).train()
        samples, draws = centre_samples(columns, text, seed=0)
        batch = to_batch(
            {**columns, **masking.plan(samples, model.encoder.grid, draws)}, crop.views, torch.device("cpu")
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        torch.manual_seed(3)  # the text encoder's dropout draws
        looks = BeforeStep(None, MapWatch(CONFIG, model, reports, rows) if every else None, every)
        for step in range(3):
            watched.append(looks(step).numbers)
            optimizer.zero_grad()
            model(batch).loss.backward()
            optimizer.step()
        assert model.training
        ends.append([*model.parameters(), *model.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    assert watched[:3] == [{}, {}, {}] and all(LOOK_S in numbers for numbers in watched[3:])
    assert watched[3]["maps/kdm/map_auroc"] != watched[5]["maps/kdm/map_auroc"]


def test_chance_is_told_in_words() -> None:
    assert "KDM map AUROC" in in_words("maps/kdm/map_auroc", [0.3, 0.31, 0.29])
    assert "below chance (0.5)" in in_words("maps/kdm/map_auroc", [0.3, 0.31, 0.29])
    assert "not above chance (1.0)" in in_words("maps/sdm/lesion_lift", [0.5, 1.8, 1.0])
    assert "agreement with the anatomy prior is not above" in in_words("maps/sdm/prior_agreement", [0.4, 0.6])
    assert in_words("maps/kdm/map_auroc", [0.8, 0.81, 0.79]) == ""
    assert in_words("maps/kdm/both_map_auroc", [0.1, 0.1]) == "", "the prior is no news"


def test_a_run_without_maps_is_not_watched(tmp_path: Path) -> None:
    assert MapWatch.of_run(CONFIG, torch.nn.Linear(1, 1)) is None
