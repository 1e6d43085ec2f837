"""Rows to token ids to batches: chat templates, BOS and EOS, length limits, compact storage, padding.

Prompt and reply are tokenised apart, so that a prompt has the same ids in every view: what the reward model read is what the policy
will see.
"""

from __future__ import annotations

import hashlib
import json
import re
from array import array
from collections.abc import Iterable, Iterator
from itertools import islice, pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from p3o_lightning.batches import DemonstrationBatch, PairBatch, PromptBatch
from p3o_lightning.data_files import show
from p3o_lightning.data_formats import ASSISTANT, Message, Row, Text, Unusable, View
from p3o_lightning.errors import InputError
from p3o_lightning.sequences import pad_left, pad_right

TokenIds = NDArray[np.int32]

_CHUNK_ROWS, _CHUNK_TEXT = 256, 1 << 20  # rows, and characters, after which the tokenizer is called: ids take ten times their memory
_TURN = re.compile(r"\n\n(Human|Assistant):")
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # legal in JSON, impossible in UTF-8: tokenised as U+FFFD, the replacement character
_SPEAKERS = {"user": "Human", "assistant": "Assistant"}


class Encoded(NamedTuple):
    """One row as token ids, without padding."""

    prompt: TokenIds
    replies: tuple[TokenIds, ...]  # EOS included
    margin: float | None
    key: bytes  # the same for equal prompts
    text: Text  # the prompt as in the data
    columns: dict[str, Any]


class Encoder:
    """Turns usable rows into token ids; a row that is too long, or that the chat template cannot render, becomes Unusable.

    Args:
        tokenizer: must have an EOS token.
        view: what the rows are for.
        max_length: tokens of prompt and longest reply together, EOS included.
        max_prompt_length: tokens of the prompt; None: limited by max_length alone.
        chat: parse hh-rlhf transcripts into messages (other prompts become one user message), to be rendered with the chat template.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, view: View, max_length: int, max_prompt_length: int | None = None, chat: bool = False
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise InputError(
                f"data.tokenizer ({tokenizer.name_or_path!r}) has no EOS token, so no reply could end: set tokenizer.eos_token."
            )
        self.tokenizer, self.view, self.chat = tokenizer, view, chat
        self.max_length, self.max_prompt_length = max_length, max_prompt_length
        self._bos = _bos_of(tokenizer)

    def __call__(self, rows: Iterable[Row | Unusable]) -> Iterator[Encoded | Unusable]:
        """One result for every row, in order."""
        for chunk in _chunks(self._rendered(row) for row in rows):
            ids = iter(_tokenise(self.tokenizer, [text for _, texts in chunk for text in texts]))
            for row, texts in chunk:
                yield row if isinstance(row, Unusable) else self._limited(row, *islice(ids, len(texts)))

    def _rendered(self, row: Row | Unusable) -> tuple[Row | Unusable, tuple[str, ...]]:
        """The row, and its texts."""
        if isinstance(row, Unusable):
            return row, ()
        row = _as_chat(row) if self.chat else row
        texts = _render(self.tokenizer, row)
        return (texts, ()) if isinstance(texts, Unusable) else (row, texts)

    def _limited(self, row: Row, prompt: list[int], *replies: list[int]) -> Encoded | Unusable:
        prompt = _begun(prompt, self._bos)
        replies = tuple(_ended(reply, self.tokenizer) for reply in replies)
        if self.max_prompt_length is not None and len(prompt) > self.max_prompt_length:
            return Unusable("over max_prompt_length")
        if len(prompt) + max(map(len, replies), default=0) > self.max_length:
            return Unusable("over max_length")
        ids = [np.asarray(part, dtype=np.int32) for part in (prompt, *replies)]
        return Encoded(ids[0], tuple(ids[1:]), row.margin, _key(row), row.prompt, row.columns)


def _chunks(rows: Iterable[tuple[Row | Unusable, tuple[str, ...]]]) -> Iterator[list[tuple[Row | Unusable, tuple[str, ...]]]]:
    """The rows in groups of some hundreds, or fewer long ones."""
    chunk, characters = list[tuple[Row | Unusable, tuple[str, ...]]](), 0
    for row in rows:
        chunk.append(row)
        characters += sum(map(len, row[1]))
        if len(chunk) == _CHUNK_ROWS or characters > _CHUNK_TEXT:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Text) -> list[int]:
    """The ids of one prompt, a text or messages, exactly as in the data's batches. Raises InputError if the chat template refuses it."""
    texts = _render(tokenizer, Row(prompt, (), None, {}))
    if isinstance(texts, Unusable):
        raise InputError(
            f"the prompt {show(prompt)} is {texts.reason} of the tokenizer {tokenizer.name_or_path!r}: choose another template."
        )
    return _begun(_tokenise(tokenizer, [texts[0]])[0], _bos_of(tokenizer))


def encode_response(tokenizer: PreTrainedTokenizerBase, response: str) -> list[int]:
    """The ids of one response text, EOS included, exactly as in the data's batches.

    >>> from p3o_lightning.tokenizers import byte_tokenizer
    >>> tokenizer = byte_tokenizer()
    >>> encode_response(tokenizer, "ab") == [*tokenizer("ab")["input_ids"], tokenizer.eos_token_id]
    True
    """
    return _ended(_tokenise(tokenizer, [response])[0], tokenizer)


def _bos_of(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """[BOS] if the tokenizer itself puts it in front of a text, else []."""
    front = list(tokenizer("a")["input_ids"][:1])
    return front if front == [tokenizer.bos_token_id] else []


def _begun(prompt: list[int], bos: list[int]) -> list[int]:
    return prompt if prompt[:1] == bos else bos + prompt  # the chat template may have begun it


def _ended(reply: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Up to the first EOS, which is added where there is none: templates write more after it, and nothing can be generated there."""
    eos = tokenizer.eos_token_id
    return [*reply[: reply.index(eos) if eos in reply else None], eos]


def _tokenise(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    if not texts:
        return []
    texts = [_whole(text) for text in texts]
    return list(tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"])


def _whole(text: str) -> str:
    """`text` as it is tokenised."""
    return _LONE_SURROGATE.sub("\ufffd", text)


def _render(tokenizer: PreTrainedTokenizerBase, row: Row) -> tuple[str, ...] | Unusable:
    """The texts of prompt and replies; messages go through the chat template, or become a transcript where the tokenizer has none."""
    prompt, replies = row.prompt, row.replies
    if isinstance(prompt, str):
        return (prompt, *map(str, replies))
    answers = [list[Message](reply) for reply in replies if isinstance(reply, list)]
    if not tokenizer.chat_template:
        turns = (f"\n\n{_SPEAKERS.get(turn['role'], turn['role'].capitalize())}: {turn['content']}" for turn in prompt)
        return ("".join(turns) + ASSISTANT, *(f" {answer[-1]['content']}" for answer in answers))
    try:
        begin = str(tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True))
        wholes = [str(tokenizer.apply_chat_template([*prompt, *answer], tokenize=False)) for answer in answers]
    except Exception:  # a template is a program that came with the tokenizer: it divides by zero, asks for what is not there
        return Unusable("refused by the chat template")
    if not all(whole.startswith(begin) for whole in wholes):
        return Unusable("changed by the chat template")
    return (begin, *(whole[len(begin) :] for whole in wholes))


def _as_chat(row: Row) -> Row:
    """A row of texts as messages: a transcript's turns, or one user message. A `text` row has no prompt; its text may be a transcript."""
    prompt, replies = row.prompt, row.replies
    if prompt == "" and len(replies) == 1 and ASSISTANT in str(replies[0]):
        prompt, _, reply = str(replies[0]).rpartition(ASSISTANT)
        replies = (reply,)
    if not isinstance(prompt, str) or not prompt.strip():
        return row
    before, *turns = _TURN.split(prompt.removesuffix(ASSISTANT))
    messages = [
        {"role": "user" if speaker == "Human" else "assistant", "content": said.strip()}
        for speaker, said in zip(turns[::2], turns[1::2], strict=True)
    ]
    if before.strip():
        messages.insert(0, {"role": "system" if messages else "user", "content": before.strip()})
    return row._replace(prompt=messages, replies=tuple([{"role": "assistant", "content": str(reply).strip()}] for reply in replies))


def _key(row: Row) -> bytes:
    text: Text = row.prompt or (row.replies[0] if row.replies else "")  # a text without a prompt is its own
    if isinstance(text, str):
        canonical = _whole(text)
    else:  # whatever else stands in a message, such as a number of its own, makes no other prompt of it
        said = [{name: _whole(turn[name]) for name in ("role", "content")} for turn in text]
        canonical = json.dumps(said, sort_keys=True)
    return hashlib.blake2b(canonical.encode("utf-8"), digest_size=16).digest()


class TokenRows(Dataset[Encoded]):
    """Encoded rows in two flat integer arrays: four bytes a token, shared by forked workers without copies."""

    def __init__(self, rows: Iterable[Encoded]) -> None:
        tokens, ends, self.margins = array("i"), array("q", [0]), array("f")
        self.keys: list[bytes] = []
        self.texts: list[Text] = []
        self.columns: list[dict[str, Any]] = []
        self.replies = 0
        for row in rows:
            for ids in (row.prompt, *row.replies):
                tokens.frombytes(ids.tobytes())
                ends.append(len(tokens))
            self.replies = len(row.replies)
            self.keys.append(row.key)
            if row.margin is not None:
                self.margins.append(row.margin)
            if not row.replies:  # only rollouts need the words, for reward functions
                self.texts.append(row.text)
                self.columns.append(row.columns)
        self.tokens, self.ends = np.frombuffer(tokens, dtype=np.int32), np.frombuffer(ends, dtype=np.int64)
        # every reward function gets every column, whichever rows it appears in
        names = {name: None for row in self.columns for name in row}
        self.columns = [{name: row.get(name) for name in names} for row in self.columns]

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> Encoded:
        width = 1 + self.replies
        ends = self.ends[index * width : (index + 1) * width + 1]
        prompt, *replies = (self.tokens[begin:end] for begin, end in pairwise(ends))
        text, columns = (self.texts[index], self.columns[index]) if self.texts else ("", {})
        return Encoded(prompt, tuple(replies), self.margins[index] if self.margins else None, self.keys[index], text, columns)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of prompt and longest reply, one for every row."""
        parts = np.diff(self.ends).reshape(len(self), 1 + self.replies)
        return parts[:, 0] + parts[:, 1:].max(1, initial=0)

    def fingerprint(self) -> str:
        """A hash of all tokens and margins: equal data, equal fingerprint, on every machine."""
        digest = hashlib.blake2b(digest_size=16)
        for part in (self.tokens, self.ends, self.margins):
            digest.update(part.tobytes())
        return digest.hexdigest()


def collate_demonstrations(rows: list[Encoded], pad: int) -> DemonstrationBatch:
    """Prompt and reply in one row, padded on the right."""
    tokens, attention_mask = pad_right([np.concatenate([row.prompt, row.replies[0]]) for row in rows], pad)
    begins = torch.tensor([len(row.prompt) for row in rows])
    return DemonstrationBatch(tokens, attention_mask, attention_mask & (torch.arange(tokens.shape[1]) >= begins[:, None]))


def collate_pairs(rows: list[Encoded], pad: int) -> PairBatch:
    """Both replies after their prompt, padded on the right to one width."""
    tokens, attention_mask = pad_right([np.concatenate([row.prompt, reply]) for row in rows for reply in row.replies], pad)
    margins = [row.margin for row in rows if row.margin is not None]
    return PairBatch(
        tokens.view(len(rows), 2, -1),
        attention_mask.view(len(rows), 2, -1),
        torch.tensor([[len(reply) for reply in row.replies] for row in rows]),
        torch.tensor(margins) if margins else None,
    )


def collate_prompts(rows: list[Encoded], pad: int) -> PromptBatch:
    """Prompts padded on the left, with their words and the data's other columns for reward functions."""
    columns = {name: [row.columns[name] for row in rows] for name in rows[0].columns}
    return PromptBatch(*pad_left([row.prompt for row in rows], pad), [row.text for row in rows], columns)
