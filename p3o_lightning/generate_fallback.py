"""Models that hold more than keys and values (Mamba, hybrids) sample within transformers' `generate`, by our draws."""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Int
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from p3o_lightning.decoding import last_logits
from p3o_lightning.forwards import eval_mode, positions_of, unwrapped
from p3o_lightning.kv_cache import attends_only

Draw = Callable[[Tensor, int], Tensor]  # logits (row, vocabulary) and the step's number to tokens (row)

_GENERATES: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def generates(model: nn.Module) -> bool:
    """Whether to draw within `generate`: the model's state is not ours to hold, and `generate` gives its logits. Tried out on it once."""
    base = unwrapped(model)
    if base not in _GENERATES:
        can = getattr(base, "can_generate", lambda: False)
        _GENERATES[base] = bool(can()) and not attends_only(base) and _gives_its_logits(model)
        if _GENERATES[base]:
            rank_zero_info(f"{type(base).__name__} holds more than keys and values: responses are drawn within transformers' generate.")
    return _GENERATES[base]


def generated(
    model: nn.Module,
    tokens: Int[Tensor, "row token"],
    mask: Bool[Tensor, "row token"],
    draw: Draw,
    steps: int,
    eos_token_id: int | None,
    pad_token_id: int,
) -> Int[Tensor, "row step"]:
    """What `draw` gives for each row's logits, step by step, until all rows have ended or `steps` are done; padding behind EOS."""
    base = unwrapped(model)
    former, base.generation_config = base.generation_config, GenerationConfig()  # which may ban tokens, or force some
    try:
        texts = base.generate(
            input_ids=tokens,
            attention_mask=mask.long(),
            generation_config=GenerationConfig(max_new_tokens=steps, eos_token_id=eos_token_id, pad_token_id=pad_token_id),
            logits_processor=LogitsProcessorList([_Only(draw)]),
            synced_gpus=False,  # whoever calls has the weights whole
        )
    finally:
        base.generation_config = former
    return texts[:, tokens.shape[1] :]


class _Only(LogitsProcessor):
    """Leaves a row the token that is drawn, and none to choose from."""

    def __init__(self, draw: Draw) -> None:
        self.draw, self.step = draw, 0

    def __call__(self, input_ids: Tensor, scores: Float[Tensor, "row vocabulary"]) -> Float[Tensor, "row vocabulary"]:
        drawn = self.draw(scores, self.step)
        self.step += 1
        return torch.full_like(scores, -torch.inf).scatter(1, drawn.unsqueeze(1), 0.0)


@torch.no_grad()
def _gives_its_logits(model: nn.Module) -> bool:
    """On two prompts, one of them padded, against forwards of the whole text; the measure is what another prompt makes of them."""
    parameter = next(model.parameters())
    dice = torch.Generator().manual_seed(0)
    vocabulary = unwrapped(model).get_input_embeddings().num_embeddings
    prompts, others, given = (torch.randint(vocabulary, (2, length), generator=dice).to(parameter.device) for length in (4, 4, 3))
    mask = torch.ones_like(prompts, dtype=torch.bool)
    mask[0, :2] = False
    steps: list[Tensor] = []

    def draw(logits: Tensor, step: int) -> Tensor:
        steps.append(logits)
        return given[:, step]

    with eval_mode(model), torch.autocast(parameter.device.type, enabled=False):
        try:
            generated(model, prompts, mask, draw, 3, None, 0)
            plain, other = (torch.stack([_whole(model, start, given[:, :step], mask) for step in range(3)]) for start in (prompts, others))
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError):
            return False
    noise = 1e-2 if parameter.dtype in (torch.float32, torch.float64) else 0.25
    found = torch.stack(steps)
    return found.shape == plain.shape and bool((found - plain).abs().max() <= noise * (other - plain).abs().max())


def _whole(model: nn.Module, prompts: Tensor, given: Tensor, mask: Tensor) -> Tensor:
    """Logits behind the prompts and what is given after them, no cache."""
    mask = nn.functional.pad(mask, (0, given.shape[1]), value=True)
    return last_logits(model, torch.cat([prompts, given], 1), mask.long(), positions_of(mask), None).float()
