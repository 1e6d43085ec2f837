"""Scores of pairs that people ranked, under a reward model, as its validation reads them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from p3o_lightning.data import held_out_prompts
from p3o_lightning.data_files import read_records
from p3o_lightning.data_formats import Unusable, normalise
from p3o_lightning.encoding import Encoded, Encoder, collate_pairs
from p3o_lightning.errors import InputError
from p3o_lightning.forwards import eval_mode
from p3o_lightning.scoring import grouped_scores
from p3o_lightning.text import visible


class RankedPairs(NamedTuple):
    """The usable pairs of a data set, once for each tokenizer."""

    rows: list[list[Encoded]]  # one list a tokenizer, all of the same pairs in the same order
    prompts: Tensor  # a number for each pair's prompt
    lengths: Tensor  # "pair 2", tokens of the responses, EOS included, by the first tokenizer
    sources: list[str] | None  # of a column `source`, where the data has one
    total: int  # rows of the data
    dropped: dict[str, int]  # reason -> rows


def read_pairs(
    path: str,
    tokenizers: Sequence[PreTrainedTokenizerBase],
    *,
    max_length: int = 512,
    columns: dict[str, str] | None = None,
    chat: bool = False,
    split: str = "train",
    held_out: float = 0.0,
    seed: int = 0,
    field: str = "data.path",
) -> RankedPairs:
    """Read pairs as PreferenceDataModule does; a row that is of no use to one of the tokenizers is left out for all, and counted.

    Args:
        path: as data.path.
        tokenizers: one for each reward model.
        max_length: tokens of prompt and longer reply.
        columns: our column name -> the data's.
        chat: parse transcripts into messages.
        split: of a saved or hub data set.
        held_out: only the share of prompts that a fit with this data.val_fraction and data.seed kept for validation; 0: all.
        seed: of that share.
        field: what the user typed the path for, in messages.
    """
    encoders = [Encoder(tokenizer, "pairs", max_length, None, chat) for tokenizer in tokenizers]
    given = list(normalise(read_records(path, split, field=field), "pairs", columns, field))
    encoded = list(zip(*(list(encoder(given)) for encoder in encoders), strict=True))
    bad = [next((row.reason for row in rows if isinstance(row, Unusable)), None) for rows in encoded]
    usable: list[Any] = [rows for rows, reason in zip(encoded, bad, strict=True) if reason is None]
    dropped = dict(Counter(reason for reason in bad if reason is not None).most_common())
    if not usable:
        raise InputError(f"{field} is {path!r}, of whose {len(given):,} rows none can be used ({', '.join(dropped)}): mend the rows.")
    if held_out:
        keys = {rows[0].key for rows in usable}
        if len(keys) < 2:
            raise InputError(f"{field} is {path!r}, which has one prompt only: nothing of it was held out; leave that choice out.")
        kept = held_out_prompts(keys, held_out, seed)
        usable = [rows for rows in usable if rows[0].key in kept]
    numbers = {key: number for number, key in enumerate(dict.fromkeys(rows[0].key for rows in usable))}
    has_source = any("source" in rows[0].columns for rows in usable)
    return RankedPairs(
        rows=[list(rows) for rows in zip(*usable, strict=True)],
        prompts=torch.tensor([numbers[rows[0].key] for rows in usable]),
        lengths=torch.tensor([[len(reply) for reply in rows[0].replies] for rows in usable]),
        sources=[visible(str(rows[0].columns.get("source")))[:60] for rows in usable] if has_source else None,
        total=len(given),
        dropped=dropped,
    )


@torch.no_grad()
def score_pairs(
    network: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Encoded],
    *,
    batch_size: int = 32,
    track: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> Float[Tensor, "pair 2"]:
    """Rewards of (chosen, rejected), float64, on the CPU.

    Args:
        network: a scalar-head model; dropout is off while it scores.
        tokenizer: its own.
        rows: pairs, encoded by that tokenizer.
        batch_size: pairs in one forward.
        track: wraps the starts of the batches, to show how far it is.
    """
    device = next(network.parameters()).device
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    collate = partial(collate_pairs, pad=pad)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].prompt) + max(map(len, rows[i].replies)))
    scores = torch.zeros(len(rows), 2, dtype=torch.float64)
    with eval_mode(network):
        for start in track(range(0, len(rows), batch_size)):
            chosen = order[start : start + batch_size]
            batch = collate([rows[i] for i in chosen])
            tokens, mask = batch.tokens.flatten(0, 1).to(device), batch.attention_mask.flatten(0, 1).to(device)
            scores[chosen] = grouped_scores(network, tokens, mask, 2).view(-1, 2).double().cpu()
    return scores


def without_eos(rows: Sequence[Encoded]) -> list[Encoded]:
    """The same pairs as if every response had been cut off: without its last token, which is EOS."""
    return [row._replace(replies=tuple([reply[:-1] for reply in row.replies])) for row in rows]
