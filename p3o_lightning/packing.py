"""No padding: the real tokens of a batch lie in one row, and attention alone knows which belong together.

A batch is groups of one trunk and its branches: a prompt and its K responses, a common beginning of texts and how each goes on. The row is
`trunk 1 | trunk 2 | ... | branch 1 of 1 | branch 2 of 1 | ...`, every trunk once. Linear layers, norms and the head see real tokens only;
attention spreads them out, so that a branch sees its trunk and itself. The numbers are those of one padded row a text, but for the last
bits. Whether a model reads positions as they are given and attends through transformers' interface (recurrent, ALiBi and softcapped ones
do not) is tried out on it once, not looked up: `allows` in scoring.py.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from p3o_lightning.forwards import positions_of, unwrapped
from p3o_lightning.token_attention import one_token_attention

NAME = "p3o_packed"  # of the attention below, in a model's config
TERMS = ("softcap", "s_aux", "position_bias", "cache")  # of an attention that is more than a softmax of products


class Packing:
    """Where the tokens of every trunk and branch lie in the row.

    Args:
        trunk_mask: real tokens of the trunks, padded on either side.
        branch_mask: real tokens of the branches, padded on the right.
        multiple: the row is filled up to a multiple of so many tokens, with some that nothing reads. In half precision a CPU makes a
            kernel anew for every length that it has not met, which takes longer than running it.
    """

    def __init__(
        self, trunk_mask: Bool[Tensor, "group trunk_token"], branch_mask: Bool[Tensor, "group branch token"], multiple: int = 1
    ) -> None:
        self.trunk_mask, self.branch_mask = trunk_mask, branch_mask
        self.groups, self.branches = branch_mask.shape[:2]
        self.trunk_lengths = trunk_mask.sum(-1)
        self.trunk_tokens = int(self.trunk_lengths.sum())
        self.branch_tokens = int(branch_mask.sum())
        self.filling = -(self.trunk_tokens + self.branch_tokens) % multiple
        self.trunk_width, self.branch_width = (
            int(lengths.max()) if lengths.numel() else 0 for lengths in (self.trunk_lengths, branch_mask.sum(-1))
        )
        compact = torch.arange(self.trunk_width, device=trunk_mask.device) < self.trunk_lengths.unsqueeze(-1)
        self._even = bool(compact.all())  # all trunks are of one length
        self._trunk_slots = None if self._even else compact.flatten().nonzero().squeeze(1)
        branch = branch_mask[..., : self.branch_width]
        self._branch_slots = None if bool(branch.all()) else branch.flatten().nonzero().squeeze(1)
        self._seen: Tensor | None = None

    def tokens(self, trunk_tokens: Int[Tensor, "group trunk_token"], branch_tokens: Int[Tensor, "group branch token"]) -> Tensor:
        """The row, (1, token)."""
        return self._filled(torch.cat([trunk_tokens[self.trunk_mask], branch_tokens[self.branch_mask]])).unsqueeze(0)

    def positions(self) -> Tensor:
        """Of the row's tokens, (1, token): every branch goes on where its trunk ends."""
        behind = self.trunk_lengths.view(-1, 1, 1) + torch.arange(self.branch_mask.shape[-1], device=self.branch_mask.device)
        behind = behind.expand(self.branch_mask.shape)
        return self._filled(torch.cat([positions_of(self.trunk_mask)[self.trunk_mask], behind[self.branch_mask]])).unsqueeze(0)

    def _filled(self, row: Tensor) -> Tensor:
        return torch.cat([row, row.new_zeros(self.filling, *row.shape[1:])]) if self.filling else row

    def trunk_ends(self) -> Int[Tensor, " group"]:
        """Where in the row each trunk's last token is."""
        return self.trunk_lengths.cumsum(0) - 1

    def branch_places(self) -> Int[Tensor, "group branch token"]:
        """Where in the row each branch's tokens are; without meaning outside the mask."""
        places = self.branch_mask.flatten().long().cumsum(0) + (self.trunk_tokens - 1)
        return places.view(self.branch_mask.shape)

    def texts(self, row: Int[Tensor, "1 token"]) -> list[Tensor]:
        """What the row stands for: every branch behind its trunk."""
        trunks = row[0, : self.trunk_tokens].split(self.trunk_lengths.tolist())
        branches = row[0, self.trunk_tokens : self.trunk_tokens + self.branch_tokens].split(self.branch_mask.sum(-1).flatten().tolist())
        return [torch.cat([trunks[index // self.branches], branch]) for index, branch in enumerate(branches)]

    def options(self) -> dict[str, Any]:
        """What a forward needs beside the tokens. The mask keeps transformers from making one; an attention that read it would fail."""
        unread = torch.ones(1, 1, 0, 0, dtype=torch.bool, device=self.branch_mask.device)
        return {"position_ids": self.positions(), "attention_mask": unread, "packing": self}

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, dropout: float, scaling: float | None
    ) -> Float[Tensor, "1 token head channel"]:
        """Scaled dot-product attention of the row, given and returned as transformers does: query etc. (1, head, token, channel)."""
        given, kind = query.dtype, query.device.type
        if kind == "cpu":  # whose backward in half precision is four times as slow
            query, key, value = (states.float() if states.dtype.itemsize < 4 else states for states in (query, key, value))
        else:
            if torch.is_autocast_enabled(kind):  # as autocast itself would, twice
                query, key, value = (states.to(torch.get_autocast_dtype(kind)) for states in (query, key, value))
            if key.shape[1] != query.shape[1]:  # a mask and grouped heads leave the fast kernels
                key, value = (states.repeat_interleave(query.shape[1] // key.shape[1], 1) for states in (key, value))
        options: Any = {"dropout_p": dropout, "scale": scaling, "enable_gqa": key.shape[1] != query.shape[1]}
        sizes = [self.trunk_tokens, self.branch_tokens, self.filling]
        of_trunks, of_branches, _ = zip(*(states.squeeze(0).transpose(0, 1).split(sizes) for states in (query, key, value)), strict=True)
        parts = []
        with torch.autocast(kind, enabled=False):
            q, k, v = (_spread(row, self._trunk_slots, self.groups, self.trunk_width) for row in of_trunks)
            if self.trunk_tokens:  # padded on the right: what is padding comes after, and is not seen
                seen = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, **options)
                parts.append(_gathered(seen, self._trunk_slots))
            if self.branch_width:
                count = self.groups * self.branches
                q, own_k, own_v = (_spread(row, self._branch_slots, count, self.branch_width) for row in of_branches)
                k, v = (torch.cat([self._repeated(trunk), own], 2) for trunk, own in ((k, own_k), (v, own_v)))
                seen = nn.functional.scaled_dot_product_attention(q, k, v, self._mask(q.dtype), **options)
                parts.append(_gathered(seen, self._branch_slots))
        return self._filled(torch.cat(parts)).unsqueeze(0).to(given)

    def _repeated(self, trunk: Tensor) -> Tensor:
        """Once for every branch."""
        return trunk.unsqueeze(1).expand(-1, self.branches, -1, -1, -1).flatten(0, 1)

    def _mask(self, dtype: torch.dtype) -> Tensor:
        """What a branch's token sees, as numbers to add: (query, key), for every branch where trunks are not of one length."""
        if self._seen is None or self._seen.dtype != dtype:
            device, width = self.trunk_mask.device, self.branch_width
            own = torch.ones(width, width, dtype=torch.bool, device=device).tril()
            trunk = torch.arange(self.trunk_width, device=device) < self.trunk_lengths[: 1 if self._even else None].unsqueeze(-1)
            seen = torch.cat([trunk.unsqueeze(1).expand(-1, width, -1), own.expand(len(trunk), -1, -1)], -1)
            mask = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, -torch.inf)
            self._seen = mask[0] if self._even else mask.repeat_interleave(self.branches, 0).unsqueeze(1)
        return self._seen


def _spread(row: Tensor, slots: Tensor | None, rows: int, width: int) -> Tensor:
    """(token, head, channel) to (row, head, width, channel), 0 where no token is."""
    if slots is not None:
        row = row.new_zeros(rows * width, *row.shape[1:]).index_copy(0, slots, row)
    return row.reshape(rows, width, *row.shape[1:]).transpose(1, 2)


def _gathered(spread: Tensor, slots: Tensor | None) -> Tensor:
    """The way back."""
    row = spread.transpose(1, 2).flatten(0, 1)
    return row if slots is None else row.index_select(0, slots)


def multiple_for(model: nn.Module) -> int:
    """What a row's tokens are best a multiple of: in half precision, of what the units for it multiply at a time."""
    parameter = next(unwrapped(model).parameters())
    kind = parameter.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else parameter.dtype
    return 64 if dtype.itemsize < 4 else 1


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packing: Packing | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' "sdpa"; or, where a forward is given `packing`, that of its row."""
    if packing is None:
        plain = not dropout and not any(options.get(name) is not None for name in TERMS)
        if plain and (seen := one_token_attention(query, key, value, attention_mask, scaling)) is not None:
            return seen, None
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options)
    if any(options.get(name) is not None for name in TERMS):
        raise ValueError("attention with a term of its own")
    return packing.attend(query, key, value, dropout, scaling), None


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def attention(model: nn.Module) -> str:
    """The name of what the model attends by."""
    config: Any = unwrapped(model).config
    return str(getattr(config, "_attn_implementation", ""))


def set_attention(model: nn.Module, name: str) -> None:
    """In all its configs: modules whose dropout was turned off have their own."""
    configs = [vars(module).get("config") for module in unwrapped(model).modules()]
    for config in {id(config): config for config in configs if getattr(config, "_attn_implementation", None)}.values():
        config._attn_implementation = name
