"""Probe, mask gallery and report of a small real run on phantoms: on real Ray, and looked at in a real browser."""

from __future__ import annotations

import io
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from rich.console import Console
from sklearn.metrics import roc_auc_score

from medim_ray.cli import main
from medim_ray.config.loader import load
from medim_ray.config.probe import ProbeConfig, SegmentConfig, TuneConfig
from medim_ray.config.schema import RunConfig, ValidateConfig
from medim_ray.data.ingest import PrepareConfig, prepare
from medim_ray.data.shards import ShardSet
from medim_ray.probes import segment
from medim_ray.probes.command import run_probe
from medim_ray.probes.encoders import open_encoders
from medim_ray.probes.features import extract
from medim_ray.probes.results import read_scores
from medim_ray.probes.rows import RowReader, centre_columns, list_rows, work_items
from medim_ray.probes.validate import validate
from medim_ray.studies.gallery import write_gallery
from medim_ray.studies.report import write_report
from medim_ray.train.build import build_crop
from medim_ray.train.launch import launch
from medim_ray.train.runs import find_checkpoint, load_run
from medim_ray.train.store import CheckpointStore
from tests.system.browser import LOOKS, check_in_browser, needs_chromium

pytestmark = pytest.mark.system
ROOT = Path(__file__).parents[2]
NUM_IMAGES = 120


@pytest.fixture(scope="module")
def run_dir(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two steps of MedIM on one worker: the masks are near those of random weights, the machinery is real."""
    folder = tmp_path_factory.mktemp("probe")
    shards = str(folder / "shards")
    prepare(load(PrepareConfig, None, [
        "source.name=phantom", f"source.num_images={NUM_IMAGES}", "source.size=96", "split.train=0.6", "split.val=0.2",
        "split.test=0.2", "source.anatomy=true", "shards.row_group_rows=16", "shards.rows_per_file=32", f"out={shards}",
    ]))  # fmt: skip
    run = str(folder / "run")
    config = load(RunConfig, ROOT / "configs/debug/medim-vit_tiny-2w-z1.yaml", [
        f"data.shards={shards}", f"run.dir={run}", "encoder.image_size=64", "encoder.depth=2", "train.steps=2",
        "train.num_workers=1", "train.zero=0", "track.aim=false",
    ])  # fmt: skip
    assert launch(config, Console(file=io.StringIO())).finished
    return run


def _tiny_dinov2(folder: Path) -> Path:
    """A Hugging Face folder, as save_pretrained writes it."""
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14
    )
    transformers.Dinov2Model(config).save_pretrained(folder / "tiny-dinov2")
    return folder / "tiny-dinov2"


@pytest.fixture(scope="module")
def probed(run_dir: str) -> tuple[dict[str, Any], str]:
    """result.json's content and what was printed."""
    out = io.StringIO()
    others = (f"hf:{_tiny_dinov2(Path(run_dir).parent)}", f"run:{run_dir}", "timm:vit_tiny_patch16_224", "hf:no/such")
    config = ProbeConfig(
        labels=("view", "sex", "cardiomegaly", "age"),
        num_bootstrap=200,
        num_folds=3,
        encoders=others,
        fractions=(0.1,),
        segment=SegmentConfig(heads=("linear", "setr"), targets=("any lesion", "lung"), tune=TuneConfig(steps=20)),
    )
    return run_probe(run_dir, config, console=Console(file=out, width=140)), out.getvalue()


def test_a_validation_during_the_run_has_the_numbers_of_the_probe(
    run_dir: str, probed: tuple[dict[str, Any], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the images of the probe; its own are those without the split test."""
    result, _ = probed
    asked = ValidateConfig(
        labels=("view", "age"), retrieve=True, segment=("any lesion",), best_by="recall_at_10", num_images=NUM_IMAGES
    )
    with monkeypatch.context() as patch:
        patch.setattr("medim_ray.probes.validate._sample", lambda shards, num_images: list_rows(shards))
        found = validate(run_dir, result["checkpoint"], asked)
    assert set(found) == {"view", "knn_view", "mean", "knn_mean", "r2_age", "recall_at_10", "dice_any lesion"}
    ways = [way["encoders"]["trained"]["recall_at_10"]["value"] for way in result["retrieval"]["directions"].values()]
    assert found["recall_at_10"] == pytest.approx(np.mean(ways))
    dice = result["segmentation"]["targets"]["any lesion"]["encoders"]["trained"]["dice"]["value"]
    assert found["dice_any lesion"] == pytest.approx(dice, abs=1e-3)
    sample = validate(run_dir, result["checkpoint"], replace(asked, num_images=NUM_IMAGES * 2 // 3))
    assert set(sample) == set(found) and 0.0 <= sample["dice_any lesion"] <= 1.0
    with pytest.raises(ValueError, match="best_by='auroc'"):
        ValidateConfig(labels=("view",), best_by="auroc")


def test_a_sample_is_cut_before_the_images_to_learn_from_are(run_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many more the shards hold: what is chosen on is part of the sample, and it is not thinned twice."""
    shards = load_run(run_dir).shards
    every = list_rows(shards)
    sample = every.take(range(0, len(every), 2))
    monkeypatch.setattr(segment, "MAX_IMAGES", 12)
    monkeypatch.setattr(segment, "MAX_CHOOSING", 2)
    rows = segment.segment_rows(shards, sample, 0)
    assert rows.chosen <= set(rows.learned.image_ids) <= set(sample.image_ids)
    assert (len(rows.chosen), len(rows.learned)) == (2, 14)


def test_probe_stands_beside_untrained_and_pixels_with_intervals(
    run_dir: str, probed: tuple[dict[str, Any], str]
) -> None:
    result, printed = probed
    assert json.loads(Path(run_dir, "result.json").read_text()) == result
    assert result["step"] == 2 and result["checkpoint"].startswith("step-00000002")
    assert list(result["labels"]) == ["view", "sex", "cardiomegaly"]
    assert list(result["regression"]) == ["age"] and "predicting the mean" in printed
    assert list(result["not_available"]) == ["timm:vit_tiny_patch16_224", "hf:no/such"]
    assert "hf:no/such: not available here: " in printed and all(result["not_available"].values())
    hub, same = (name for name in result["labels"]["view"]["encoders"] if ":" in name)
    assert hub.startswith("hf:") and same == f"run:{run_dir}"
    for label, task in result["labels"].items():
        assert list(task["encoders"]) == ["trained", "untrained", "pixels", hub, same]
        assert task["encoders"][same] == task["encoders"]["trained"], "the same weights by another name"
        assert task["trained_minus"][same]["auroc"] == {"value": 0.0, "low": 0.0, "high": 0.0}
        assert set(task["knn"]["encoders"]) == set(task["encoders"])
        (share,) = task["fractions"]
        assert share["fraction"] == 0.1 and share["num_images"] < 0.12 * NUM_IMAGES
        assert len(share["draws"]["trained"]["auroc"]) == 3
        assert task["num_images"] == sum(task["counts"].values()) == NUM_IMAGES
        assert 30 < task["num_patients"] < NUM_IMAGES
        for numbers in task["encoders"].values():
            for metric in ("auroc", "auprc"):
                assert 0 <= numbers[metric]["low"] <= numbers[metric]["value"] <= numbers[metric]["high"] <= 1
        assert label in printed
    assert all(word in printed for word in ("trained", "untrained", "raw pixels", "AUROC", "AUPRC", "folds by patient"))
    assert result["labels"]["view"]["classes"] == ["PA", "AP"]
    of_labels = [task["encoders"]["trained"]["auroc"]["value"] for task in result["labels"].values()]
    assert result["mean"]["num_labels"] == 3 and "mean of 3 labels" in printed
    assert result["mean"]["encoders"]["trained"]["auroc"]["value"] == pytest.approx(np.mean(of_labels))
    for numbers in result["mean"]["trained_minus_untrained"].values():
        assert numbers["low"] < numbers["value"] < numbers["high"]


def test_a_checkpoint_is_named_by_its_step_or_as_the_best(run_dir: str) -> None:
    (name,) = CheckpointStore(run_dir).names()
    assert find_checkpoint(run_dir, "latest") == "" and find_checkpoint(run_dir, "2") == name
    for which, message in (
        ("best", "no checkpoint was validated"),
        ("3", "no checkpoint of this step"),
        ("x", "a step"),
    ):
        with pytest.raises(ValueError, match=message):
            find_checkpoint(run_dir, which)
    assert main(["export", f"run={run_dir}", "checkpoint=2", f"out={run_dir}/step-2"]) == 0
    assert main(["export", f"run={run_dir}", "checkpoint=7", f"out={run_dir}/step-7"]) == 2


def test_scores_and_splits_are_published_and_a_second_probe_takes_features_from_the_cache(
    run_dir: str, probed: tuple[dict[str, Any], str]
) -> None:
    result, _ = probed
    table = read_scores(run_dir).to_pandas()
    assert len(table) == 4 * 5 * NUM_IMAGES
    own = table[(table["label"] == "cardiomegaly") & (table["encoder"] == "trained")]
    scores, positive = np.stack(own["scores"])[:, 1], (own["class"] == "1").to_numpy()
    expected = result["labels"]["cardiomegaly"]["encoders"]["trained"]["auroc"]["value"]
    assert roc_auc_score(positive, scores) == pytest.approx(expected)
    splits = pq.read_table(f"{run_dir}/probe_splits.parquet").to_pandas()
    assert set(splits["part"]) == {"fold 0", "fold 1", "fold 2"} and len(splits) == 4 * NUM_IMAGES
    assert splits.groupby(["label", "patient_id"])["part"].nunique().max() == 1
    out = io.StringIO()
    kept = {name: Path(run_dir, name).read_bytes() for name in ("result.json", "probe_scores.parquet")}
    config = ProbeConfig(tasks=("labels",), labels=("cardiomegaly",), num_bootstrap=200, num_folds=3)
    again = run_probe(run_dir, config, console=Console(file=out, width=140))
    assert "by 3 encoders, 3 of them from the cache" in out.getvalue()
    assert (
        again["labels"]["cardiomegaly"]["encoders"]["trained"]
        == (result["labels"]["cardiomegaly"]["encoders"]["trained"])
    )
    for name, content in kept.items():
        Path(run_dir, name).write_bytes(content)


def test_images_and_reports_find_each_other_as_well_as_chance_after_two_steps(
    probed: tuple[dict[str, Any], str],
) -> None:
    result, printed = probed
    found = result["retrieval"]
    assert 30 < found["num_images"] < 0.6 * NUM_IMAGES and "raw pixels" in found["note"]
    for facts in found["directions"].values():
        assert list(facts["encoders"]) == ["trained", "untrained"]
        for numbers in facts["encoders"].values():
            recall = [numbers[f"recall_at_{k}"]["value"] for k in (1, 5, 10)]
            assert recall == sorted(recall)
            assert 0.4 < numbers["median_rank"]["value"] / facts["chance"]["median_rank"] < 1.6
        assert 0.01 < facts["chance"]["recall_at_1"] < 0.1
    assert "to report" in printed and "chance" in printed
    zero_shot = result["zero_shot"]["labels"]
    assert {"cardiomegaly", "effusion"} <= set(zero_shot) and "view" not in zero_shot
    assert all(0.05 < facts["encoders"]["trained"]["auroc"]["value"] < 0.95 for facts in zero_shot.values())


def test_patch_tokens_are_judged_on_the_pixels_of_held_out_lesions(probed: tuple[dict[str, Any], str]) -> None:
    result, printed = probed
    found = result["segmentation"]
    facts = found["targets"]["any lesion"]
    assert found["note"] == "" and facts["num_with"] + facts["num_without"] == found["num_images"]
    assert len(facts["encoders"]) == 5 and facts["num_with"] > 15 < found["num_patients"]
    for numbers in facts["encoders"].values():
        assert 0.05 < numbers["dice"]["low"] < numbers["dice"]["value"] < numbers["dice"]["high"] < 0.8
        assert numbers["dice_with_empty"]["value"] < 0.9
    assert 0.02 < facts["whole_image"]["value"] < 0.4
    assert "whole image" in printed and "any lesion" in printed and "SETR-PUP on a frozen encoder" in printed
    lung = found["heads"]["setr"]["lung"]
    assert lung["note"] == "" and lung["num_with"] == found["num_images"] and len(lung["encoders"]) == 5
    assert lung["whole_image"] == found["targets"]["lung"]["whole_image"], "the same images, the same masks"
    for numbers in lung["encoders"].values():
        assert lung["whole_image"]["value"] + 0.1 < numbers["dice"]["low"] < numbers["dice"]["value"] < 1


def test_localisation_is_judged_on_held_out_truth(probed: tuple[dict[str, Any], str]) -> None:
    result, printed = probed
    found = result["localisation"]
    assert found["note"] == "" and 20 <= found["num_images"] <= 0.6 * NUM_IMAGES
    assert set(found["strategies"]) == {"kdm", "sdm"}
    for sources in found["strategies"].values():
        for metrics in (sources["trained"], sources["untrained"]):
            assert 0 < metrics["map_auroc"]["value"] < 1 and 0 < metrics["lesion_lift"]["value"] < 3.7
            assert metrics["map_auroc"]["low"] < metrics["map_auroc"]["value"] < metrics["map_auroc"]["high"]
        assert list(sources) == ["trained", "untrained", "prior", "both"]
        assert sources["prior"]["lesion_lift"]["low"] > 1.8 and sources["prior"]["map_auroc"]["low"] > 0.8
        assert sources["both"]["map_auroc"]["value"] > sources["trained"]["map_auroc"]["value"]
    assert set(found["both_minus_prior"]) == {"kdm", "sdm"}
    assert "KDM" in printed and "lesion lift" in printed
    assert found["warnings"], "two steps teach no map, and that is said in words"
    assert "warning: " in printed


def test_features_are_those_of_a_plain_forward_in_the_order_of_the_rows(run_dir: str) -> None:
    run = load_run(run_dir)
    crop = build_crop(run.config)
    rows = list_rows(run.shards).where(lambda split, labels: split == "val" and labels["sex"] == "F")
    assert len(rows) > 5
    sources = open_encoders(run, load_run(run_dir, trained=False), ()).sources
    features = extract(run.shards, rows, sources).features
    reader = RowReader.of(run.shards, "image_id", "image")
    for item in work_items(rows):
        stored = reader(item)
        assert [row["image_id"] for row in stored] == [rows.image_ids[i] for i in item["positions"]]
        columns, _ = centre_columns(stored, crop, None)
        pixels = columns["view/image"][:, 0]
        with torch.no_grad():
            out = run.objective.encoder(torch.from_numpy(pixels)[:, None].float() / 255.0)
        expected = torch.cat([out.global_BD, out.patches_BND.mean(dim=1)], dim=1).numpy()
        np.testing.assert_allclose(features["trained"][item["positions"]], expected, atol=2e-5)
        small = pixels.reshape(-1, 32, 2, 32, 2).mean(axis=(2, 4)).reshape(len(pixels), -1) / 255.0
        np.testing.assert_allclose(features["pixels"][item["positions"]], small, atol=0.5 / 255 + 1e-6)


@pytest.mark.parametrize(
    ("label", "message"),
    [("vew", "did you mean 'view'"), ("agegroup", "choose among|did you mean")],
)
def test_a_label_that_cannot_be_probed_is_refused_before_any_work(run_dir: str, label: str, message: str) -> None:
    before = Path(run_dir, "result.json").exists()
    with pytest.raises(ValueError, match=message):
        run_probe(run_dir, ProbeConfig(labels=(label,)), console=Console(file=io.StringIO()))
    assert Path(run_dir, "result.json").exists() == before


# --- Pages -----------------------------------------------------------------------------------------------------


class _Page(HTMLParser):
    """Collects what a page refers to, its ids, and elements that should not be empty."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.ids: list[str] = []
        self.counts: dict[str, int] = {}
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "srcset", "action") and value is not None:
                self.references.append(value)
            if name == "id" and value is not None:
                self.ids.append(value)

    def handle_data(self, data: str) -> None:
        self.text += data


def _check(path: str) -> _Page:
    """Self-contained, no double ids, no dangling reference, nothing unrendered."""
    text = Path(path).read_text(encoding="utf-8")
    page = _Page(text)
    assert all(ref.startswith(("data:", "#")) for ref in page.references), "the page refers to something outside"
    assert "http://" not in text and "https://" not in text and "@import" not in text
    assert len(page.ids) == len(set(page.ids))
    inside = [ref[1:] for ref in page.references if ref.startswith("#")]
    inside += re.findall(r"url\(#([^)]+)\)", text)
    assert set(inside) <= set(page.ids)
    for unrendered in ("{{", "{%", ">nan", ">None<", "nan [", "[nan"):
        assert unrendered not in text, unrendered
    return page


def test_report_is_whole_and_self_contained(run_dir: str, probed: tuple[dict[str, Any], str]) -> None:
    path = write_report(run_dir, num_images=4)
    assert path == f"{run_dir}/report.html"
    page = _check(path)
    words = " ".join(page.text.split())
    for expected in (
        "What the frozen encoder knows", "Do the maps find the lesions?", "Loss and its terms", "Throughput",
        "KDM map", "SDM hides", "anatomy hides", "uniform hides", "True lesions", "SDM sentence", "raw pixels",
        "Nearest neighbours", "Right and wrong, sure and unsure", "Fewer labels", "Numbers", "predicting the mean",
        "Do images and reports find each other?", "Findings from sentences alone",
        "Does a patch token know the lesion?", "is not available here",
        "num_prototypes: 64", "2 of 2 steps", "run_hash", "cardiomegaly", "view (AP)",
    ):  # fmt: skip
        assert expected in words, expected
    assert page.counts["article"] == 4
    assert page.counts["svg"] >= 4 * 6 + 8, "a panel or a curve is missing"


def test_gallery_of_more_images_than_there_are_shows_all_and_can_leave_out_the_text(
    run_dir: str, tmp_path: Path
) -> None:
    out = str(tmp_path / "masks.html")
    assert write_gallery(run_dir, num=10_000, out=out) == out
    assert _check(out).counts["article"] == NUM_IMAGES
    assert all(word in Path(out).read_text() for word in ("SDM sentence", "Mentions (", "Sentences ("))
    write_gallery(run_dir, num=3, out=out, text=False)
    page = _check(out)
    assert page.counts["article"] == 3
    assert "Mentions (" not in page.text
    sentences = ShardSet.open(load_run(run_dir).config.data.shards).read_rows(columns=["sentences"])["sentences"]
    assert not any(sentence in page.text for row in sentences.to_pylist() for sentence in row if len(sentence) > 12)
    with pytest.raises(ValueError, match="num=0"):
        write_gallery(run_dir, num=0, out=out)


def test_a_run_that_has_only_begun_gets_a_report_without_empty_panels(run_dir: str, tmp_path: Path) -> None:
    shutil.copy(Path(run_dir, "config.yaml"), tmp_path)
    page = _check(write_report(str(tmp_path)))
    words = " ".join(page.text.split())
    for expected in ("Not probed yet", "No step is recorded yet", "No checkpoint is committed yet"):
        assert expected in words
    assert "figure" not in page.counts and "table" not in page.counts
    with pytest.raises(ValueError, match="not a run folder"):
        write_report(str(tmp_path / "nothing"))


@needs_chromium
@pytest.mark.parametrize(("width", "dark"), LOOKS)
def test_report_in_a_browser(
    run_dir: str, probed: tuple[dict[str, Any], str], tmp_path: Path, width: int, dark: bool
) -> None:
    text = Path(write_report(run_dir, num_images=3)).read_text(encoding="utf-8")
    check_in_browser(text, tmp_path, width, dark)
