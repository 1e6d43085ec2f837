"""The same work for both sides: policy, reward model, tokenizer, prompts and pairs of a case, written into a folder.

How long responses are hangs on one weight. The first channel of every embedding is large and says nothing, and no layer writes to it, so
the first channel of the last hidden state is about the same for every text, and the head's weight of EOS there moves the logit of EOS
alone: so low that no response ends before its limit, or such that it ends with the same chance after every token, 32 tokens on average.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import torch
from cases import MEAN_LENGTH, SHAPES, Case
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

SPECIAL = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
EOS = 2
ROLLOUTS = 64  # prompts are there for so many
LONGEST = 2048


def write(folder: Path, case: Case) -> None:
    """policy/, reward/, prompts.jsonl and pairs.jsonl."""
    torch.manual_seed(0)
    shape = SHAPES[case.size]
    tokenizer = _tokenizer(shape["vocab_size"])
    options: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": EOS, "max_position_embeddings": LONGEST}
    options |= {"tie_word_embeddings": False, **shape}
    reward = LlamaForSequenceClassification(LlamaConfig(**options, num_labels=1))
    reward.save_pretrained(folder / "reward")
    tokenizer.save_pretrained(folder / "reward")
    draw = random.Random(0)
    if case.kind == "reward":
        _write_pairs(folder / "pairs.jsonl", case, draw)
        return
    policy = LlamaForCausalLM(LlamaConfig(**options))
    _set_lengths(policy, case)
    policy.save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "policy")
    with (folder / "prompts.jsonl").open("w") as file:
        for _ in range(ROLLOUTS * case.prompts):
            file.write(json.dumps({"prompt": _words(draw, shape["vocab_size"], case.prompt_tokens)}) + "\n")


def _tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """One word, one token: w4, w5, ..."""
    words = [*SPECIAL.values(), *(f"w{index}" for index in range(len(SPECIAL), vocabulary))]
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=SPECIAL["unk_token"]))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, **SPECIAL)


def _words(draw: random.Random, vocabulary: int, count: int) -> str:
    """They end with a space, so that a response can follow."""
    return "".join(f"w{draw.randrange(len(SPECIAL), vocabulary)} " for _ in range(count))


@torch.no_grad()
def _set_lengths(policy: Any, case: Case) -> None:
    embeddings, head = policy.get_input_embeddings().weight, policy.get_output_embeddings().weight
    embeddings[:, 0] = 1.0
    for layer in policy.model.layers:
        layer.self_attn.o_proj.weight[0] = layer.mlp.down_proj.weight[0] = 0.0
    if head is not embeddings:
        head[:, 0] = 0.0
    level = float(head[0, 0])
    if case.lengths == "fixed":
        head[EOS, 0] = level - 30.0
        return
    head[EOS, 1:] = 0.0
    texts = torch.randint(len(SPECIAL), len(head), (16, case.prompt_tokens + case.new_tokens))
    states = policy.model(input_ids=texts).last_hidden_state[:, case.prompt_tokens :].flatten(0, 1)
    logits = policy.lm_head(states)
    others = torch.cat([logits[:, :EOS], logits[:, EOS + 1 :]], -1).logsumexp(-1)
    for _ in range(20):  # Newton's steps in log-odds, on the mean chance over texts
        chance = (logits[:, EOS] - others).sigmoid().mean()
        step = (math.log(1 / (MEAN_LENGTH - 1)) - chance.logit()) / states[:, 0].mean()
        head[EOS, 0] += step
        logits[:, EOS] += step * states[:, 0]


def _write_pairs(file: Path, case: Case, draw: random.Random) -> None:
    """Prompts of `prompt_tokens`; replies of `new_tokens` with their EOS, or of a 14th of that at least."""
    vocabulary = SHAPES[case.size]["vocab_size"]
    with file.open("w") as lines:
        for _ in range(case.prompts * case.updates):
            prompt = _words(draw, vocabulary, case.prompt_tokens)
            least = case.new_tokens if case.lengths == "fixed" else case.new_tokens // 14
            chosen, rejected = (_words(draw, vocabulary, draw.randint(least, case.new_tokens) - 1).rstrip() for _ in range(2))
            lines.write(json.dumps({"prompt": prompt, "chosen": chosen, "rejected": rejected}) + "\n")
