"""Preference data in the field's formats, turned into rows of one shape: a prompt and its replies.

Two kinds of bad row are told apart. A malformed one (unreadable, column missing, wrong type) stops with its place, value and fix. A
well-formed one that cannot be used (empty reply, different contexts) becomes an `Unusable` with its reason, to be counted. For every
usable row, prompt + reply is the original text, byte for byte.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple, TypeAlias

from p3o_lightning.data_files import Record, show
from p3o_lightning.errors import InputError

View: TypeAlias = Literal["demonstrations", "pairs", "prompts"]
Message: TypeAlias = dict[str, Any]  # {"role": ..., "content": ...}; other keys reach the chat template
Text: TypeAlias = str | list[Message]

COLUMNS = ("prompt", "chosen", "rejected", "completion", "messages", "text", "margin")
ASSISTANT = "\n\nAssistant:"  # hh-rlhf: what stands between a context and the reply
HUMAN = "\n\nHuman:"

# What each view can be made of, the first that fits; `prompt` and `margin` may stand beside chosen and rejected.
_PAIR = ("chosen", "rejected")
_STYLES: dict[str, tuple[tuple[str, ...], ...]] = {
    "pairs": (_PAIR,),
    "demonstrations": (("prompt", "completion"), ("messages",), _PAIR, ("text",)),
    "prompts": (_PAIR, ("prompt",), ("messages",)),
}
_LARGEST = 3.4e38  # in float32, as margins are kept, more is infinite
_TEXT_FIX = 'write a text, or a list of {"role", "content"} messages'


class Row(NamedTuple):
    """One usable row. Prompt and replies are all texts or all lists of messages."""

    prompt: Text
    replies: tuple[Text, ...]  # () for prompts, (demonstration,), or (chosen, rejected)
    margin: float | None  # reward units
    columns: dict[str, Any]  # whatever else the data has


class Unusable(NamedTuple):
    """A well-formed row that cannot be used, and why."""

    reason: str


def normalise(
    records: Iterable[Record], view: View, columns: dict[str, str] | None = None, field: str = "data.path"
) -> Iterator[Row | Unusable]:
    """Turn records into rows of the view; the first record decides which columns all others must have.

    `columns` renames: {"prompt": "question"} reads our `prompt` from the data's `question`. Raises InputError at the first malformed row.
    """
    names = {name: name for name in COLUMNS} | (columns or {})
    if unknown := sorted(set(names) - set(COLUMNS)):
        raise InputError(f"data.columns names {unknown[0]!r}, which is no column of ours: rename one of {', '.join(COLUMNS)}.")
    style: tuple[str, ...] | None = None
    for record in records:
        if style is None:
            style = _style_of(record, view, names, columns or {}, field)
        for name in ("prompt", "margin") if set(_PAIR) <= set(style) else ():
            if name not in style and names[name] in record.values:
                raise InputError(
                    f"{record.where}: column {names[name]!r} is there, but the first row has none: give it in every row or in none."
                )
        values = {name: _value(record, name, names[name]) for name in style}
        others = {key: value for key, value in record.values.items() if key not in {names[name] for name in style} | set(style)}
        yield _row(values, view, others)


def split_texts(chosen: str, rejected: str) -> tuple[str, str, str] | Unusable:
    """(prompt, chosen reply, rejected reply) of two texts that hold their prompt: prompt + reply == the original, always.

    hh-rlhf transcripts are cut after their last "\\n\\nAssistant:". Other texts share their longest common beginning, cut back
    so that no word is split and both replies have something to say; a space before the cut goes to the replies, where tokenizers want it.

    >>> split_texts("The sky is blue", "The sky is black")
    ('The sky is', ' blue', ' black')
    >>> split_texts("\\n\\nHuman: Hi\\n\\nAssistant: Hello.", "\\n\\nHuman: Hi\\n\\nAssistant: Go away.")
    ('\\n\\nHuman: Hi\\n\\nAssistant:', ' Hello.', ' Go away.')
    """
    marked = [ASSISTANT in text for text in (chosen, rejected)]
    if all(marked):
        cut, other = (text.rindex(ASSISTANT) + len(ASSISTANT) for text in (chosen, rejected))
        if chosen[:cut] != rejected[:other]:
            return Unusable("different contexts")
    elif any(marked) and chosen.startswith(HUMAN) and rejected.startswith(HUMAN):
        return Unusable("different contexts")
    else:
        last = min(len(chosen.rstrip()), len(rejected.rstrip()))  # a cut before this leaves both replies something to say
        cut = min(_common(chosen, rejected), max(last - 1, 0))
        while cut and not (chosen[cut - 1].isspace() or (chosen[cut].isspace() and rejected[cut].isspace())):
            cut -= 1
        cut -= cut > 0 and chosen[cut - 1] == " "
    replies = chosen[cut:], rejected[cut:]
    return (chosen[:cut], *replies) if all(map(str.strip, replies)) else Unusable("empty reply")


def _common(one: str, other: str) -> int:
    """How many characters two texts share at their beginning."""
    return next((index for index, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def split_messages(chosen: list[Message], rejected: list[Message]) -> tuple[list[Message], list[Message], list[Message]]:
    """(prompt, chosen reply, rejected reply) of two conversations: their common leading messages, and at least one more on either side."""
    same = 0
    while same < min(len(chosen), len(rejected)) - 1 and chosen[same] == rejected[same]:
        same += 1
    return chosen[:same], chosen[same:], rejected[same:]


def _style_of(record: Record, view: View, names: dict[str, str], columns: dict[str, str], field: str) -> tuple[str, ...]:
    found = record.values
    for name, source in columns.items():
        if source not in found:
            raise InputError(
                f"data.columns reads {name!r} from {source!r}, but {record.where} has only {_names(found)}: name one of these."
            )
    for style in _STYLES[view]:
        if all(names[name] in found for name in style):
            beside = ("prompt", "margin") if style == _PAIR else ()
            return (*style, *(name for name in beside if names[name] in found))
    accepted = " or ".join("+".join(style) for style in _STYLES[view])
    raise InputError(
        f"{field}: {record.where} has the columns {_names(found)}, but the view {view!r} needs {accepted}: "
        'rename them by data.columns, e.g. {"prompt": "question"}.'
    )


def _names(values: dict[str, Any]) -> str:
    return ", ".join(show(name) for name in list(values)[:20]) or "none"


def _value(record: Record, name: str, source: str) -> Any:
    if source not in record.values:
        raise InputError(f"{record.where}: column {source!r} is missing (found: {_names(record.values)}): give it in every row.")
    value, where = record.values[source], f"{record.where}, column {source!r}"
    if name == "margin":
        return _margin(value, where)
    if isinstance(value, str):
        if name == "messages":
            raise InputError(f'{where}: {show(value)} is no list of messages: write [{{"role": "user", "content": "..."}}, ...].')
        return value
    if isinstance(value, list) and name != "text":
        return [_message(item, f"{where}, message {number}") for number, item in enumerate(value, 1)]
    raise InputError(f"{where}: {show(value)} is no text: {'write a text' if name == 'text' else _TEXT_FIX}.")


def _message(item: Any, where: str) -> Message:
    if not isinstance(item, dict):
        raise InputError(f'{where}: {show(item)} is no message: write {{"role": "user", "content": "..."}}.')
    for key in ("role", "content"):
        if not isinstance(item.get(key), str):
            raise InputError(f'{where}: {show(item)} has no text {key!r}: write {{"role": "user", "content": "..."}}.')
    return {key: value for key, value in item.items() if value is not None}  # parquet fills keys that other rows have


def _margin(value: Any, where: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not abs(number) <= _LARGEST:
        raise InputError(f"{where}: {show(value)} is no finite number: write how much better the chosen reply is, e.g. 1.5.")
    return number


def _row(values: dict[str, Any], view: View, others: dict[str, Any]) -> Row | Unusable:
    """Prompt and replies of one row. All views drop the same rows of a pair file, so that they split alike."""
    prompt: Text
    replies: tuple[Text, ...]
    if "chosen" in values:
        split = _split_pair(values.get("prompt"), values["chosen"], values["rejected"])
        if isinstance(split, Unusable):
            return split
        prompt, *rest = split
        replies = tuple(rest)
    elif "messages" in values:
        messages = values["messages"]
        answered = bool(messages) and messages[-1]["role"] == "assistant"
        if not answered and view == "demonstrations":
            return Unusable("empty reply")
        prompt, replies = (messages[:-1], (messages[-1:],)) if answered else (messages, ())
    elif "text" in values:
        prompt, replies = "", (values["text"],)
    else:
        prompt, replies = values["prompt"], (values["completion"],) if "completion" in values else ()
    # an implicit prompt may be empty where replies follow: two texts that differ from the first word on are a pair all the same
    if not _says(prompt) and ("prompt" in values or view == "prompts" or isinstance(prompt, list)):
        return Unusable("empty prompt")
    if not all(map(_says, replies)):
        return Unusable("empty reply")
    if isinstance(prompt, list) or any(isinstance(reply, list) for reply in replies):
        prompt = _as_messages(prompt, "user")
        answers = [_as_messages(reply, "assistant") for reply in replies]
        if any(answer[-1]["role"] != "assistant" for answer in answers):
            return Unusable("empty reply")
        if any(len(answer) > 1 for answer in answers):
            return Unusable("several messages in a reply")
        replies = tuple(answers)
    kept = {"pairs": replies, "demonstrations": replies[:1], "prompts": ()}[view]
    return Row(prompt, kept, values.get("margin") if view == "pairs" else None, others)


def _split_pair(prompt: Text | None, chosen: Text, rejected: Text) -> tuple[Text, Text, Text] | Unusable:
    if isinstance(chosen, str) and isinstance(rejected, str):
        return split_texts(chosen, rejected) if prompt is None else (prompt, chosen, rejected)
    chosen, rejected = _as_messages(chosen, "assistant"), _as_messages(rejected, "assistant")
    if not chosen or not rejected:
        return Unusable("empty reply")
    if isinstance(prompt, list):
        return prompt, chosen, rejected
    # whole conversations, with the question once more in `prompt` or not at all (as in UltraFeedback)
    history, chosen, rejected = split_messages(chosen, rejected)
    if len(chosen) > 1 or len(rejected) > 1:
        return Unusable("different contexts")
    return history or prompt or [], chosen, rejected


def _as_messages(text: Text, role: str) -> list[Message]:
    return [{"role": role, "content": text}] if isinstance(text, str) else text


def _says(text: Text) -> bool:
    """Whether there is anything but white space: for a conversation, in its last message."""
    return bool(text.strip() if isinstance(text, str) else text and text[-1]["content"].strip())
