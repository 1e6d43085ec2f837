"""Sampling K responses for each prompt: one prefill a prompt, inverse-CDF draws, finished rows dropped from the batch, some at a time.

Every token is a function of (weights, prompt, its own uniform draw), so which rows share a batch, and when others finish,
changes nothing (but for the last bit of a logit, which kernels round by batch shape); and a seed fixes the whole rollout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from p3o_lightning.batches import PromptBatch
from p3o_lightning.casting import laid_out
from p3o_lightning.compiling import as_written
from p3o_lightning.cuda_graphs import Graphed, can_be_graphed
from p3o_lightning.decoding import Decoder, Growing, Rereading, last_logits, new_cache
from p3o_lightning.errors import InputError
from p3o_lightning.forwards import learned_positions, positions_of, precise
from p3o_lightning.generate_fallback import generated, generates

BLOCK = 64  # tokens of the vocabulary whose weights are added up at a time


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn.

    Args:
        num_generations: responses for each prompt.
        max_completion_length: tokens a response may have, EOS included.
        temperature: divides the logits; scoring divides them alike.
        top_p: keep the most likely tokens up to this probability mass; 1 = off.
        top_k: keep this many tokens; 0 = off.
    """

    num_generations: int = 2
    max_completion_length: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        for name, valid, wanted in (
            ("num_generations", self.num_generations >= 1, "a whole number of at least 1"),
            ("max_completion_length", self.max_completion_length >= 1, "a number of tokens of at least 1"),
            ("temperature", self.temperature > 0, "a number above 0, e.g. 1.0"),
            ("top_p", 0 < self.top_p <= 1, "a number in (0, 1]; 1 = off"),
            ("top_k", self.top_k >= 0, "a number of tokens; 0 = off"),
        ):
            if not valid:
                raise InputError(f"model.{name} is {getattr(self, name)}: choose {wanted}.")


def sample_completions(
    model: nn.Module,
    prompt_tokens: Int[Tensor, "prompt prompt_token"],
    prompt_mask: Bool[Tensor, "prompt prompt_token"],
    sampling: Sampling,
    **options: Any,
) -> tuple[Int[Tensor, "prompt response token"], Bool[Tensor, "prompt response token"]]:
    """`sample_with_logps` without the log-probabilities."""
    return sample_with_logps(model, prompt_tokens, prompt_mask, sampling, **options)[:2]


@torch.no_grad()
def sample_with_logps(
    model: nn.Module,
    prompt_tokens: Int[Tensor, "prompt prompt_token"],
    prompt_mask: Bool[Tensor, "prompt prompt_token"],
    sampling: Sampling,
    *,
    eos_token_id: int,
    pad_token_id: int,
    seed: int,
    share: tuple[int, int] = (0, 1),
    refuse_nonfinite: bool = True,
) -> tuple[Int[Tensor, "prompt response token"], Bool[Tensor, "prompt response token"], Float[Tensor, "prompt response token"]]:
    """Responses, their mask, and each token's log-probability in nats under the distribution it was drawn from, 0 outside the mask.

    The mask is True up to and including the first EOS; a truncated response has none.

    Prompts are padded on the left. The token axis is as long as the longest response drawn. Call it in eval mode.

    `share` is (rank, processes): of the prompts of all processes, dealt out in turn, this one has every n-th. The draws are those of a
    single process with all of them. `refuse_nonfinite` is what `draw_with_logps` does.
    """
    limit, longest = learned_positions(model), int(prompt_mask.sum(1).max())
    if limit is not None and longest + sampling.max_completion_length > limit:
        raise InputError(
            f"model.max_completion_length is {sampling.max_completion_length} and a prompt has {longest} tokens, but the model has only "
            f"{limit} positions: lower it, or set data.max_prompt_length."
        )
    generator = torch.Generator().manual_seed(seed)  # on the CPU, so that every device draws the same numbers
    rank, processes = share
    shape = (len(prompt_tokens) * processes, sampling.num_generations, sampling.max_completion_length)
    uniforms = torch.rand(shape, generator=generator, dtype=torch.float32)[rank::processes].flatten(0, 1).to(prompt_tokens.device)
    with as_written(model), laid_out(model, sampling.max_completion_length):
        drawn = _generated if generates(model) else _decoded
        return drawn(model, prompt_tokens, prompt_mask, uniforms, sampling, eos_token_id, pad_token_id, refuse_nonfinite)


def _decoded(
    model: nn.Module,
    prompt_tokens: Int[Tensor, "prompt prompt_token"],
    prompt_mask: Bool[Tensor, "prompt prompt_token"],
    uniforms: Float[Tensor, "row step"],
    sampling: Sampling,
    eos_token_id: int,
    pad_token_id: int,
    refuse_nonfinite: bool,
) -> tuple[Int[Tensor, "prompt response token"], Bool[Tensor, "prompt response token"], Float[Tensor, "prompt response token"]]:
    """The loop of `sample_with_logps`: a row is a response, and has a draw for each of its tokens."""
    prompts, count, device = len(prompt_tokens), sampling.num_generations, prompt_tokens.device
    rows = prompts * count
    tokens = torch.full((rows, sampling.max_completion_length), pad_token_id, device=device)
    logps = torch.zeros(rows, sampling.max_completion_length, dtype=torch.float32, device=device)
    lengths = torch.full((rows,), sampling.max_completion_length, device=device)

    steps = sampling.max_completion_length - 1  # the last token drawn is never read
    logits, decoder = _begin(model, prompt_tokens, prompt_mask, count, steps)
    held = torch.arange(rows, device=device)  # the rows of `tokens` that the running batch still holds
    going = torch.ones(rows, dtype=torch.bool, device=device)  # and which of them have not ended

    for step in range(sampling.max_completion_length):
        drawn, drawn_logps = draw_with_logps(logits, uniforms[held, step], sampling, refuse_nonfinite)
        tokens[held[going], step], logps[held[going], step] = drawn[going], drawn_logps[going]
        ended = going & (drawn == eos_token_id)
        lengths[held[ended]] = step + 1
        going = going & ~ended
        left = int(going.sum())
        if step + 1 == sampling.max_completion_length or not left:
            break
        if (rows_kept := decoder.worth(left, len(held), steps - step)) < len(held):
            kept = _kept(going, rows_kept)
            held, going, drawn = held[kept], going[kept], drawn[kept]
            decoder.keep(kept)
        logits = decoder.read(drawn)

    longest = int(lengths.max())
    tokens = tokens[:, :longest]
    token_mask = torch.arange(longest, device=device) < lengths.unsqueeze(1)
    return tuple(values.view(prompts, count, longest) for values in (tokens, token_mask, logps[:, :longest]))  # type: ignore[return-value]


def _generated(
    model: nn.Module,
    prompt_tokens: Int[Tensor, "prompt prompt_token"],
    prompt_mask: Bool[Tensor, "prompt prompt_token"],
    uniforms: Float[Tensor, "row step"],
    sampling: Sampling,
    eos_token_id: int,
    pad_token_id: int,
    refuse_nonfinite: bool,
) -> tuple[Int[Tensor, "prompt response token"], Bool[Tensor, "prompt response token"], Float[Tensor, "prompt response token"]]:
    """As `_decoded`, the loop being transformers' own: every response reads its prompt, and none leaves the batch before all have ended."""
    count, taken = sampling.num_generations, []

    def draw(logits: Tensor, step: int) -> Tensor:
        taken.append(draw_with_logps(logits, uniforms[:, step], sampling, refuse_nonfinite))
        return taken[-1][0]

    rows, mask = (given.repeat_interleave(count, 0) for given in (prompt_tokens, prompt_mask))
    tokens = generated(model, rows, mask, draw, sampling.max_completion_length, eos_token_id, pad_token_id)
    ends = (tokens == eos_token_id).long()
    token_mask = ends.cumsum(1) - ends == 0  # none before
    logps = torch.stack([logps for _, logps in taken], 1).masked_fill(~token_mask, 0.0)
    return tuple(values.view(len(prompt_tokens), count, -1) for values in (tokens, token_mask, logps))  # type: ignore[return-value]


def _begin(
    model: nn.Module,
    prompt_tokens: Int[Tensor, "prompt prompt_token"],
    prompt_mask: Bool[Tensor, "prompt prompt_token"],
    count: int,
    steps: int,
) -> tuple[Float[Tensor, "row vocabulary"], Decoder]:
    """Reads every prompt once: the logits of the first token of `count` responses to each, and what goes on from there.

    Args:
        model: in eval mode.
        prompt_tokens: padded on the left.
        prompt_mask: True on their real tokens.
        count: rows of each prompt, side by side.
        steps: tokens of each row to be read, at most.
    """
    cache = new_cache(model, prompt_tokens.shape[1] + steps)
    logits = last_logits(model, prompt_tokens, prompt_mask.long(), positions_of(prompt_mask), cache).repeat_interleave(count, 0)
    mask = prompt_mask.repeat_interleave(count, 0)
    if cache is None or cache.get_seq_length() == 0:  # the model took it and did not fill it
        return logits, Rereading(model, prompt_tokens.repeat_interleave(count, 0), mask)
    cache.batch_repeat_interleave(count)
    if can_be_graphed(model, cache, steps):
        return logits, Graphed(model, cache, mask, steps)
    return logits, Growing(model, cache, mask)


def _kept(going: Bool[Tensor, " row"], count: int) -> Int[Tensor, " kept"]:
    """So many rows, ascending: all that go on, and of those that have ended the first."""
    spare = (~going).cumsum(0) <= count - going.sum()
    return (going | spare).nonzero().squeeze(1)


def draw(logits: Float[Tensor, "row vocabulary"], uniforms: Float[Tensor, " row"], sampling: Sampling) -> Int[Tensor, " row"]:
    """`draw_with_logps` without the log-probabilities."""
    return draw_with_logps(logits, uniforms, sampling)[0]


def draw_with_logps(
    logits: Float[Tensor, "row vocabulary"], uniforms: Float[Tensor, " row"], sampling: Sampling, refuse_nonfinite: bool = True
) -> tuple[Int[Tensor, " row"], Float[Tensor, " row"]]:
    """One token a row by inverse CDF: the first token whose cumulative probability exceeds the row's uniform draw in [0, 1).

    And its log-probability in nats under what is drawn from: the model's distribution at this temperature, cut by top_k and top_p.
    Where logits are not finite: InputError, or with refuse_nonfinite=False the last token, at log-probability NaN.

    top_k is applied first, then top_p to what is left. Of equal logits at their edge, the choice is arbitrary.
    """
    logits = precise(logits) if sampling.temperature == 1 else precise(logits) / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        best = logits.topk(sampling.top_k, -1)
        logits = torch.full_like(logits, -torch.inf).scatter(-1, best.indices, best.values)
    if sampling.top_p < 1:
        ordered, order = logits.sort(-1, descending=True)
        before = _running_sum(ordered.softmax(-1)) - ordered.softmax(-1)  # mass of the tokens ahead of each one
        logits = logits.masked_fill(torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before >= sampling.top_p), -torch.inf)
    top = logits.amax(-1, keepdim=True)
    drawn, total = _first_beyond(torch.sub(logits, top).exp_(), uniforms)
    if refuse_nonfinite and not bool(total.isfinite().all()):
        raise InputError(
            "model gives logits that are not finite (NaN or infinity), so nothing can be sampled: training has diverged, or numbers "
            "overflow the dtype; lower model.lr, set trainer.gradient_clip_val to 1, or model.dtype to float32."
        )
    chosen = (logits.gather(-1, drawn.unsqueeze(1)) - top).squeeze(1)
    return drawn, (chosen - total.log()).float()


def _first_beyond(
    weights: Float[Tensor, "row vocabulary"], uniforms: Float[Tensor, " row"]
) -> tuple[Int[Tensor, " row"], Float[Tensor, " row"]]:
    """The first token of each row at which the weights up to it exceed the uniform draw's share of their sum; and the sum.

    Sums of blocks are added up in float64 (which Apple's GPUs lack), so that over a vocabulary of 100,000 no rounding lets a token in that
    has no weight; then the weights of the block where it happens, a tenth of the work. Of weights that are not finite: the last token.
    """
    size, precision = weights.shape[-1], torch.float32 if weights.device.type == "mps" else torch.float64
    padded = nn.functional.pad(weights, (0, -size % BLOCK)) if size % BLOCK else weights
    blocks = padded.unflatten(-1, (-1, BLOCK))
    until = _running_sum(blocks.sum(-1).to(precision))
    total = until[:, -1]
    target = (uniforms.to(precision) * total).unsqueeze(1)
    block = torch.searchsorted(until, target, right=True).clamp(max=until.shape[-1] - 1)
    before = nn.functional.pad(until, (1, -1)).gather(-1, block)
    within = blocks.gather(1, block.unsqueeze(-1).expand(-1, 1, BLOCK)).squeeze(1)
    last = (torch.arange(1, BLOCK + 1, device=weights.device) * (within > 0)).amax(-1) - 1  # of those with weight: rounding may overshoot
    place = torch.searchsorted(before + _running_sum(within.to(precision)), target, right=True).squeeze(1)
    drawn = block.squeeze(1) * BLOCK + torch.minimum(place, last)
    return torch.where(total.isfinite(), drawn, size - 1), total


def _running_sum(values: Tensor) -> Tensor:
    """Over the last axis. CUDA's may add up in any order, and stops where deterministic algorithms are asked for: then on the host."""
    if values.is_cuda and torch.are_deterministic_algorithms_enabled():
        return values.cpu().cumsum(-1).to(values.device)
    return values.cumsum(-1)


def prediction_rows(tokenizer: PreTrainedTokenizerBase, batch: PromptBatch, tokens: Tensor, mask: Tensor) -> list[dict[str, Any]]:
    """Rows {"prompt", "responses"} of sampled completions, for JSONL."""
    texts = decode_completions(tokenizer, tokens, mask)
    return [{"prompt": prompt, "responses": responses} for prompt, responses in zip(batch.prompts, texts, strict=True)]


def decode_completions(tokenizer: PreTrainedTokenizerBase, tokens: Tensor, mask: Tensor) -> list[list[str]]:
    """Texts of completions ("prompt response token") without padding and special tokens."""
    return [
        [
            str(tokenizer.decode(row[kept], skip_special_tokens=True, clean_up_tokenization_spaces=False))
            for row, kept in zip(rows, masks, strict=True)
        ]
        for rows, masks in zip(tokens.cpu(), mask.cpu(), strict=True)
    ]
