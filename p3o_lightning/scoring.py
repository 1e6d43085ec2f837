"""Log-probabilities of responses and scores of texts in batches, without padding and with what texts begin with in common read once.

Where a model does not allow it, the plain forwards of forwards.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Int
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from p3o_lightning.forwards import (
    accepts,
    completion_logits,
    completion_logps,
    eval_mode,
    pooled,
    precise,
    sequence_scores,
    text_logps,
    unwrapped,
)
from p3o_lightning.head import head_logps, left_out, plain_head
from p3o_lightning.kv_cache import attends_only
from p3o_lightning.packing import NAME, Packing, attention, multiple_for, set_attention


def grouped_completion_logps(
    model: Any,
    prompt_tokens: Int[Tensor, "prompt prompt_token"],
    prompt_mask: Bool[Tensor, "prompt prompt_token"],
    completion_tokens: Int[Tensor, "prompt response token"],
    completion_mask: Bool[Tensor, "prompt response token"],
    temperature: float = 1.0,
) -> Float[Tensor, "prompt response token"]:
    """As `completion_logps`, without padding and with the prompt read once for its responses where the model allows it."""
    length = completion_tokens.shape[-1]
    inputs = trimmed(prompt_tokens, prompt_mask, completion_tokens, completion_mask)
    logps = (packed_logps if _packs(model, inputs) else completion_logps)(model, *inputs, temperature)
    return nn.functional.pad(logps, (0, length - logps.shape[-1]))


def grouped_logits(
    model: Any,
    prompt_tokens: Int[Tensor, "prompt prompt_token"],
    prompt_mask: Bool[Tensor, "prompt prompt_token"],
    completion_tokens: Int[Tensor, "prompt response token"],
    completion_mask: Bool[Tensor, "prompt response token"],
    temperature: float = 1.0,
) -> Float[Tensor, "sampled vocabulary"]:
    """The logits that every response token was drawn from, in the order of the mask, over `temperature`; read as log-probabilities are."""
    inputs = trimmed(prompt_tokens, prompt_mask, completion_tokens, completion_mask)
    if not _packs(model, inputs):
        return completion_logits(model, *inputs, temperature)[inputs[-1]]
    packing = Packing(inputs[1], inputs[3][..., 1:], multiple_for(model))
    row, places = packing.tokens(inputs[0], inputs[2][..., :-1]), _places(packing, inputs[3])
    return precise(model(input_ids=row, logits_to_keep=places, use_cache=False, **packing.options()).logits[0]) / temperature


def grouped_logps_and_hidden(
    model: Any,
    prompt_tokens: Int[Tensor, "prompt prompt_token"],
    prompt_mask: Bool[Tensor, "prompt prompt_token"],
    completion_tokens: Int[Tensor, "prompt response token"],
    completion_mask: Bool[Tensor, "prompt response token"],
    temperature: float = 1.0,
) -> tuple[Float[Tensor, "prompt response token"], Float[Tensor, "prompt response token channel"]]:
    """As `grouped_completion_logps`, and from the same forward the last hidden state that each token is predicted from."""
    length = completion_tokens.shape[-1]
    inputs = trimmed(prompt_tokens, prompt_mask, completion_tokens, completion_mask)
    mask = inputs[-1]
    with last_hidden_states(model) as seen:
        if _packs(model, inputs):
            logps = packed_logps(model, *inputs, temperature)
            places = _places(Packing(inputs[1], mask[..., 1:]), mask)
            hidden = seen[-1].new_zeros(*mask.shape, seen[-1].shape[-1])
            hidden[mask] = seen[-1][0, places]
        else:
            logps = completion_logps(model, *inputs, temperature)
            hidden = seen[-1][:, -mask.shape[-1] - 1 : -1].unflatten(0, mask.shape[:2]) * mask.unsqueeze(-1)
    missing = length - mask.shape[-1]
    return nn.functional.pad(logps, (0, missing)), nn.functional.pad(hidden, (0, 0, 0, missing))


def _packs(model: nn.Module, inputs: tuple[Tensor, ...]) -> bool:
    # tried out first: a split model's forward is collective, and what fits differs between processes
    return allows(model) and fits(model, inputs[1].shape[-1] + inputs[3].shape[-1])


@contextmanager
def last_hidden_states(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collects the last hidden states, "row position channel", of every forward of the model that is made inside."""
    base = unwrapped(model)
    seen: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        seen.append(output[0])

    hook = getattr(base, base.base_model_prefix).register_forward_hook(keep)
    try:
        yield seen
    finally:
        hook.remove()


def trimmed(prompt_tokens: Tensor, prompt_mask: Tensor, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Without the columns that hold padding alone: on the left of the prompts, on the right of the responses."""
    longest = int(mask.sum(-1).max())
    first = int(prompt_mask.any(0).int().argmax())
    return prompt_tokens[:, first:], prompt_mask[:, first:], tokens[..., :longest], mask[..., :longest]


def packed_logps(
    model: Any,
    prompt_tokens: Int[Tensor, "prompt prompt_token"],
    prompt_mask: Bool[Tensor, "prompt prompt_token"],
    completion_tokens: Int[Tensor, "prompt response token"],
    completion_mask: Bool[Tensor, "prompt response token"],
    temperature: float = 1.0,
) -> Float[Tensor, "prompt response token"]:
    """As `completion_logps`, all prompts and responses in one row. A response's last token is not read: nothing is drawn after it."""
    packing = Packing(prompt_mask, completion_mask[..., 1:], multiple_for(model))
    logps = _row_logps(
        model,
        packing.tokens(prompt_tokens, completion_tokens[..., :-1]),
        _places(packing, completion_mask),
        completion_tokens[completion_mask],
        temperature,
        packing.options(),
    )
    return logps.new_zeros(completion_mask.shape).masked_scatter(completion_mask, logps)


def _places(packing: Packing, completion_mask: Bool[Tensor, "prompt response token"]) -> Int[Tensor, " sampled"]:
    """Where in the row the token is that each response token was drawn after."""
    first = packing.trunk_ends().view(-1, 1, 1).expand(*completion_mask.shape[:2], 1)
    return torch.cat([first, packing.branch_places()], -1)[completion_mask]


def _row_logps(model: Any, row: Tensor, places: Tensor, tokens: Tensor, temperature: float, options: dict[str, Any]) -> Tensor:
    """Log-probability of each token at its place of the row."""
    options = {"input_ids": row, "logits_to_keep": places, "use_cache": False, **options}
    head = plain_head(model) if leaves_out_its_head(model) else None
    if head is not None:
        with left_out(head):
            hidden = model(**options).logits
        return head_logps(hidden[0], head, tokens, temperature)
    logits = precise(model(**options).logits[0]) / temperature
    return logits.gather(1, tokens.unsqueeze(1)).squeeze(1) - logits.logsumexp(-1)


def unpadded_text_logps(
    model: Any, tokens: Int[Tensor, "row token"], attention_mask: Bool[Tensor, "row token"], scored: Bool[Tensor, "row token"]
) -> Float[Tensor, " scored"]:
    """As `text_logps`, without padding where the model allows it."""
    return (packed_text_logps if allows(model) and fits(model, tokens.shape[1]) else text_logps)(model, tokens, attention_mask, scored)


def packed_text_logps(
    model: Any, tokens: Int[Tensor, "row token"], attention_mask: Bool[Tensor, "row token"], scored: Bool[Tensor, "row token"]
) -> Float[Tensor, " scored"]:
    """As `text_logps`, all texts in one row: trunks without branches."""
    none = tokens.new_zeros(len(tokens), 1, 0)
    packing = Packing(attention_mask, none.bool(), multiple_for(model))
    place = (attention_mask.flatten().long().cumsum(0) - 1).view_as(tokens)
    return _row_logps(model, packing.tokens(tokens, none), place[:, :-1][scored[:, 1:]], tokens[scored], 1.0, packing.options())


def grouped_scores(
    model: nn.Module, tokens: Int[Tensor, "row token"], attention_mask: Bool[Tensor, "row token"], group: int
) -> Float[Tensor, " row"]:
    """As `sequence_scores`, without padding where the model allows it, and with what the texts of a group begin with read once.

    Args:
        model: with a scalar head.
        tokens: texts, padded on the right.
        attention_mask: True on their real tokens.
        group: so many rows on end begin alike: the responses of one prompt, the two of a pair.
    """
    if not (hasattr(unwrapped(model), "score") and allows(model) and fits(model, tokens.shape[1])):
        return sequence_scores(model, tokens, attention_mask)
    return packed_scores(model, tokens, attention_mask, group)


def packed_scores(model: nn.Module, tokens: Tensor, attention_mask: Tensor, group: int) -> Float[Tensor, " row"]:
    """As `sequence_scores`, all texts in one row."""
    texts, real = tokens.view(-1, group, tokens.shape[1]), attention_mask.view(-1, group, tokens.shape[1])
    lengths = real.sum(-1)
    if group == 1:
        common = lengths[:, 0]
    else:  # every text keeps a token of its own, which its score is read from
        alike = (texts == texts[:, :1]).all(1) & real.all(1)
        common = torch.minimum(alike.long().cumprod(-1).sum(-1), lengths.amin(-1) - 1).clamp(min=0)
    trunk = torch.arange(int(common.max()), device=tokens.device)
    ahead = common.view(-1, 1, 1) + torch.arange(int((lengths - common.unsqueeze(-1)).max()), device=tokens.device)
    packing = Packing(trunk < common.unsqueeze(-1), ahead < lengths.unsqueeze(-1), multiple_for(model))
    branches = texts.gather(-1, ahead.expand(packing.branch_mask.shape).clamp(max=tokens.shape[1] - 1))
    row = packing.tokens(texts[:, 0, : len(trunk)], branches)
    own = (lengths - common.unsqueeze(-1)).flatten().cumsum(0) + (packing.trunk_tokens - 1)
    last = packing.trunk_ends() if group == 1 else own
    return pooled(model, row, (torch.zeros_like(last), last), **packing.options())


# ---- which models allow it

_APART: list[None] = []


@contextmanager
def rows_apart() -> Iterator[None]:
    """Inside, every text has a padded row of its own: for who looks at what modules give, row by row."""
    _APART.append(None)
    try:
        yield
    finally:
        _APART.pop()


def fits(model: nn.Module, length: int) -> bool:
    """Whether every layer sees texts of this length whole: the attention of a packed row knows no window."""
    config: Any = unwrapped(model).config.get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and all(kind == "full_attention" for kind in kinds):
        return True
    window = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)
    return window is None or length <= window


_ALLOWS: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
_LEAVES_OUT: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def allows(model: nn.Module) -> bool:
    """Whether the model gives the same numbers packed; tried out once for a model, on a few random tokens. It then attends by `packing`.

    Whoever gives it another attention afterwards is obeyed: it is read with padding from then on.
    """
    base = unwrapped(model)
    if _APART:
        return False
    if base not in _ALLOWS:
        former = attention(model)
        takes = all(accepts(model, name) for name in ("position_ids", "attention_mask")) and former in ("sdpa", NAME)
        takes = takes and attends_only(base)
        if takes:
            set_attention(model, NAME)
        _ALLOWS[base] = takes and _gives_the_same(model)
        if not _ALLOWS[base]:
            if takes:
                set_attention(model, former)
            rank_zero_info(f"{type(base).__name__} cannot be read without padding: a copy of the prompt is read for every response.")
    if _ALLOWS[base] and (chosen := attention(model)) != NAME:
        set_attention(model, chosen)  # its modules too, which may have configs of their own
        return False
    return _ALLOWS[base]


@torch.no_grad()
def _gives_the_same(model: nn.Module) -> bool:
    """The difference of both ways, against what another prompt makes of the same responses."""
    parameter = next(model.parameters())
    draw = torch.Generator().manual_seed(0)
    vocabulary = unwrapped(model).get_input_embeddings().num_embeddings
    prompts, others, responses = (
        torch.randint(vocabulary, shape, generator=draw).to(parameter.device) for shape in ((2, 4), (2, 4), (2, 2, 3))
    )
    prompt_mask, mask = torch.ones_like(prompts, dtype=torch.bool), torch.ones_like(responses, dtype=torch.bool)
    mask[0, 0, 2:] = False
    with eval_mode(model), torch.autocast(parameter.device.type, enabled=False):  # in the weights' own precision, which tells most
        try:
            if hasattr(unwrapped(model), "score"):
                texts, other = (torch.cat([given.repeat_interleave(2, 0), responses.flatten(0, 1)], 1) for given in (prompts, others))
                real = torch.cat([prompt_mask.repeat_interleave(2, 0), mask.flatten(0, 1)], 1)
                plain, packed = sequence_scores(model, texts, real), packed_scores(model, texts, real, 2)
                effect = (sequence_scores(model, other, real) - plain).abs().max()
            else:
                prompt_mask[0, :2] = False
                plain = completion_logps(model, prompts, prompt_mask, responses, mask)
                packed = packed_logps(model, prompts, prompt_mask, responses, mask)
                effect = (completion_logps(model, others, prompt_mask, responses, mask) - plain).abs().max()
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError):  # `packing` is not understood, say
            return False
    noise = 1e-2 if parameter.dtype in (torch.float32, torch.float64) else 0.25
    return bool((packed - plain).abs().max() <= noise * effect and effect > 0)  # under a head of zeros nothing can be seen


@torch.no_grad()
def leaves_out_its_head(model: nn.Module) -> bool:
    """Whether the model's logits are its head's output and nothing is done to them (softcaps, scales); tried out once, to the bit."""
    base = unwrapped(model)
    head = plain_head(model)
    if head is None:
        return False
    if base not in _LEAVES_OUT:
        tokens = torch.arange(4, device=head.weight.device).unsqueeze(0) % head.weight.shape[0]
        with eval_mode(model), left_out(head) as given:
            logits = model(input_ids=tokens, use_cache=False).logits
        _LEAVES_OUT[base] = bool(given) and logits.shape == given[0].shape and torch.equal(logits, given[0].to(logits.dtype))
    return _LEAVES_OUT[base]
