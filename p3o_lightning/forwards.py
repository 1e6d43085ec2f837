"""Running a model: log-probabilities of completions under a policy, scores of sequences under a reward model, dropout off."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel


def is_adapted(model: Any) -> bool:
    """Whether the model carries PEFT adapters."""
    return hasattr(model, "peft_config") and hasattr(model, "disable_adapter")


def unwrapped(model: nn.Module) -> Any:
    """The transformers model inside PEFT's wrapper, or the model itself."""
    return model.get_base_model() if is_adapted(model) else model  # type: ignore[operator]


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Dropout off inside; each submodule's own mode restored after."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def turn_dropout_off(model: nn.Module) -> None:
    """Make train mode deterministic: dropout modules, float attributes that attention reads, and configs that it reads them from."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        _set_noise_off(module)
        config = vars(module).get("config")
        if isinstance(config, PreTrainedConfig) and not isinstance(module, PreTrainedModel) and _noisy(config):
            module.config = copy.deepcopy(config)  # type: ignore[assignment]  # the model's own is exported: it stays
            _set_noise_off(module.config)


def _noisy(item: Any) -> list[str]:
    """Attributes that are a dropout probability or a router's jitter, under the names that transformers gives them, and above 0."""
    return [name for name, value in vars(item).items() if isinstance(value, float) and value > 0 and ("drop" in name or "jitter" in name)]


def _set_noise_off(item: Any) -> None:
    for name in _noisy(item):
        setattr(item, name, 0.0)


_ARGUMENTS: WeakKeyDictionary[Callable[..., Any], frozenset[str]] = WeakKeyDictionary()  # by forward: a decoding step asks each time


def accepts(model: nn.Module, argument: str) -> bool:
    """Whether the model's forward takes this argument (families differ on position_ids and logits_to_keep)."""
    forward = unwrapped(model).forward
    forward = getattr(forward, "__func__", forward)  # a bound method is another object each time
    if forward not in _ARGUMENTS:
        _ARGUMENTS[forward] = frozenset(inspect.signature(forward).parameters)
    return argument in _ARGUMENTS[forward]


def learned_positions(model: nn.Module) -> int | None:
    """How many positions the model can read if it has a learned embedding of each (GPT-2, OPT); None where they are computed."""
    base = unwrapped(model)
    limit = getattr(base.config, "max_position_embeddings", None)
    if limit is None:
        return None
    tokens = base.get_input_embeddings()
    tables = [table.num_embeddings for table in base.modules() if isinstance(table, nn.Embedding) and table is not tokens]
    return limit if any(limit <= rows <= limit + 2 for rows in tables) else None  # OPT's has two more rows


def positions_of(mask: Bool[Tensor, "row token"]) -> Int[Tensor, "row token"]:
    """Positions that count real tokens only, so that left padding does not move a prompt."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def completion_logps(
    model: Any,
    prompt_tokens: Int[Tensor, "prompt prompt_token"],
    prompt_mask: Bool[Tensor, "prompt prompt_token"],
    completion_tokens: Int[Tensor, "prompt response token"],
    completion_mask: Bool[Tensor, "prompt response token"],
    temperature: float = 1.0,
) -> Float[Tensor, "prompt response token"]:
    """Log-probability, in nats, of every completion token under the model at `temperature`; 0 outside the mask.

    In float32, or in the logits' own precision if that is higher.

    Logits are computed on the completion's positions only. Carries gradient if the model does.
    """
    logits = completion_logits(model, prompt_tokens, prompt_mask, completion_tokens, completion_mask, temperature)
    chosen = logits.gather(-1, completion_tokens.unsqueeze(-1)).squeeze(-1)
    return (chosen - logits.logsumexp(-1)).masked_fill(~completion_mask, 0.0)


def completion_logits(
    model: Any,
    prompt_tokens: Int[Tensor, "prompt prompt_token"],
    prompt_mask: Bool[Tensor, "prompt prompt_token"],
    completion_tokens: Int[Tensor, "prompt response token"],
    completion_mask: Bool[Tensor, "prompt response token"],
    temperature: float = 1.0,
) -> Float[Tensor, "prompt response token vocabulary"]:
    """The model's logits over the whole vocabulary at every completion token, divided by `temperature`."""
    prompts, responses, length = completion_tokens.shape
    tokens = torch.cat([prompt_tokens.repeat_interleave(responses, 0), completion_tokens.flatten(0, 1)], 1)
    mask = torch.cat([prompt_mask.repeat_interleave(responses, 0), completion_mask.flatten(0, 1)], 1)
    options: dict[str, Any] = {"attention_mask": mask.long(), "use_cache": False}
    if accepts(model, "position_ids"):
        options["position_ids"] = positions_of(mask)
    if accepts(model, "logits_to_keep"):
        options["logits_to_keep"] = length + 1
    logits = model(input_ids=tokens, **options).logits[:, -length - 1 : -1]
    return (precise(logits) / temperature).unflatten(0, (prompts, responses))


def text_logps(
    model: Any, tokens: Int[Tensor, "row token"], attention_mask: Bool[Tensor, "row token"], scored: Bool[Tensor, "row token"]
) -> Float[Tensor, " scored"]:
    """Log-probability, in nats, of every scored token given what its text has before it, text by text; in float32 at least.

    Args:
        model: causal.
        tokens: texts, padded on the right.
        attention_mask: True on their real tokens.
        scored: of these, and never the first of a text.
    """
    options: dict[str, Any] = {"attention_mask": attention_mask.long(), "use_cache": False}
    if accepts(model, "position_ids"):
        options["position_ids"] = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    logits = precise(model(input_ids=tokens, **options).logits[:, :-1][scored[:, 1:]])  # position t predicts token t + 1
    return logits.gather(1, tokens[scored].unsqueeze(1)).squeeze(1) - logits.logsumexp(-1)


def precise(values: Tensor) -> Tensor:
    """In float32 at least: half precision cannot tell two log-probabilities, or two rewards, of like size apart."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def sequence_scores(model: nn.Module, tokens: Int[Tensor, "row token"], attention_mask: Bool[Tensor, "row token"]) -> Float[Tensor, " row"]:
    """Scalar scores of right-padded sequences, in float32 at least, pooled at the explicit index of the last real token.

    transformers pools at the last id that differs from the padding id, which skips a final EOS where pad == EOS.
    """
    base = unwrapped(model)
    if not hasattr(base, "score"):  # encoder families (BERT) pool in their own way, not by a padding id
        return precise(model(input_ids=tokens, attention_mask=attention_mask.long()).logits.squeeze(-1))
    last = attention_mask.sum(-1) - 1
    return pooled(model, tokens, (torch.arange(len(last), device=last.device), last), attention_mask=attention_mask.long())


def pooled(model: nn.Module, *inputs: Any, **options: Any) -> Float[Tensor, " row"]:
    """`pooled_scores` of the transformers model inside."""
    base = unwrapped(model)
    if "pooled_scores" in vars(base):  # split over processes: FSDP gathers the weights around this method
        return base.pooled_scores(*inputs, **options)
    return pooled_scores(base, *inputs, **options)


def pooled_scores(
    base: Any, tokens: Int[Tensor, "row token"], places: tuple[Int[Tensor, " text"], Int[Tensor, " text"]], **options: Any
) -> Float[Tensor, " text"]:
    """Scores of a causal model under a scalar head, read at these rows and tokens. `options` go to its backbone."""
    backbone = getattr(base, base.base_model_prefix)
    hidden = precise(backbone(input_ids=tokens, use_cache=False, **options).last_hidden_state[places])
    with torch.autocast(hidden.device.type, enabled=False):  # a reward's last digits decide ties: the head runs in float32
        bias = getattr(base.score, "bias", None)
        return nn.functional.linear(hidden, base.score.weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)).squeeze(-1)
