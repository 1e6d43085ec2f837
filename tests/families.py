"""Tiny models from scratch of the families that differ in what matters here: positions, windows, caches, biases, dropout."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

VOCABULARY, PAD, BOS, EOS = 23, 0, 1, 2

_COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_GPT: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _COMMON,
    "gpt2": _GPT,  # learned positions, dropout 0.1 as it comes
    "gpt_neox": {name: value for name, value in _COMMON.items() if name != "num_key_value_heads"},
    "qwen2": _COMMON,
    "qwen3": {**_COMMON, "head_dim": 8},  # queries and keys are normed
    "gemma": {**_COMMON, "head_dim": 8},  # a head wider than hidden / heads may be, scaled embeddings
    "gemma2": {
        **_COMMON,
        "head_dim": 8,
        "sliding_window": 5,
        "attn_implementation": "eager",
    },  # softcapped logits; every other layer slides
    "gemma3_text": {**_COMMON, "head_dim": 8, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    "mistral": {**_COMMON, "sliding_window": 5},  # shorter than the sequences in the tests
    "olmo": _COMMON,
    "olmo2": _COMMON,  # norms after attention and MLP
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 32,
        "max_position_embeddings": 64,
    },
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},  # takes no position_ids
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},  # reads dropout from its config
    "gptj": {**_GPT, "rotary_dim": 4},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},  # no key-value cache
    "jamba": {**_COMMON, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False, "num_experts": 2},  # half a one
    "mixtral": {**_COMMON, "num_local_experts": 2},
    "cohere": {**_COMMON, "logit_scale": 0.5},  # of what its head gives
}
CAUSAL = tuple(FAMILIES)


def config(family: str, **overrides: Any) -> PreTrainedConfig:
    """A tiny config; its weights are drawn wide, so that logits are far from uniform and any slip shows."""
    common = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS, "initializer_range": 0.5}
    return AutoConfig.for_model(family, **{**common, **FAMILIES[family], **overrides})


def causal(family: str, seed: int = 0, **overrides: Any) -> Any:
    """A tiny causal model in eval mode."""
    torch.manual_seed(seed)
    options = {"attn_implementation": "eager"} if family == "gemma2" else {}
    overrides.pop("attn_implementation", None)
    made = config(family, **overrides)
    return AutoModelForCausalLM.from_config(made, **options).eval()


def word_tokenizer(words: list[str], unk: str | None = "<unk>", pad: str | None = "<pad>", eos: str = "<eos>") -> PreTrainedTokenizerBase:
    """One id a word, split at spaces; special tokens first."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    special = list(dict.fromkeys(token for token in (pad, eos, unk) if token is not None))
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*special, *words])}, unk_token=unk))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=eos, unk_token=unk, pad_token=pad, clean_up_tokenization_spaces=False)


def left_padded(lengths: list[int], seed: int = 1, value: int = PAD) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Random prompts without special tokens: the rows, and the same padded on the left with their mask."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(3, VOCABULARY, (length,), generator=generator) for length in lengths]
    tokens, mask = torch.full((len(rows), max(lengths)), value), torch.zeros(len(rows), max(lengths), dtype=torch.bool)
    for i, row in enumerate(rows):
        tokens[i, max(lengths) - len(row) :], mask[i, max(lengths) - len(row) :] = row, True
    return rows, tokens, mask
