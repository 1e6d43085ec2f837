"""Reward sources: a reward model, a Python function with TRL's signature, or a weighted sum of several.

A score is one number a response; P3O reads only differences between the responses of one prompt, so a source's zero point
does not matter.
"""

from __future__ import annotations

import asyncio
import copy
import importlib
import inspect
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from p3o_lightning.batches import PromptBatch
from p3o_lightning.encoding import encode_prompt, encode_response
from p3o_lightning.errors import InputError
from p3o_lightning.models import eval_mode, load_reward_backbone, load_tokenizer, sequence_scores
from p3o_lightning.sequences import pad_right

RewardFunction = Callable[..., Any]
RewardInput = str | Path | RewardFunction | nn.Module


class Responses(NamedTuple):
    """What a reward source sees: prompts as in the data, and what was sampled for each."""

    prompts: PromptBatch
    tokens: Int[Tensor, "prompt response token"]
    mask: Bool[Tensor, "prompt response token"]
    texts: list[list[str]]  # without special tokens


class FunctionReward:
    """A Python function `f(prompts, completions, completion_ids, **columns) -> list[float | None]`, as in TRL; it may be async.

    `completions` are strings, or for conversational prompts lists of one assistant message. None says that the function does
    not apply; the prompt's responses then all get 0 from it, since a gap between a scored and an unscored response means nothing.
    """

    def __init__(self, function: RewardFunction) -> None:
        self.function = function
        self.name = getattr(function, "__name__", type(function).__name__)
        self.network: nn.Module | None = None

    def __call__(self, responses: Responses) -> Float[Tensor, "prompt response"]:
        """One score a response, in the function's own units."""
        prompts, count = responses.prompts.prompts, responses.tokens.shape[1]
        repeated = [prompt for prompt in prompts for _ in range(count)]
        texts: list[Any] = [text for group in responses.texts for text in group]
        completions = [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(repeated, texts, strict=True)
        ]
        ids = [row[kept].tolist() for row, kept in zip(responses.tokens.flatten(0, 1), responses.mask.flatten(0, 1), strict=True)]
        columns = {name: [value for value in values for _ in range(count)] for name, values in responses.prompts.columns.items()}
        answer = self.function(prompts=repeated, completions=completions, completion_ids=ids, **columns)
        if inspect.isawaitable(answer):
            answer = asyncio.run(_wait(answer))
        return self._checked(answer, len(prompts), count)

    def _checked(self, answer: Any, prompts: int, count: int) -> Tensor:
        field = f"model.reward_funcs: {self.name}"
        values = answer.tolist() if hasattr(answer, "tolist") else answer
        if not isinstance(values, Sequence) or isinstance(values, str):
            raise InputError(f"{field} returned {type(answer).__name__} {str(answer)[:60]!r}: return a list of {prompts * count} numbers.")
        if len(values) != prompts * count:
            raise InputError(f"{field} returned {len(values)} scores for {prompts * count} completions: return one for each, in order.")
        for index, value in enumerate(values):
            if value is not None and (isinstance(value, bool | str) or not hasattr(value, "__float__")):
                raise InputError(f"{field} returned {value!r} at position {index}: return a float, or None where it does not apply.")
            if value is not None and not math.isfinite(float(value)):
                raise InputError(f"{field} returned {float(value)} at position {index}: return a finite number, or None.")
        scores = torch.tensor([math.nan if value is None else float(value) for value in values]).view(prompts, count)
        return torch.where(scores.isnan().any(1, keepdim=True), 0.0, scores)


async def _wait(answer: Any) -> Any:
    return await answer


class ModelReward:
    """A scalar-head model. It reads the sampled tokens themselves if it shares the policy's tokenizer, else the text, encoded anew.

    Either way the sequence ends as its training text ended: with EOS where the response ended, without where it was cut off.
    """

    batch_rows = 32

    def __init__(
        self, network: PreTrainedModel | nn.Module, tokenizer: PreTrainedTokenizerBase, policy_tokenizer: PreTrainedTokenizerBase, name: str
    ):
        self.network: nn.Module | None = network.eval().requires_grad_(False)
        self.tokenizer, self.policy_tokenizer, self.name = tokenizer, policy_tokenizer, name
        self.same_tokens = same_tokenizer(tokenizer, policy_tokenizer)

    @torch.no_grad()
    def __call__(self, responses: Responses) -> Float[Tensor, "prompt response"]:
        """Rewards in the model's logits, float32."""
        assert self.network is not None
        rows = self._token_rows(responses) if self.same_tokens else self._encoded_rows(responses)
        device = next(self.network.parameters()).device
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # neighbours of like length: little padding
        scores = torch.empty(len(rows))
        with eval_mode(self.network):
            for start in range(0, len(order), self.batch_rows):
                chunk = order[start : start + self.batch_rows]
                tokens, mask = pad_right([rows[i] for i in chunk], self.tokenizer.pad_token_id)
                scores[chunk] = sequence_scores(self.network, tokens.to(device), mask.to(device)).cpu()
        return scores.view(responses.tokens.shape[:2])

    def _token_rows(self, responses: Responses) -> list[list[int]]:
        rows = []
        for i, (prompt, kept) in enumerate(zip(responses.prompts.tokens, responses.prompts.attention_mask, strict=True)):
            head = prompt[kept].tolist()
            rows += [head + tokens[real].tolist() for tokens, real in zip(responses.tokens[i], responses.mask[i], strict=True)]
        return rows

    def _encoded_rows(self, responses: Responses) -> list[list[int]]:
        """Prompt and response in the reward model's own tokens, each encoded alone as in its training data."""
        rows = []
        for i, prompt in enumerate(responses.prompts.prompts):
            head = encode_prompt(self.tokenizer, prompt)
            for text, tokens, real in zip(responses.texts[i], responses.tokens[i], responses.mask[i], strict=True):
                ended = bool((tokens[real][-1:] == self.policy_tokenizer.eos_token_id).any())
                body = encode_response(self.tokenizer, text)
                rows.append([*head, *(body if ended else body[:-1])])
        return rows


def same_tokenizer(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether both give the same ids to the same text and end it alike; a padding token of its own does not count."""
    if one is other:
        return True
    probe = "Human: what's 3.5 x 12?\n\nAssistant:  42 \u00e9\u4e2d\U0001f600"
    return (
        one.eos_token_id == other.eos_token_id
        and one.bos_token_id == other.bos_token_id
        and one(probe)["input_ids"] == other(probe)["input_ids"]
        and {t: i for t, i in one.get_vocab().items() if t != one.pad_token}
        == {t: i for t, i in other.get_vocab().items() if t != one.pad_token}
    )


class RewardSum:
    """Several sources with weights: the score is the weighted sum."""

    def __init__(self, sources: Sequence[FunctionReward | ModelReward], weights: Sequence[float] | None) -> None:
        self.sources = list(sources)
        self.weights = [1.0] * len(self.sources) if weights is None else [float(weight) for weight in weights]
        if len(self.weights) != len(self.sources):
            raise InputError(
                f"model.reward_weights has {len(self.weights)} values for {len(self.sources)} reward_funcs: give one for each."
            )

    @property
    def networks(self) -> list[nn.Module]:
        """The frozen models among the sources, to be moved to the device with the policy."""
        return [source.network for source in self.sources if source.network is not None]

    def __call__(self, responses: Responses) -> tuple[Float[Tensor, "prompt response"], dict[str, Tensor]]:
        """The weighted sum, and each source's own scores by name."""
        each = {source.name: source(responses) for source in self.sources}
        total = torch.stack([weight * scores for weight, scores in zip(self.weights, each.values(), strict=True)]).sum(0)
        return total, each


def reward_sources(
    reward_funcs: RewardInput | Sequence[RewardInput], weights: Sequence[float] | None, tokenizer: PreTrainedTokenizerBase, dtype: str
) -> RewardSum:
    """Load every source. `tokenizer` is the policy's; `dtype` that of models loaded from a path."""
    given = list(reward_funcs) if isinstance(reward_funcs, list | tuple) else [reward_funcs]
    if not given:
        raise InputError("model.reward_funcs is empty: give a reward model (folder or checkpoint) or a Python function.")
    sources = [_source(item, tokenizer, dtype) for item in given]
    for i, source in enumerate(sources):  # names are tags of the dashboard: make them distinct
        if source.name in [other.name for other in sources[:i]]:
            source.name = f"{source.name}_{i}"
    return RewardSum(sources, weights)


def _source(item: Any, tokenizer: PreTrainedTokenizerBase, dtype: str) -> FunctionReward | ModelReward:
    if isinstance(item, nn.Module):
        network = getattr(item, "model", item) if hasattr(item, "tokenizer") else item
        own = getattr(item, "tokenizer", tokenizer)
        return ModelReward(copy.deepcopy(network), own, tokenizer, type(item).__name__)
    if callable(item):
        return FunctionReward(item)
    path = Path(str(item))
    if path.exists() or path.suffix in (".ckpt", ".gguf") or "/" in str(item):
        own = load_tokenizer(path if path.exists() else str(item))
        return ModelReward(
            load_reward_backbone(str(item), own, dtype), own, tokenizer, path.parent.parent.name if path.suffix == ".ckpt" else path.name
        )
    return FunctionReward(_imported(str(item)))


def _imported(name: str) -> RewardFunction:
    """The function that a dotted name such as `my_rewards.politeness` stands for."""
    module, _, attribute = name.rpartition(".")
    fix = "give a folder, a checkpoint, a hub name with a '/', or a dotted name such as my_rewards.politeness of a function"
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"model.reward_funcs is {name!r}, which could not be imported ({error}): {fix}.") from error
    if not callable(function):
        raise InputError(f"model.reward_funcs is {name!r}, which is a {type(function).__name__}: {fix}.")
    return function


def share_of_letter_e(completions: list[Any], **_: Any) -> list[float]:
    """A toy reward with a known best answer, for debug runs: the share of a completion's characters that are "e", in [0, 1]."""
    texts = [text if isinstance(text, str) else text[-1]["content"] for text in completions]
    return [text.count("e") / max(len(text), 1) for text in texts]
