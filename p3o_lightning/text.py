"""Text of a stranger, made safe to show: on a terminal, on the dashboard, whose texts are Markdown, and in a file of JSON lines.

What would act instead of being read (terminal escapes, marks that turn the direction of a line around, halves of a character) is written
out as in Python: `\\x1b`, `\\u202e`, `\\ud800`.
"""

from __future__ import annotations

import json
import re
from typing import Any

# Cc and Cs, line and paragraph separators, and what turns the direction of writing around: invisible, or dangerous, or no text at all.
_ACTING = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")
_MARKUP = re.compile(r"[&<>\"'\\`*_{}\[\]()#+\-|~^=:!]")


def visible(text: str) -> str:
    """`text` on one line, with everything that would act on a terminal written out; other characters, of any script, stay.

    >>> print(visible("café\\x1b[2J\\nend"))
    café\\x1b[2J\\x0aend
    """
    return _ACTING.sub(lambda found: _written(found.group()), text)


def escaped(text: str) -> str:
    """`text` as a cell of a Markdown table: no character of it is markup, HTML or an end of the cell; its lines stay lines."""
    lines = (visible(line) for line in re.split("\r\n|\r|\n", text))
    return "<br>".join(_MARKUP.sub(lambda found: f"&#{ord(found.group())};", line) for line in lines)


def fenced(text: str, language: str = "") -> str:
    """`text` as a Markdown block of code that nothing in it can end: its fence is longer than any in the text."""
    lines = "\n".join(visible(line) for line in re.split("\r\n|\r|\n", text))
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", lines)), default=0))
    return f"{fence}{language}\n{lines}\n{fence}"


def json_line(value: Any) -> str:
    """`value` on one line of strict JSON in UTF-8: half a character is written as its number, NaN as null, what JSON lacks as a text."""
    strict = json.loads(json.dumps(value, default=str), parse_constant=lambda _: None)
    return _ACTING.sub(lambda found: f"\\u{ord(found.group()):04x}", json.dumps(strict, ensure_ascii=False))


def _written(character: str) -> str:
    number = ord(character)
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}"
