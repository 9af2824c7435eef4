"""Report encoders: a small BERT from scratch, or any BERT-like model of transformers by hub id or local folder.

Gives [CLS], words (word pieces summed) and the last layer's [CLS] attention on words (PAPERS.md, MedIM). Tokenisers are
loaded here; how one is trained, and which word lies in which mention or sentence, is the matter of medim_ray.reports.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from medim_ray.reports.wordpiece import SPECIAL_TOKENS


class TextFeatures(NamedTuple):
    """What the text encoder returns (a named tuple, because the hooks of ZeRO-3 walk tuples and not dataclasses).

    global_BD: [CLS]. words_BWD: last layer, pieces summed to words; 0 for padding. cls_attention_BW: float32, last
    layer's attention from [CLS], mean over heads, pieces summed; 0 for padding. word_is_pad_BW: no word there.
    """

    global_BD: Tensor
    words_BWD: Tensor
    cls_attention_BW: Tensor
    word_is_pad_BW: Tensor


class TextEncoder(nn.Module):
    """Tokens of reports -> TextFeatures; W = T - 1 places for words. `width` is D.

    Raises ValueError for a path without a BERT-like model, and for a tokenizer or token limit that the model's
    embeddings cannot hold.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        name: Literal["bert", "hf"] = field(
            default="bert", metadata={"help": "bert: small, from scratch; hf: a transformers model from `path`"}
        )
        path: str | None = field(
            default=None, metadata={"help": "hf: hub id or local folder, e.g. emilyalsentzer/Bio_ClinicalBERT"}
        )
        num_tokens: int = field(default=112, metadata={"help": "longest report, [CLS] and [SEP] included (paper: 112)"})
        mesh: str = field(
            default="",
            metadata={
                "help": "NLM MeSH file (desc20xx.xml, d20xx.bin or mtrees20xx.bin; path or URL) whose headings of the "
                "categories A, C and E are tagged beside the bundled chest terms; empty: those alone"
            },
        )
        width: int | None = field(default=None, metadata={"help": "bert: hidden width; null: 128"})
        depth: int | None = field(default=None, metadata={"help": "bert: layers; null: 2"})
        num_heads: int | None = field(default=None, metadata={"help": "bert: heads; null: 2"})
        dropout: float = field(
            default=0.0, metadata={"help": "of states and attention; drawn from torch's generator (BERT's own: 0.1)"}
        )
        trainable: bool = field(default=True, metadata={"help": "false: weights stay as loaded"})

        def __post_init__(self) -> None:
            if self.name not in ("bert", "hf"):
                raise ValueError(f"text.name={self.name!r}: must be 'bert' or 'hf'")
            if self.name == "hf" and not self.path:
                raise ValueError("text.name=hf needs text.path: a hub id or a local folder")
            if self.name == "bert" and self.path:
                raise ValueError(f"text.path={self.path!r}: is read with text.name=hf only; set that or drop the path")
            for key in ("width", "depth", "num_heads"):
                if self.name == "hf" and getattr(self, key) is not None:
                    raise ValueError(f"text.{key}={getattr(self, key)}: the model of text.path has its own; drop it")
            if (self.width or 128) % (self.num_heads or 2):
                raise ValueError(f"text.width={self.width}: must be a multiple of text.num_heads={self.num_heads or 2}")
            if self.num_tokens < 3:
                raise ValueError(f"text.num_tokens={self.num_tokens}: must be at least 3; the paper uses 112")
            if not 0 <= self.dropout < 1:
                raise ValueError(f"text.dropout={self.dropout}: must lie in [0, 1)")

    def __init__(self, config: Config, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        self.model = _from_scratch(config, vocab_size) if config.name == "bert" else _from_path(config, vocab_size)
        self.width = int(self.model.config.hidden_size)
        self.requires_grad_(config.trainable)

    def checkpoint_activations(self) -> None:
        """While it trains, layers keep their inputs for the backward pass; where it is frozen nothing changes."""
        if self.config.trainable:
            self.model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})

    def compile_blocks(self) -> None:
        """Compiles the layers at their first call, but for the last, whose attention is read by hooks."""
        for layer in self.model.encoder.layer[:-1]:
            layer.compile()

    def forward(self, token_ids_BT: Tensor, token_is_pad_BT: Tensor, word_of_token_BT: Tensor) -> TextFeatures:
        """Encode; the arguments are columns TOKEN_IDS, TOKEN_IS_PAD and WORD_OF_TOKEN of medim_ray.types."""
        attention: Any = self.model.encoder.layer[-1].attention.self
        taken: dict[str, Tensor] = {}
        # Queries and keys of the last layer, so that fused attention stays in use everywhere.
        handles = [
            attention.query.register_forward_hook(lambda _m, _i, out: taken.update(q=out)),
            attention.key.register_forward_hook(lambda _m, _i, out: taken.update(k=out)),
        ]
        try:
            states_BTD = self.model(input_ids=token_ids_BT, attention_mask=(~token_is_pad_BT).long()).last_hidden_state
        finally:
            for handle in handles:
                handle.remove()
        with torch.no_grad():
            num_heads = attention.num_attention_heads
            query_BHd = taken["q"][:, 0].float().unflatten(-1, (num_heads, -1))
            key_BTHd = taken["k"].float().unflatten(-1, (num_heads, -1))
            logits_BHT = torch.einsum("bhd,bthd->bht", query_BHd, key_BTHd) / query_BHd.shape[-1] ** 0.5
            logits_BHT = logits_BHT.masked_fill(token_is_pad_BT[:, None], -torch.inf)
            cls_BT = logits_BHT.softmax(dim=-1).mean(dim=1)
        # Pieces are summed by a product with a 0/1 matrix: unlike scatter_add it is deterministic on every device.
        word_W = torch.arange(token_ids_BT.shape[1] - 1, device=token_ids_BT.device)
        is_piece_BWT = word_of_token_BT[:, None, :] == word_W[None, :, None]
        return TextFeatures(
            states_BTD[:, 0],
            torch.bmm(is_piece_BWT.to(states_BTD.dtype), states_BTD),
            torch.einsum("bwt,bt->bw", is_piece_BWT.float(), cls_BT),
            ~is_piece_BWT.any(dim=2),
        )


def _from_scratch(config: TextEncoder.Config, vocab_size: int) -> Any:
    import transformers

    width = config.width or 128
    bert = transformers.BertConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        num_hidden_layers=config.depth or 2,
        num_attention_heads=config.num_heads or 2,
        intermediate_size=4 * width,
        max_position_embeddings=config.num_tokens,
        hidden_dropout_prob=config.dropout,
        attention_probs_dropout_prob=config.dropout,
        attn_implementation="sdpa",
    )
    return transformers.BertModel(bert, add_pooling_layer=False)


def _from_path(config: TextEncoder.Config, vocab_size: int) -> Any:
    import transformers

    where = f"text.path={config.path!r}"
    try:
        own = transformers.AutoConfig.from_pretrained(config.path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{where}: no configuration of a transformers model there ({_line(error)})") from None
    if own.model_type not in ("bert", "roberta"):
        raise ValueError(f"{where}: is a {own.model_type}; must be a BERT or RoBERTa encoder")
    own.hidden_dropout_prob = own.attention_probs_dropout_prob = config.dropout
    # RoBERTa numbers positions from padding_idx + 1 on.
    num_positions = own.max_position_embeddings - (own.pad_token_id + 1 if own.model_type == "roberta" else 0)
    if config.num_tokens > num_positions:
        raise ValueError(f"text.num_tokens={config.num_tokens}: {config.path} has {num_positions} positions; use fewer")
    if vocab_size > own.vocab_size:
        raise ValueError(
            f"{where}: {own.vocab_size} embeddings for a tokenizer of {vocab_size}; take both from one path"
        )
    try:
        model, report = transformers.AutoModel.from_pretrained(
            config.path,
            config=own,
            add_pooling_layer=False,
            attn_implementation="sdpa",
            dtype=torch.float32,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{where}: no readable weights there ({_line(error)})") from None
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ValueError(
            f"{where}: {len(missing)} weights are missing, e.g. {missing[:3]}; the file is no whole encoder"
        )
    return model


def _line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def load_tokenizer(config: TextEncoder.Config, folder: str | Path) -> Any:
    """The run's fast tokenizer: `folder`, where `train_tokenizer` wrote, for bert; from text.path for hf.

    Raises ValueError where there is none.
    """
    import transformers

    if config.name == "bert":
        file = Path(folder) / "tokenizer.json"
        if not folder or not file.is_file():
            raise ValueError(
                "text.name=bert needs the vocabulary that `medim-ray prepare` trains on the reports, and these shards "
                "have none: prepare them from a source with reports, or use text.name=hf with text.path"
            )
        return transformers.PreTrainedTokenizerFast(tokenizer_file=str(file), **SPECIAL_TOKENS)
    path = Path(str(config.path))
    tokenizer_files = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model")
    if path.is_dir() and not any((path / name).is_file() for name in tokenizer_files):
        raise ValueError(f"text.path={config.path!r}: the folder has no tokenizer; it needs one of {tokenizer_files}")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(config.path, use_fast=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"text.path={config.path!r}: no readable tokenizer there ({_line(error)})") from None
    if not tokenizer.is_fast:
        raise ValueError(f"text.path={config.path!r}: its tokenizer has no fast form; save one with tokenizer.json")
    return tokenizer
