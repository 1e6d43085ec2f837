"""The same work for both sides: a policy, a reward model, a tokenizer and prompts, written into a folder.

EOS hangs on one weight: the first channel of every embedding is large, so the first channel of the last hidden state is positive for every
text, and `lm_head.weight[eos, 0]` moves the logit of EOS alone. At -4 no response ends before its limit.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

SIZES = {
    "1m": {"vocab_size": 1024, "hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4, "num_attention_heads": 4},
    "15m": {"vocab_size": 8192, "hidden_size": 320, "intermediate_size": 864, "num_hidden_layers": 8, "num_attention_heads": 5},
}
PROMPTS, PROMPT_TOKENS, RESPONSES, NEW_TOKENS = 16, 32, 2, 64


def write(folder: Path, size: str) -> None:
    """policy/, reward/ and prompts.jsonl."""
    torch.manual_seed(0)
    shape = SIZES[size]
    vocabulary = {f"t{index}": index for index in range(shape["vocab_size"])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="t3"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="t0", bos_token="t1", eos_token="t2")
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False, "max_position_embeddings": 2048}
    policy = LlamaForCausalLM(LlamaConfig(**shape, **ids))
    with torch.no_grad():
        policy.model.embed_tokens.weight[:, 0] = 1.0
        policy.lm_head.weight[:, 0] = 0.0
        policy.lm_head.weight[2, 0] = -4.0
    reward = LlamaForSequenceClassification(LlamaConfig(**shape, **ids, num_labels=1))
    for name, model in (("policy", policy), ("reward", reward)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    draw = random.Random(0)
    with (folder / "prompts.jsonl").open("w") as file:
        for _ in range(64 * PROMPTS):
            words = " ".join(f"t{draw.randrange(4, shape['vocab_size'])}" for _ in range(PROMPT_TOKENS))
            file.write(json.dumps({"prompt": words}) + "\n")
