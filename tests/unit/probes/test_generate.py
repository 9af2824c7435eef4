"""A tiny language model learns to write what the patches show; its scores are those of the libraries, and bad input."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sacrebleu import corpus_bleu
from sklearn.metrics import f1_score

from medim_ray.config.probe import FitConfig, GenerateConfig, ProbeConfig
from medim_ray.data.phantom import render
from medim_ray.probes.generate import open_lm, train_writer, write_all
from medim_ray.probes.text_metrics import FINDINGS, NO_FINDING, found_in, score_reports
from medim_ray.probes.trainable import PixelPatches
from medim_ray.reports.tagger import Tagger

SENTENCES = (
    "There is a large left pneumothorax.", "The heart is enlarged.", "No acute disease.", "Right pleural effusion."
)  # fmt: skip


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 of two layers with a tokenizer of the sentences' words, as save_pretrained writes it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    words = sorted({word for text in SENTENCES for word in text.replace(".", " .").split()})
    plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<end>", *words])}, unk_token="<end>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path_factory.mktemp("lm")
    PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<end>").save_pretrained(folder)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(words) + 1, n_positions=64, n_embd=32, n_layer=2, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def test_a_writer_with_lora_writes_what_the_patches_show(lm: Path) -> None:
    rng = np.random.default_rng(0)
    kind_K = np.arange(64) % 4
    tokens = torch.from_numpy(rng.normal(0, 0.3, (64, 4, 8))).half()
    tokens[torch.arange(64), :, torch.from_numpy(kind_K)] += 2.0
    reports = [SENTENCES[kind] for kind in kind_K]
    before = {name: value.clone() for name, value in open_lm(str(lm))[0].state_dict().items()}
    config = GenerateConfig(lm=str(lm), lora_rank=8, num_tokens=12, fit=FitConfig(steps=120, batch=16, lr=1e-2))
    learn, choose, judge = slice(0, 40), slice(40, 48), slice(48, 64)
    writer = train_writer(
        PixelPatches(4), tokens[learn], reports[learn], tokens[choose], reports[choose], config, 0, "cpu"
    )
    written = write_all(writer, tokens[judge], "cpu")
    found = score_reports(written, reports[judge], [str(i) for i in range(16)], 50, 0)
    assert found["rouge_l"].value > 0.9 and found["bleu_4"].value > 0.9 and found["micro_f1"].value > 0.9
    base = {name.replace(".base_layer", ""): value for name, value in writer.lm.base_model.model.state_dict().items()}
    assert all(torch.equal(value, base[name]) for name, value in before.items()), "LoRA leaves the model itself alone"
    frozen = GenerateConfig(lm=str(lm), num_tokens=12, fit=FitConfig(steps=2))
    plain = train_writer(
        PixelPatches(4), tokens[learn], reports[learn], tokens[choose], reports[choose], frozen, 0, "cpu"
    )
    assert {name.partition(".")[0] for name, p in plain.named_parameters() if p.requires_grad} == {"projector"}
    assert (
        score_reports(write_all(plain, tokens[judge], "cpu"), reports[judge], list("abcdefghijklmnop"), 5, 0)[
            "rouge_l"
        ].value
        < 0.5
    )


def test_scores_are_those_of_the_libraries() -> None:
    true = [render(i, size=32).report for i in range(24)]
    written = [render(i + (i % 3), size=32).report for i in range(24)]
    patients = [str(i // 2) for i in range(24)]
    found = score_reports(written, true, patients, 40, 0)
    assert found["bleu_4"].value == pytest.approx(
        corpus_bleu(written, [true], lowercase=True, smooth_method="none").score / 100
    )
    assert score_reports(true, true, patients, 5, 0)["bleu_4"].value == pytest.approx(1.0)
    tagger = Tagger()
    flags, truth = (np.stack([found_in(tagger, text) for text in texts]) for texts in (written, true))
    assert found["micro_f1"].value == pytest.approx(f1_score(truth, flags, average="micro"))
    has = truth.any(axis=0)
    assert found["macro_f1"].value == pytest.approx(
        f1_score(truth[:, has], flags[:, has], average="macro", zero_division=0)
    )
    for estimate in found.values():
        low, high = estimate.interval()
        assert 0 < low < estimate.value < high < 1
    nothing = score_reports([""] * 24, true, patients, 5, 0)
    assert nothing["bleu_4"].value == nothing["rouge_l"].value == 0.0


def test_a_text_without_a_word_tells_nothing_not_even_that_nothing_is_there() -> None:
    tagger = Tagger()
    assert found_in(tagger, "The lungs are clear.")[-1]
    assert not any(found_in(tagger, text).any() for text in ("", " \n", "..."))


def test_findings_have_the_names_of_chexpert() -> None:
    tagger = Tagger()
    names = [*FINDINGS, NO_FINDING]
    assert len(names) == 14

    def of(text: str) -> set[str]:
        return {name for name, there in zip(names, found_in(tagger, text), strict=True) if there}

    assert of("Enlarged heart. No pneumothorax. Large pleural effusion.") == {"Cardiomegaly", "Pleural Effusion"}
    assert of("Endotracheal tube in place. Pacemaker.") == {"Support Devices"}
    assert of("No acute disease.") == {NO_FINDING}


def test_the_task_and_its_language_model_come_together(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"probe\.generate\.lm=''.*come together"):
        ProbeConfig(tasks=("generate",))
    with pytest.raises(ValueError, match="come together"):
        ProbeConfig(generate=GenerateConfig(lm="gpt2"))
    with pytest.raises((OSError, ValueError)):
        open_lm(str(tmp_path))
