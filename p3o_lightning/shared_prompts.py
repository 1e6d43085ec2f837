"""All K responses of a prompt in one row behind it, so that a forward reads the prompt once.

A row is `prompt | response 1 | ... | response K`; a mask hides the responses from each other, and each one's positions go on from the
prompt's. The numbers are those of K rows with a copy of the prompt, but for the last bits. Whether a model reads positions and masks
as they are given (recurrent, ALiBi and sliding-window models do not) is tried out on it once, not looked up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Int
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from p3o_lightning.forwards import accepts, completion_logps, eval_mode, positions_of, precise, unwrapped

Logps = Callable[..., Tensor]


def grouped_completion_logps(
    model: Any,
    prompt_tokens: Int[Tensor, "prompt prompt_token"],
    prompt_mask: Bool[Tensor, "prompt prompt_token"],
    completion_tokens: Int[Tensor, "prompt response token"],
    completion_mask: Bool[Tensor, "prompt response token"],
    temperature: float = 1.0,
) -> Float[Tensor, "prompt response token"]:
    """As `completion_logps`, with the prompt read once for its responses where that pays and the model allows it."""
    inputs = (prompt_tokens, prompt_mask, completion_tokens, completion_mask)
    # tried out first: a split model's forward is collective, and what pays differs between processes
    if allows(model) and pays(model, prompt_tokens.shape[1], *completion_tokens.shape[1:]):
        return shared_prompt_logps(model, *inputs, temperature)
    return completion_logps(model, *inputs, temperature)


def shared_prompt_logps(
    model: Any,
    prompt_tokens: Int[Tensor, "prompt prompt_token"],
    prompt_mask: Bool[Tensor, "prompt prompt_token"],
    completion_tokens: Int[Tensor, "prompt response token"],
    completion_mask: Bool[Tensor, "prompt response token"],
    temperature: float = 1.0,
) -> Float[Tensor, "prompt response token"]:
    """As `completion_logps`, one row a prompt. Logits are computed from the prompt's last token on."""
    count, length = completion_tokens.shape[1:]
    real = torch.cat([prompt_mask, completion_mask.flatten(1)], 1)
    logits = model(
        input_ids=torch.cat([prompt_tokens, completion_tokens.flatten(1)], 1),
        attention_mask=_mask(model, real, prompt_tokens.shape[1], count, length),
        position_ids=_positions(prompt_mask, completion_mask),
        logits_to_keep=count * length + 1,
        use_cache=False,
    ).logits
    logits = precise(logits) / temperature
    normaliser = logits.logsumexp(-1)
    after_prompt, behind = logits[:, 0], logits[:, 1:].unflatten(1, (count, length))[:, :, :-1]  # behind a response's own tokens
    first = after_prompt.gather(-1, completion_tokens[:, :, 0]) - normaliser[:, :1]
    rest = behind.gather(-1, completion_tokens[:, :, 1:].unsqueeze(-1)).squeeze(-1)
    rest = rest - normaliser[:, 1:].unflatten(1, (count, length))[:, :, :-1]
    return torch.cat([first.unsqueeze(-1), rest], -1).masked_fill(~completion_mask, 0.0)


def _positions(prompt_mask: Tensor, completion_mask: Tensor) -> Int[Tensor, "prompt row_token"]:
    """Of the prompt's tokens, then of every response's, which all go on where the prompt ends."""
    count, length = completion_mask.shape[1:]
    behind = prompt_mask.sum(-1, keepdim=True) + torch.arange(length, device=prompt_mask.device)
    return torch.cat([positions_of(prompt_mask), behind.repeat(1, count)], 1)


def _mask(model: nn.Module, real: Bool[Tensor, "prompt row_token"], prompt: int, count: int, length: int) -> Tensor:
    """(prompt, 1, query, key): what came before, in the prompt or in the same response. A padded query sees itself, lest it be NaN."""
    place = torch.arange(real.shape[1], device=real.device)
    response = torch.where(place < prompt, -1, (place - prompt) // length)
    before = (place <= place.unsqueeze(1)) & ((response == -1) | (response == response.unsqueeze(1)))
    mask = (before & real.unsqueeze(1)) | (place == place.unsqueeze(1))
    if _attention(model) == "sdpa":
        return mask.unsqueeze(1)
    dtype = next(model.parameters()).dtype
    return torch.zeros(mask.shape, dtype=dtype, device=real.device).masked_fill(~mask, torch.finfo(dtype).min).unsqueeze(1)


def _attention(model: nn.Module) -> str:
    config: Any = unwrapped(model).config
    return str(getattr(config, "_attn_implementation", ""))


# ---- where it is used


def pays(model: nn.Module, prompt: int, count: int, length: int) -> bool:
    """Whether the prompt's tokens that are saved cost more than the attention between responses, which is computed and masked out.

    Multiplications a layer and prompt, of a Llama block with hidden size h: 12 h^2 for a token; 2 h for a pair of tokens that attention
    looks at, masked or not.
    """
    config: Any = unwrapped(model).config.get_text_config(decoder=True)
    if prompt + length > (_window(config) or prompt + length):  # the mask made here knows no window
        return False
    hidden = getattr(config, "hidden_size", 0)
    saved = 12 * hidden * (count - 1) * prompt
    return saved > 2 * 2 * ((prompt + count * length) ** 2 - count * (prompt + length) ** 2)


def _window(config: Any) -> int | None:
    """How far back the shortest-sighted layer looks; None if all see everything."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and all(kind == "full_attention" for kind in kinds):
        return None
    return getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)


_ALLOWS: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def allows(model: nn.Module) -> bool:
    """Whether the model gives the same numbers so; tried out once for a model, on a few random tokens."""
    base = unwrapped(model)
    if base not in _ALLOWS:
        _ALLOWS[base] = _gives_the_same(model)
        if not _ALLOWS[base]:
            rank_zero_info(f"{type(base).__name__} does not take a prompt shared by its responses: every response is read with a copy.")
    return _ALLOWS[base]


@torch.no_grad()
def _gives_the_same(model: nn.Module) -> bool:
    """The difference of both ways, against what another prompt makes of the same responses."""
    takes = all(accepts(model, name) for name in ("position_ids", "attention_mask", "logits_to_keep"))
    if not takes or _attention(model) not in ("sdpa", "eager"):
        return False
    parameter = next(model.parameters())
    draw = torch.Generator().manual_seed(0)
    vocabulary = unwrapped(model).get_input_embeddings().num_embeddings
    prompts, others, responses = (
        torch.randint(vocabulary, shape, generator=draw).to(parameter.device) for shape in ((2, 4), (2, 4), (2, 2, 3))
    )
    prompt_mask, mask = torch.ones_like(prompts, dtype=torch.bool), torch.ones_like(responses, dtype=torch.bool)
    prompt_mask[0, :2] = False
    mask[0, 0, 2:] = False
    with eval_mode(model):
        try:
            plain = completion_logps(model, prompts, prompt_mask, responses, mask)
            shared = shared_prompt_logps(model, prompts, prompt_mask, responses, mask)
        except (RuntimeError, ValueError, TypeError, IndexError):  # a mask of four axes, say, is not understood
            return False
        effect = (completion_logps(model, others, prompt_mask, responses, mask) - plain).abs().max()
    noise = 1e-2 if parameter.dtype in (torch.float32, torch.float64) else 0.25
    return bool((shared - plain).abs().max() <= noise * effect)
