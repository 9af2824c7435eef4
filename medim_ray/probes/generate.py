"""Report generation: a frozen encoder's patch tokens, an MLP projector, a causal language model of Hugging Face.

RAD-DINO's probe (PAPERS.md). Learned are the projector and, with `lora_rank`, LoRA updates; four fifths of the training
patients are learned from, the others stop it early, held-out images (val and test) are written for, greedily.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from medim_ray.config.probe import GenerateConfig
from medim_ray.data.shards import ShardSet
from medim_ray.draws import Draws
from medim_ray.probes.features import Source
from medim_ray.probes.finetune import read_crops
from medim_ray.probes.results import compared
from medim_ray.probes.rows import RowList, RowReader, list_rows
from medim_ray.probes.segment import HELD_OUT, MAX_CHOOSING, MAX_IMAGES, spread
from medim_ray.probes.text_metrics import NOT_HERE, score_reports
from medim_ray.probes.trainable import Trainable
from medim_ray.probes.tune import fit, seeded

_BATCH = 8
_IGNORED = -100  # of transformers' loss


class Writer(nn.Module):
    """Patch tokens [B, N, D] before the words of a report; the language model is frozen, or has LoRA updates."""

    def __init__(self, width: int, lm: Any, tokenizer: Any, config: GenerateConfig) -> None:
        super().__init__()
        lm.requires_grad_(False)
        if config.lora_rank:
            from peft import LoraConfig, get_peft_model

            lm = get_peft_model(lm, LoraConfig(r=config.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM"))
        self.lm, self._tokenizer, self._config = lm, tokenizer, config
        inner = int(lm.get_input_embeddings().embedding_dim)
        self.projector = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, inner))
        self._end = int(tokenizer.eos_token_id)

    def loss(self, patches_BND: Tensor, reports: Sequence[str]) -> Tensor:
        """Cross-entropy of the words and the end of each report, after its patches."""
        prefix_BNH = self._prefix(patches_BND)
        rows = [[*self._tokenizer(text)["input_ids"][: self._config.num_tokens - 1], self._end] for text in reports]
        longest = max(len(row) for row in rows)
        ids_BT = torch.tensor([row + [self._end] * (longest - len(row)) for row in rows], device=prefix_BNH.device)
        is_word_BT = torch.tensor([[i < len(row) for i in range(longest)] for row in rows], device=prefix_BNH.device)
        ignored_BN = torch.full(prefix_BNH.shape[:2], _IGNORED, device=prefix_BNH.device)
        out = self.lm(
            inputs_embeds=torch.cat([prefix_BNH, self.lm.get_input_embeddings()(ids_BT)], dim=1),
            attention_mask=torch.cat([torch.ones_like(ignored_BN), is_word_BT.long()], dim=1),
            labels=torch.cat([ignored_BN, torch.where(is_word_BT, ids_BT, _IGNORED)], dim=1),
        )
        found: Tensor = out.loss
        return found

    @torch.no_grad()
    def write(self, patches_BND: Tensor) -> list[str]:
        """The likeliest word after each other."""
        prefix_BNH = self._prefix(patches_BND)
        ids_BT = self.lm.generate(
            inputs_embeds=prefix_BNH,
            attention_mask=torch.ones(prefix_BNH.shape[:2], dtype=torch.long, device=prefix_BNH.device),
            max_new_tokens=self._config.num_tokens,
            do_sample=False,
            eos_token_id=self._end,
            pad_token_id=self._end,
        )
        texts: list[str] = self._tokenizer.batch_decode(ids_BT, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def _prefix(self, patches_BND: Tensor) -> Tensor:
        prefix: Tensor = self.projector(patches_BND.float())
        return prefix.to(self.lm.get_input_embeddings().weight.dtype)


def generate(
    shards: ShardSet,
    sources: Mapping[str, Source],
    config: GenerateConfig,
    num_bootstrap: int,
    seed: int,
    use_gpu: bool,
) -> dict[str, Any]:
    """`generation` of result.json. Needs a running Ray.

    Where there is nothing to judge, or the language model can't be loaded here, `note` says why.
    """
    note, learn, choose, judged, reports = _rows(shards, config, seed)
    out: dict[str, Any] = {"note": note, "lm": config.lm, "num_images": 0, "not_available": NOT_HERE, "encoders": {}}
    if not note:
        try:
            open_lm(config.lm)
        except Exception as error:  # hubs, files, formats: as in encoders.py
            why = (str(error).strip() or type(error).__name__).splitlines()[0].replace("https://", "")
            out["note"] = f"the language model {config.lm} is not available here: {why}"
    if out["note"]:
        return out
    rows = list_rows(shards)
    # "DEFAULT": as in scoring.py
    remote = ray.remote(num_cpus=0 if use_gpu else 1, num_gpus=float(use_gpu), scheduling_strategy="DEFAULT")(_task)
    reader = RowReader.of(shards, "image_id", "image")
    parts = [(rows.take(at), [reports[i] for i in at]) for at in (learn, choose, judged)]
    shared = ray.put((reader, parts))
    device = "cuda" if use_gpu else "cpu"
    pending = [remote.remote(source, shared, config, seed, device) for source in sources.values()]
    written = dict(zip(sources, ray.get(pending), strict=True))
    judged_rows, true = parts[2]
    metrics = {
        name: score_reports(texts, true, judged_rows.patient_ids, num_bootstrap, seed)
        for name, texts in written.items()
    }
    facts = {"num_images": len(judged_rows), "num_patients": len(set(judged_rows.patient_ids))}
    return {**out, **facts, **compared(metrics)}


def _rows(
    shards: ShardSet, config: GenerateConfig, seed: int
) -> tuple[str, list[int], list[int], list[int], list[str]]:
    """Why there is nothing to judge or ''; positions of images that are learned from, chosen on and judged; reports."""
    every = list_rows(shards)
    reports = [text or "" for text in shards.read_rows(columns=["report"])["report"].to_pylist()]
    at = [i for i, text in enumerate(reports) if text.strip()]
    train = [i for i in at if every.splits[i] == "train"]
    draws = Draws.of(seed, np.zeros(len(train), dtype=np.int64), [every.patient_ids[i] for i in train])
    of_patient = draws.uniform("probe/generate", 1)[:, 0] if train else np.zeros(0)
    learn = spread([i for i, draw in zip(train, of_patient, strict=True) if draw >= 0.2], MAX_IMAGES)
    choose = spread([i for i, draw in zip(train, of_patient, strict=True) if draw < 0.2], MAX_CHOOSING)
    judged = spread([i for i in at if every.splits[i] in HELD_OUT], config.num_images)
    few = len(learn) < 2 or not choose or len(judged) < 2
    return (
        "too few images with a report in the splits train, val and test" if few else "",
        learn,
        choose,
        judged,
        reports,
    )


def open_lm(where: str) -> tuple[Any, Any]:
    """The language model and its tokenizer, from an id or a folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(where)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {where} has no end-of-text token (eos_token)")
    return AutoModelForCausalLM.from_pretrained(where).eval(), tokenizer


def _task(
    source: Source, shared: tuple[RowReader, list[tuple[RowList, list[str]]]], config: GenerateConfig, seed: int,
    device: str,
) -> list[str]:  # fmt: skip
    """Ray task: the reports that one encoder's writer writes for the judged images."""
    torch.set_num_threads(1 if device == "cpu" else torch.get_num_threads())
    reader, parts = shared
    encoder = source.make(device).trainable().to(device).eval()
    patches = [patches_of(encoder, read_crops(reader, rows, source.crop), device) for rows, _ in parts]
    writer = train_writer(encoder, patches[0], parts[0][1], patches[1], parts[1][1], config, seed, device)
    return write_all(writer, patches[2], device)


@torch.no_grad()
def patches_of(encoder: Trainable, pixels_KHW: NDArray[np.uint8], device: str) -> Tensor:
    """[K, N, D] in half precision, on the CPU."""
    parts = []
    for start in range(0, len(pixels_KHW), _BATCH):
        images = torch.from_numpy(pixels_KHW[start : start + _BATCH]).to(device)[:, None].float() / 255.0
        parts.append(encoder.maps(images)[-1].flatten(2).transpose(1, 2).half().cpu())
    return torch.cat(parts)


def train_writer(
    encoder: Trainable, learn_KND: Tensor, learned: Sequence[str], choose_KND: Tensor, chosen: Sequence[str],
    config: GenerateConfig, seed: int, device: str,
) -> Writer:  # fmt: skip
    """The writer with the smallest loss on what it is chosen on."""
    lm, tokenizer = open_lm(config.lm)
    with seeded(seed):
        writer = Writer(learn_KND.shape[2], lm, tokenizer, config).to(device)

        def loss_of(at: NDArray[np.int64]) -> Tensor:
            return writer.loss(learn_KND[torch.from_numpy(at)].to(device), [learned[i] for i in at])

        def judge() -> float:
            starts = range(0, len(chosen), _BATCH)
            parts = [(choose_KND[i : i + _BATCH].to(device), chosen[i : i + _BATCH]) for i in starts]
            return float(np.mean([float(writer.loss(*part)) for part in parts]))

        fit(encoder, writer, len(learned), loss_of, judge, config.fit, seed, trains=False)
    return writer


def write_all(writer: Writer, patches_KND: Tensor, device: str) -> list[str]:
    """A report for each image."""
    starts = range(0, len(patches_KND), _BATCH)
    return [text for i in starts for text in writer.write(patches_KND[i : i + _BATCH].to(device))]
