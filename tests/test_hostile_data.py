"""Data of a stranger: whatever a file holds, one line says what is wrong with it, or a report says what became of its rows."""

import csv
import gzip
import json
import logging
import math
import os
import re
import signal
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.utilities import move_data_to_device

from p3o_lightning import PreferenceDataModule, data_files
from p3o_lightning.encoding import Encoder
from p3o_lightning.errors import InputError
from p3o_lightning.tokenizers import byte_tokenizer

BYTES = byte_tokenizer()
VIEWS = ("pairs", "demonstrations", "prompts")


@pytest.fixture(autouse=True)
def no_reports(monkeypatch):
    """A line for each of a thousand files."""
    monkeypatch.setattr(logging.getLogger("lightning.pytorch.utilities.rank_zero"), "disabled", True)


@contextmanager
def seconds(limit: float):
    """Ends what takes longer, even where it waits for something that never comes."""

    def stop(*_: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def read(path: Path | str, view: str, **options: Any) -> PreferenceDataModule | str:
    """The data module after `setup`, or the one line that it refused the file with. Nothing else comes out."""
    options = {"batch_size": 1, "val_fraction": 0.4, "max_length": 4000, **options}
    data = PreferenceDataModule(str(path), BYTES, view, **options)  # type: ignore[arg-type]
    try:
        data.setup()
    except InputError as error:
        text = str(error)
        assert len(text.splitlines()) == 1 and len(text) < 800, text
        name = Path(path).name[:20]
        assert name in text or repr(name)[1:-1] in text, text
        return text
    return data


# ------------------------------------------------------------------------------------------------ generated records

# Written once more, on purpose: which columns each view is made of, and what makes a row malformed.
STYLES = {
    "pairs": [("chosen", "rejected")],
    "demonstrations": [("prompt", "completion"), ("messages",), ("chosen", "rejected"), ("text",)],
    "prompts": [("chosen", "rejected"), ("prompt",), ("messages",)],
}
AWKWARD = [
    "",
    " ",
    "\n\n",
    "\x00",
    "\x1b[31mred\x1b[0m",
    "\x7f\x9b2J\x85",
    "<script>alert(1)</script>",
    "<eos>",
    "<pad>",
    "\ud800",
    "\udfff",
    "\u202eabc",
    "\u200b\u200d\ufeff",
    "שלום",
    "👩‍👩‍👧",
    "e\u0301",
    "\u2028",
    "\r\n",
    "a\rb",
    '"',
    "a,b",
    "{}",
    "\n\nHuman: a\n\nAssistant:",
    "\n\nAssistant:",
    "\n\nHuman:",
]
words = st.sampled_from(AWKWARD) | st.text(max_size=6)
texts = st.lists(words, min_size=1, max_size=3).map("".join)
few = st.sampled_from(["Why?", "How? ", "\n\nHuman: Hi\n\nAssistant:", "What\ud800", "What\udc00", "\x1b]0;x\x07", "a"])
transcripts = st.builds("\n\nHuman: {}\n\nAssistant:{}".format, words, texts)
roles = st.sampled_from(["user", "assistant", "system", "tool", "", "\x1b[1m"])
messages = st.fixed_dictionaries({"role": roles, "content": texts}, optional={"name": st.none() | texts, "weight": st.floats()})
conversations = st.lists(messages, max_size=2).flatmap(
    lambda turns: texts.map(lambda said: [*turns, {"role": "assistant", "content": said}])
)
junk = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.just(10**30)
    | st.floats()
    | texts
    | st.sampled_from([math.nan, math.inf, 1e300, -0.0, "1.5", "nan", b"".decode()]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["role", "content", "x"]), inner, max_size=2),
    max_leaves=4,
)
prompts = few | texts | st.lists(messages, min_size=1, max_size=2)
SHAPES = {
    "explicit": {"prompt": few, "chosen": texts, "rejected": texts},
    "implicit": {"chosen": st.tuples(few, texts).map("".join), "rejected": st.tuples(few, texts).map("".join)},
    "transcripts": {"chosen": transcripts, "rejected": transcripts},
    "conversations": {"chosen": conversations, "rejected": conversations},
    "asked": {"prompt": prompts, "chosen": texts | conversations, "rejected": texts | conversations},
    "margins": {"prompt": few, "chosen": texts, "rejected": texts, "margin": st.floats(-9, 9) | st.integers(-9, 9)},
    "demonstrations": {"prompt": prompts, "completion": texts},
    "messages": {"messages": conversations | st.lists(messages, max_size=3)},
    "texts": {"text": texts | transcripts},
    "questions": {"prompt": prompts},
}


# What these kinds of file can hold: texts alone, or columns of one type each.
TEXTS_ALONE = ("explicit", "implicit", "transcripts", "texts")
ONE_TYPE = (*TEXTS_ALONE, "conversations", "messages", "margins")
HELD = {".csv": TEXTS_ALONE, ".parquet": ONE_TYPE}


@st.composite
def files(draw: st.DrawFn, kind: str) -> list[dict[str, Any]]:
    """The rows of a file: of one shape, and in some files one of them tampered with."""
    shape = SHAPES[draw(st.sampled_from(HELD.get(kind, sorted(SHAPES))))]
    others = {name: junk for name in draw(st.sets(st.sampled_from(["level", "source", "tags"]), max_size=2)) if kind not in HELD}
    rows = draw(st.lists(st.fixed_dictionaries({**shape, **others}), min_size=5, max_size=15))
    if draw(st.integers(0, 2)) == 0:
        row = rows[draw(st.integers(0, len(rows) - 1))]
        name = draw(st.sampled_from([*sorted(shape), "prompt", "margin"]))
        if draw(st.booleans()):
            row.pop(name, None)
        else:
            row[name] = draw(texts if kind == ".csv" else junk)
    return rows


def write(path: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
    """Write the file; what a reader of another make finds in it. None where this kind cannot hold the rows."""
    if path.suffix in HELD:  # no half characters, and in CSV no zero byte
        rows = json.loads(re.sub(r"\\u(d[89a-f]..|0000)", "?", json.dumps(rows)))
    try:
        if path.suffix == ".csv":
            with path.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
            with path.open(newline="", encoding="utf-8") as file:
                return list(csv.DictReader(file))
        if path.suffix == ".parquet":
            pa.parquet.write_table(pa.Table.from_pylist(rows), path)
            return pa.parquet.read_table(path).to_pylist()
    except (ValueError, TypeError, OverflowError, pa.ArrowException):  # a column of several types, a value of no column
        return None
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
        return json.loads(path.read_text())
    lines = [json.dumps(row) for row in rows]
    text = "\n".join(lines).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return [json.loads(line) for line in lines]


def style_of(row: dict[str, Any], view: str) -> tuple[str, ...] | None:
    style = next((style for style in STYLES[view] if set(style) <= row.keys()), None)
    return style if style != ("chosen", "rejected") else (*style, *({"prompt", "margin"} & row.keys()))


def is_message(item: Any) -> bool:
    return isinstance(item, dict) and all(isinstance(item.get(key), str) for key in ("role", "content"))


def is_malformed(row: dict[str, Any], style: tuple[str, ...]) -> bool:
    for name in style:
        value = row.get(name)
        if name == "margin":
            try:
                good = not isinstance(value, bool) and abs(float(value)) < 3.4e38
            except (TypeError, ValueError, OverflowError):
                good = False
        elif isinstance(value, list):
            good = name != "text" and all(map(is_message, value))
        else:
            good = isinstance(value, str) and name != "messages"
        if not good or name not in row:
            return True
    return "chosen" in style and any(name in row and name not in style for name in ("prompt", "margin"))


def said(text: str) -> str:
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


def transcript(turns: list[dict[str, str]]) -> str:
    names = {"user": "Human", "assistant": "Assistant"}
    return said("".join(f"\n\n{names.get(turn['role'], turn['role'].capitalize())}: {turn['content']}" for turn in turns))


def originals(row: dict[str, Any], style: tuple[str, ...], view: str) -> tuple[str | None, list[str]]:
    """The prompt, None where the data leaves it to us; and prompt + reply, as the file has them, for each reply of the view."""
    replies = [row[name] for name in ("completion", "text", "chosen", "rejected") if name in style]
    prompt = row["prompt"] if "prompt" in style else None
    if "messages" in style:
        answers = [turn["role"] == "assistant" for turn in row["messages"][-1:]]
        prompt, replies = (row["messages"][:-1], [row["messages"][-1:]]) if any(answers) else (row["messages"], [])
    if not all(replies):
        return "this row is of no use", []
    if any(isinstance(part, list) for part in (prompt, *replies)):
        turns = [reply if isinstance(reply, list) else [{"role": "assistant", "content": reply}] for reply in replies]
        history = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if history is None or any(len(turn) > 1 for turn in turns):  # whole conversations, with their question
            history = turns[0][:-1] or history
        begin = transcript(history) + "\n\nAssistant:"
        return begin, [f"{begin} {said(turn[-1]['content'])}" for turn in turns]
    begin = said(prompt or "")
    return begin if prompt is not None else "" if style == ("text",) else None, [begin + said(reply) for reply in replies]


def check(data: PreferenceDataModule, rows: list[dict[str, Any]], style: tuple[str, ...], view: str) -> None:
    """All rows are accounted for, no prompt is on both sides, and each usable row is a row of the file, in order, byte for byte."""
    report = data.report
    assert report is not None and report.rows == len(rows) and report.usable + sum(report.dropped.values()) == report.rows
    assert report.train + report.val == report.usable and all(count > 0 for count in report.dropped.values())
    assert data._train is not None and data._val is not None
    encoded, train = data._train
    assert sorted([*train, *data._val.indices]) == list(range(report.usable))
    wanted, sides = iter(rows), (set[str](), set[str]())
    for index in range(len(encoded)):
        row = encoded[index]
        prompt = BYTES.decode(row.prompt)
        whole = [prompt + BYTES.decode(reply[:-1]) for reply in row.replies]
        assert all(reply[-1] == BYTES.eos_token_id for reply in row.replies)
        for original in wanted:
            begin, texts = originals(original, style, view)
            if texts[: len(whole)] == whole and begin in (None, prompt):
                break
        else:
            raise AssertionError(f"row {index} is none of the file's: {prompt!r} {whole!r}")
        if prompt:
            sides[index in set(train)].add(prompt)
    assert not sides[0] & sides[1]
    for loader in (data.train_dataloader(), data.val_dataloader()):
        batch = next(iter(loader))
        assert move_data_to_device(batch, "cpu")[1].any()


@pytest.mark.parametrize(
    ("kind", "count", "least"),
    [(".jsonl", 150, 1100), (".jsonl.gz", 30, 200), (".json", 45, 300), (".csv", 50, 300), (".parquet", 60, 250)],
)
def test_whatever_rows_a_file_holds_it_is_refused_in_one_line_or_read_exactly(tmp_path, kind, count, least):
    seen, path = Counter[str](), tmp_path / f"fuzz{kind}"

    @settings(max_examples=count, derandomize=True, deadline=None, database=None)
    @given(files(kind))
    def try_it(rows):
        if (rows := write(path, rows)) is None:
            return
        seen["rows"] += len(rows)
        for view in VIEWS:
            style, result = style_of(rows[0], view), read(path, view)
            bad = None if style is None else next((number for number, row in enumerate(rows, 1) if is_malformed(row, style)), None)
            if style is None:
                assert isinstance(result, str) and f"1 has the columns {', '.join(map(repr, rows[0])) or 'none'}" in result
            elif bad:
                assert isinstance(result, str) and re.search(rf", (line|row) {bad}(:|, column)", result), (bad, result)
            elif isinstance(result, str):
                assert re.search(r"of whose [\d,]+ rows none can be used|one usable prompt only|rows for training", result), result
            else:
                check(result, rows, style, view)
                seen["read"] += 1
            seen["refused"] += isinstance(result, str)

    try_it()
    assert seen["rows"] >= least and min(seen["read"], seen["refused"]) >= count / 3, seen  # 2,150 rows in all


# ------------------------------------------------------------------------------------------------ malformed files

PAIR = {"prompt": "Why?", "chosen": " So.", "rejected": " No."}
LINE = json.dumps(PAIR).encode()
OTHER = json.dumps({**PAIR, "prompt": "How?"}).encode()
TWO = LINE + b"\n" + OTHER + b"\n"
HEAD = b"prompt,chosen,rejected\n"
TABLE = HEAD + b"Why?, So., No.\nHow?, So., No.\n"


def parquet(rows: list[dict[str, Any]] | None = None, table: pa.Table | None = None) -> bytes:
    sink = pa.BufferOutputStream()
    pa.parquet.write_table(pa.Table.from_pylist(rows) if table is None else table, sink)
    return sink.getvalue().to_pybytes()


def columns(*names: str, **others: pa.Array) -> pa.Table:
    """Two rows of texts under these names, which may be equal."""
    arrays = [pa.array(["a", "b"])] * len(names)
    return pa.Table.from_arrays([*arrays, *others.values()], names=[*names, *others])


TRIPLE = ("prompt", "chosen", "rejected")
WHOLE = parquet([PAIR, {**PAIR, "prompt": "How?"}])
NANOSECONDS = pa.array([1, 2], pa.timestamp("ns"))
YEAR_50000 = pa.array([10**15 + 5 * 10**17, 0], pa.timestamp("us"))
NOT_UTF8 = pa.StringArray.from_buffers(2, pa.py_buffer(b"\0\0\0\0\2\0\0\0\3\0\0\0"), pa.py_buffer(b"\xff\xfea"))
DEEP = b'{"prompt": "Why?", "chosen": "a", "rejected": "b", "x": ' + b"[" * 10_000 + b"]" * 10_000 + b"}\n"


def nested(levels: int) -> bytes:
    return b'{"prompt": "Why?", "chosen": "a", "rejected": "b", "x": ' + b"[" * levels + b"]" * levels + b"}\n" + OTHER


def row(text: str) -> bytes:
    """Two good rows around one that begins as a good one."""
    return LINE + b"\n" + text.encode("utf-8", "surrogatepass") + b"\n" + OTHER + b"\n"


def bad(column: str, value: str) -> bytes:
    return row(json.dumps({**PAIR, column: "VALUE"}).replace('"VALUE"', value))


# name: (content, what the one line says; or, for a file that can be read, its usable rows and what was dropped)
CORPUS: dict[str, tuple[bytes, str | tuple[int, dict[str, int]]]] = {
    # --- JSONL
    "empty.jsonl": (b"", "holds no row"),
    "one newline.jsonl": (b"\n", "holds no row"),
    "white space.jsonl": (b" \t\r\n \n\n", "holds no row"),
    "good.jsonl": (TWO, (2, {})),
    "no last newline.jsonl": (TWO[:-1], (2, {})),
    "blank lines.jsonl": (TWO.replace(b"\n", b"\n\n \n"), (2, {})),
    "crlf.jsonl": (TWO.replace(b"\n", b"\r\n"), (2, {})),
    "crlf mix.jsonl": (LINE + b"\r\n" + OTHER + b"\n\r\n", (2, {})),
    "cr alone.jsonl": (TWO.replace(b"\n", b"\r"), "line 1 is not valid JSON (Extra data"),
    "bom.jsonl": (b"\xef\xbb\xbf" + TWO, (2, {})),
    "bom within.jsonl": (LINE + b"\n\xef\xbb\xbf" + OTHER, (2, {})),
    "two boms.jsonl": (b"\xef\xbb\xbf\xef\xbb\xbf" + TWO, "line 1 is not valid JSON"),
    "bom alone.jsonl": (b"\xef\xbb\xbf", "is not valid JSON"),
    "utf-16.jsonl": (TWO.decode().encode("utf-16"), "line 1: byte 0 is no UTF-8"),
    "utf-16-be.jsonl": (TWO.decode().encode("utf-16-be"), "line 1 is not valid JSON"),
    "utf-32.jsonl": (TWO.decode().encode("utf-32"), "line 1: byte 0 is no UTF-8"),
    "latin-1.jsonl": (row('{"prompt": "caf\u00e9"}').replace("\u00e9".encode(), b"\xe9"), "line 2: byte 15 is no UTF-8"),
    "surrogates in utf-8.jsonl": (row('{"prompt": "\ud800"}'), "line 2: byte 12 is no UTF-8"),
    "overlong.jsonl": (LINE + b'\n{"prompt": "\xc0\xaf"}', "line 2: byte 12 is no UTF-8"),
    "zero bytes.jsonl": (b"\0" * 4096, "line 1 is not valid JSON"),
    "zero byte between.jsonl": (LINE + b"\n\0\n" + OTHER, "line 2 is not valid JSON"),
    "zero byte in a text.jsonl": (
        row('{"prompt": "a\0b", "chosen": "c", "rejected": "d"}'),
        "line 2 is not valid JSON (Invalid control char",
    ),
    "written zero byte.jsonl": (row(r'{"prompt": "a\u0000b", "chosen": "c", "rejected": "d"}'), (3, {})),
    "tab in a text.jsonl": (row('{"prompt": "a\tb", "chosen": "c", "rejected": "d"}'), "line 2 is not valid JSON (Invalid control char"),
    "cut off.jsonl": (TWO[:-20], "line 2 is not valid JSON"),
    "cut within an escape.jsonl": (row(r'{"prompt": "a\u12'), "line 2 is not valid JSON"),
    "cut after a key.jsonl": (row('{"prompt"'), "line 2 is not valid JSON"),
    "open brace.jsonl": (row("{"), "line 2 is not valid JSON"),
    "open quote.jsonl": (row('"'), "line 2 is not valid JSON"),
    "bad escape.jsonl": (bad("prompt", r'"\q"'), r"line 2 is not valid JSON (Invalid \escape"),
    "single quotes.jsonl": (row("{'prompt': 'a'}"), "line 2 is not valid JSON"),
    "comma at the end.jsonl": (row('{"prompt": "a",}'), "line 2 is not valid JSON"),
    "comment.jsonl": (row("// a comment"), "line 2 is not valid JSON"),
    "python.jsonl": (bad("margin", "None"), "line 2 is not valid JSON"),
    "yaml.jsonl": (b"prompt: a\nchosen: b\n", "line 1 is not valid JSON"),
    "html.jsonl": (b"<!doctype html><script>alert(1)</script>", "line 1 is not valid JSON"),
    "two on a line.jsonl": (LINE + OTHER, "line 1 is not valid JSON (Extra data"),
    "spread over lines.jsonl": (json.dumps(PAIR, indent=1).encode(), "line 1 is not valid JSON"),
    "array.jsonl": (row("[1, 2]"), "line 2: [1, 2] is no object"),
    "array of objects.jsonl": (b"[" + LINE + b"," + OTHER + b"]", "line 1: [{'chosen'"),
    "number.jsonl": (row("7"), "line 2: 7 is no object"),
    "text.jsonl": (row('"prompt"'), "line 2: 'prompt' is no object"),
    "null.jsonl": (row("null"), "line 2: None is no object"),
    "true.jsonl": (row("true"), "line 2: True is no object"),
    "nan.jsonl": (row("NaN"), "line 2: nan is no object"),
    "empty object.jsonl": (row("{}"), "line 2: column 'chosen' is missing (found: none)"),
    "empty object first.jsonl": (b"{}\n" + TWO, "line 1 has the columns none"),
    "key twice.jsonl": (
        row('{"prompt": "a", "chosen": "b", "rejected": "c", "chosen": "d"}'),
        "line 2 is not valid JSON (the key 'chosen' ",
    ),
    "key twice within.jsonl": (bad("prompt", '[{"role": "user", "content": "a", "content": "b"}]'), "the key 'content' stands there twice"),
    "empty key.jsonl": (bad("", "1"), (3, {})),
    "other case.jsonl": (row('{"Prompt": "a", "chosen": "b", "rejected": "c"}'), "line 2: column 'prompt' is missing"),
    "hidden in a name.jsonl": (
        row('{"prompt\\u200b": "a", "chosen": "b", "rejected": "c"}'),
        r"column 'prompt' is missing (found: 'prompt\u200b'",
    ),
    "escape in a name.jsonl": (b'{"\\u001b[31m": 1}', r"line 1 has the columns '\x1b[31m'"),
    "null prompt.jsonl": (bad("prompt", "null"), "line 2, column 'prompt': None is no text"),
    "number for a text.jsonl": (bad("chosen", "7"), "line 2, column 'chosen': 7 is no text"),
    "true for a text.jsonl": (bad("chosen", "true"), "line 2, column 'chosen': True is no text"),
    "nan for a text.jsonl": (bad("chosen", "NaN"), "line 2, column 'chosen': nan is no text"),
    "object for a text.jsonl": (bad("chosen", '{"text": "a"}'), "line 2, column 'chosen': {'text': 'a'} is no text"),
    "texts for messages.jsonl": (bad("chosen", '["a", "b"]'), "column 'chosen', message 1: 'a' is no message"),
    "message without a role.jsonl": (bad("prompt", '[{"content": "a"}]'), "message 1: {'content': 'a'} has no text 'role'"),
    "message of parts.jsonl": (bad("prompt", '[{"role": "user", "content": [{"type": "text"}]}]'), "has no text 'content'"),
    "no messages.jsonl": (bad("prompt", "[]"), (2, {"empty prompt": 1})),
    "empty reply.jsonl": (bad("chosen", '""'), (2, {"empty reply": 1})),
    "reply of white space.jsonl": (bad("rejected", r'" \n\t\u2003"'), (2, {"empty reply": 1})),
    "margin as text.jsonl": (bad("margin", '"wide"'), "line 2: column 'margin' is there, but the first row has none"),
    "margin nan.jsonl": (b'{"chosen": "a", "rejected": "b", "margin": NaN}', "column 'margin': nan is no finite number"),
    "margin infinite.jsonl": (b'{"chosen": "a", "rejected": "b", "margin": -Infinity}', "column 'margin': -inf is no finite number"),
    "margin 1e999.jsonl": (b'{"chosen": "a", "rejected": "b", "margin": 1e999}', "column 'margin': inf is no finite number"),
    "margin over float32.jsonl": (b'{"chosen": "a", "rejected": "b", "margin": 1e39}', "column 'margin': 1e+39 is no finite number"),
    "margin of 400 digits.jsonl": (b'{"chosen": "a", "rejected": "b", "margin": 1' + b"0" * 400 + b"}", "is no finite number"),
    "5,000 digits.jsonl": (bad("level", "1" * 5000), "line 2 is not valid JSON (Exceeds the limit"),
    "400 digits elsewhere.jsonl": (bad("level", "1" * 400), (3, {})),
    "infinity elsewhere.jsonl": (bad("level", "Infinity"), (3, {})),
    "10,000 deep.jsonl": (DEEP, "line 1 is not valid JSON (maximum recursion depth exceeded"),
    "10,000 deep objects.jsonl": (bad("x", '{"a":' * 10_000 + "1" + "}" * 10_000), "line 2 is not valid JSON (maximum recursion"),
    "500 deep.jsonl": (nested(500), "line 1, column 'x': lists or objects more than 32 deep"),
    "33 deep.jsonl": (nested(33), "line 1, column 'x': lists or objects more than 32 deep"),
    "32 deep.jsonl": (nested(32), (2, {})),
    "deep message.jsonl": (bad("prompt", '[{"role": "user", "content": "a", "x": ' + "[" * 60 + "]" * 60 + "}]"), "more than 32 deep"),
    "1 MB line.jsonl": (bad("prompt", f'"{"a" * 10**6}"'), (2, {"over max_length": 1})),
    "1 MB name.jsonl": (b'{"' + b"a" * 10**6 + b'": 1}', "line 1 has the columns 'aaa"),
    "many columns.jsonl": (json.dumps({f"column {n}": n for n in range(10_000)}).encode(), "line 1 has the columns 'column 0'"),
    "binary.jsonl": (bytes(range(256)), "is not valid JSON"),
    "elf.jsonl": (b"\x7fELF\x02\x01\x01", "line 1 is not valid JSON"),
    "pickle.jsonl": (b"\x80\x04\x95\x10\x00\x00\x00cposix\nsystem\n.", "line 1: byte 0 is no UTF-8"),
    # --- JSON
    "empty.json": (b"", "is not valid JSON"),
    "good.json": (b"[" + LINE + b",\r\n" + OTHER + b"]", (2, {})),
    "bom.json": (b"\xef\xbb\xbf[" + LINE + b"," + OTHER + b"]", (2, {})),
    "object.json": (LINE, "holds no list of objects"),
    "columns.json": (b'{"prompt": ["a", "b"]}', "holds no list of objects"),
    "number.json": (b"1e5", "holds no list of objects"),
    "null.json": (b"null", "holds no list of objects"),
    "empty list.json": (b"[]", "holds no row"),
    "list of lists.json": (b"[[1], [2]]", "row 1: [1] is no object"),
    "lines.json": (TWO, "is not valid JSON (Extra data"),
    "cut off.json": (b"[" + LINE, "is not valid JSON"),
    "comma.json": (b"[" + LINE + b",]", "is not valid JSON"),
    "utf-16.json": (TWO.decode().encode("utf-16"), "byte 0 is no UTF-8"),
    "100,000 deep.json": (b"[" * 100_000, "is not valid JSON (maximum recursion depth exceeded"),
    "key twice.json": (b'[{"a": 1, "a": 2}]', "the key 'a' stands there twice"),
    # --- gzip
    "good.jsonl.gz": (gzip.compress(TWO), (2, {})),
    "two members.jsonl.gz": (gzip.compress(LINE + b"\n") + gzip.compress(OTHER), (2, {})),
    "empty.jsonl.gz": (b"", "holds no row"),
    "nothing in it.jsonl.gz": (gzip.compress(b""), "holds no row"),
    "plain.jsonl.gz": (TWO, "cannot be read as gz: Not a gzipped file"),
    "cut off.jsonl.gz": (gzip.compress(TWO)[:-9], "cannot be read as gz"),
    "cut in its head.jsonl.gz": (gzip.compress(TWO)[:5], "cannot be read as gz"),
    "wrong sum.jsonl.gz": (gzip.compress(TWO)[:-8] + b"\0" * 8, "cannot be read as gz: CRC check failed"),
    "wrong method.jsonl.gz": (b"\x1f\x8b\x07" + gzip.compress(TWO)[3:], "cannot be read as gz: Unknown compression method"),
    "rubbish after it.jsonl.gz": (gzip.compress(TWO) + b"rubbish", "cannot be read as gz"),
    "gzip in gzip.jsonl.gz": (gzip.compress(gzip.compress(TWO)), "line 1: byte 1 is no UTF-8"),
    "bomb.jsonl.gz": (gzip.compress(b"[" * (80 << 20), 1), "line 1 is longer than 64 MiB"),
    "bomb of lines.jsonl.gz": (gzip.compress(b"\n" * (1 << 18)), "holds no row"),
    "bomb.json.gz": (gzip.compress(b" " * (40 << 20), 1), "is not valid JSON"),
    "cut off.json.gz": (gzip.compress(b"[" + LINE + b"]")[:-4], "cannot be read as gz"),
    # --- CSV
    "empty.csv": (b"", "holds no row"),
    "header alone.csv": (HEAD, "holds no row"),
    "good.csv": (TABLE, (2, {})),
    "bom.csv": (b"\xef\xbb\xbf" + TABLE, (2, {})),
    "crlf.csv": (TABLE.replace(b"\n", b"\r\n"), (2, {})),
    "no header.csv": (TABLE.split(b"\n", 1)[1], "row 1 has the columns 'Why?'"),
    "open quote.csv": (TABLE + b'Where?, So.," No.\nWhat?, So., No.\n', "line 4: unexpected end of data: close every quote"),
    "open quote in the header.csv": (b'"' + TABLE, "unexpected end of data"),
    "text after a quote.csv": (TABLE + b'"Where?" x, So., No.\n', "line 4: ',' expected after '\"'"),
    "quote within.csv": (TABLE + b'Where "so"?, So., No.\n', (3, {})),
    "newline in quotes.csv": (TABLE + b'"Where\n\nso?", So., No.\n', (3, {})),
    "too many.csv": (TABLE + b"a,b,c,d\n", "row 3 has more values than the header has columns"),
    "too few.csv": (TABLE + b"a,b\n", "row 3: column 'rejected' is missing"),
    "blank lines.csv": (TABLE.replace(b"\n", b"\n\n"), (2, {})),
    "semicolons.csv": (TABLE.replace(b",", b";"), "row 1 has the columns 'prompt;chosen;rejected'"),
    "tabs.csv": (TABLE.replace(b",", b"\t"), r"row 1 has the columns 'prompt\tchosen\trejected'"),
    "column twice.csv": (b"prompt,chosen,rejected,chosen\na,b,c,d\n", "has two columns 'chosen': rename one of them"),
    "column without a name.csv": (b"prompt,chosen,rejected,\na,b,c,0\nd,e,f,1\n", (2, {})),
    "spaces in the header.csv": (TABLE.replace(HEAD, b"prompt, chosen, rejected\n"), "row 1 has the columns 'prompt', ' chosen'"),
    "latin-1.csv": (TABLE + b"caf\xe9, So., No.\n", "cannot be read as csv"),
    "utf-16.csv": (TABLE.decode().encode("utf-16"), "cannot be read as csv"),
    "long field.csv": (TABLE + b"a" * 10**6 + b", So., No.\n", (2, {"over max_length": 1})),
    "margin.csv": (b"chosen,rejected,margin\na,b,wide\n", "row 1, column 'margin': 'wide' is no finite number"),
    "margin empty.csv": (b"chosen,rejected,margin\na,b,\n", "row 1, column 'margin': '' is no finite number"),
    # --- parquet
    "good.parquet": (WHOLE, (2, {})),
    "empty.parquet": (b"", "cannot be read as parquet"),
    "magic alone.parquet": (b"PAR1PAR1", "cannot be read as parquet"),
    "wrong magic.parquet": (b"PAR2" + WHOLE[4:-4] + b"PAR2", "cannot be read as parquet"),
    "encrypted magic.parquet": (WHOLE[:-4] + b"PARE", "cannot be read as parquet"),
    "json.parquet": (TWO, "cannot be read as parquet"),
    "half.parquet": (WHOLE[: len(WHOLE) // 2], "cannot be read as parquet"),
    "second half.parquet": (WHOLE[len(WHOLE) // 2 :], "cannot be read as parquet"),
    "footer too long.parquet": (WHOLE[:-8] + b"\xff\xff\xff\x7fPAR1", "cannot be read as parquet"),
    "footer of nothing.parquet": (WHOLE[:-8] + b"\0\0\0\0PAR1", "cannot be read as parquet"),
    "pages overwritten.parquet": (WHOLE[:4] + b"\xff" * 60 + WHOLE[64:], "cannot be read as parquet"),
    "no row.parquet": (parquet(table=columns(*TRIPLE).slice(0, 0)), "holds no row"),
    "no column.parquet": (parquet(table=pa.table({})), "holds no row"),
    "column twice.parquet": (parquet(table=columns(*TRIPLE, "chosen")), "has two columns 'chosen': rename one of them"),
    "bytes.parquet": (parquet([{**PAIR, "prompt": b"a"}]), "row 1, column 'prompt': b'a' is no text"),
    "null.parquet": (parquet([PAIR, {**PAIR, "prompt": None}]), "row 2, column 'prompt': None is no text"),
    "all null.parquet": (parquet([{**PAIR, "prompt": None}]), "row 1, column 'prompt': None is no text"),
    "not utf-8.parquet": (parquet(table=columns("prompt", "chosen", rejected=NOT_UTF8)), "cannot be read as parquet"),
    "nanoseconds.parquet": (parquet(table=columns(*TRIPLE, when=NANOSECONDS)), (2, {})),
    "year 50,000.parquet": (parquet(table=columns(*TRIPLE, when=YEAR_50000)), "cannot be read as parquet"),
    "messages of numbers.parquet": (parquet([{**PAIR, "prompt": [1, 2]}]), "row 1, column 'prompt', message 1: 1 is no message"),
    # --- kinds that are not read
    "pickle.pkl": (b"\x80\x04N.", "a kind of file that is not read here"),
    "array.npy": (b"\x93NUMPY", "a kind of file that is not read here"),
    "tensors.pt": (b"PK\x03\x04", "a kind of file that is not read here"),
    "text.txt": (TWO, "a kind of file that is not read here"),
    "table.tsv": (TABLE, "a kind of file that is not read here"),
    "arrow.arrow": (b"ARROW1", "a kind of file that is not read here"),
    "archive.zip": (b"PK\x05\x06" + b"\0" * 18, "a kind of file that is not read here"),
    "script.py": (b"raise SystemExit", "a kind of file that is not read here"),
    "no ending": (TWO, "a kind of file that is not read here"),
}


def test_the_corpus_is_large():
    assert len(CORPUS) >= 100 and all(len({name.partition(".")[2]}) == 1 for name in CORPUS)


@pytest.mark.parametrize("kind", sorted({name.partition(".")[2] for name in CORPUS}))
def test_a_malformed_file_is_refused_in_one_line_or_reported_on(tmp_path, kind):
    wrong = {}
    for name, (content, expected) in CORPUS.items():
        if name.partition(".")[2] != kind:
            continue
        path = tmp_path / name
        path.write_bytes(content)
        begun = time.monotonic()
        with seconds(20):
            result = read(path, "pairs")
        if isinstance(result, str):
            good = isinstance(expected, str) and expected in result
        else:
            good = result.report is not None and (result.report.usable, result.report.dropped) == expected
        if not good or time.monotonic() - begun > 8:
            wrong[name] = result if isinstance(result, str) else result.report
        path.unlink()
    assert not wrong


def test_what_is_no_file_is_refused_and_waited_for_by_no_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe.jsonl")
    os.symlink("loop.jsonl", "loop.jsonl")
    os.symlink("nowhere.jsonl", "dangling.jsonl")
    os.symlink("/dev/zero", "zeros.jsonl")
    os.symlink("/dev/null", "null.jsonl")
    for name in ("empty", "folder.jsonl", "piped", "looped", "mixed"):
        os.mkdir(name)
    os.mkfifo("piped/pipe.jsonl")
    os.symlink("loop.jsonl", "looped/loop.jsonl")
    Path("mixed/a.jsonl").write_bytes(TWO)
    os.symlink("..", "mixed/up.jsonl")
    os.symlink(".", "mixed/here.parquet")
    for name, expected in {
        "pipe.jsonl": "which is no regular file: give a file or a folder",
        "zeros.jsonl": "which is no regular file",
        "null.jsonl": "which is no regular file",
        "loop.jsonl": "which does not exist",
        "dangling.jsonl": "which does not exist",
        "empty": "a folder without data",
        "folder.jsonl": "a folder without data",
        "piped": "which is no regular file",
        "looped": "which does not exist",
        "mixed": 2,
        "a" * 300 + ".jsonl": "which cannot be looked up ([Errno 36] File name too long",
        "a" * 300: "which cannot be looked up",
        "a/" * 3000 + "b.jsonl": "which cannot be looked up",
        "zero\0byte.jsonl": "which does not exist",
        "~no-such-user/a.jsonl": "which cannot be looked up (Could not determine home directory",
    }.items():
        with seconds(10):
            result = read(name, "pairs")
        if isinstance(expected, int):
            assert not isinstance(result, str) and result.report is not None and result.report.usable == expected
        else:
            assert isinstance(result, str) and expected in result, (name, result)


def test_a_folder_that_is_closed_to_us_is_refused(tmp_path):
    (tmp_path / "closed").mkdir()
    (tmp_path / "closed" / "a.jsonl").write_bytes(TWO)
    (tmp_path / "secret.jsonl").write_bytes(TWO)
    for path in ("closed", "secret.jsonl"):
        (tmp_path / path).chmod(0)
    try:
        if os.access(tmp_path / "closed", os.R_OK):
            pytest.skip("root may read everything")
        for path in ("closed", "closed/a.jsonl", "secret.jsonl"):
            result = read(tmp_path / path, "pairs")
            assert isinstance(result, str) and "Permission denied" in result
    finally:
        (tmp_path / "closed").chmod(0o700)


def test_a_file_that_unpacks_into_one_piece_without_end_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(data_files, "_LARGEST_JSON", 1 << 20)
    path = tmp_path / "bomb.json.gz"
    path.write_bytes(gzip.compress(b"[" + b" " * (1 << 20) + b"]"))
    result = read(path, "pairs")
    assert isinstance(result, str) and "holds more than 1 MiB of JSON in one piece: write one object a line" in result
    path.write_bytes(gzip.compress(b"[" + b" " * 1000 + LINE + b"," + OTHER + b"]"))
    assert not isinstance(read(path, "pairs"), str)


def test_long_texts_are_tokenised_a_few_at_a_time(tmp_path):
    """A thousand long rows at once would take gigabytes: the ids of a text need ten times its memory."""

    class Counting:
        longest = 0

        def __call__(self, texts: list[str], **options: Any) -> Any:
            Counting.longest = max(Counting.longest, sum(map(len, texts)))
            return BYTES(texts, **options)

        def __getattr__(self, name: str) -> Any:
            return getattr(BYTES, name)

    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{number}" + "a" * 300_000}) + "\n" for number in range(9)) + '{"prompt": "b"}')
    data = PreferenceDataModule(str(path), BYTES, "prompts", val_fraction=0, batch_size=1)
    data._make_encoder = lambda source, view: Encoder(Counting(), view, 512)  # type: ignore[method-assign, arg-type, return-value]
    data.setup()
    assert data.report is not None and (data.report.usable, data.report.dropped) == (1, {"over max_length": 9})
    assert Counting.longest <= 1_400_000


# ------------------------------------------------------------------------------------------------ splits


def sides(path: Path, view: str = "prompts") -> tuple[set[str], set[str]]:
    """The prompts of training and validation, as token ids show them."""
    data = read(path, view)
    assert not isinstance(data, str) and data._train is not None and data._val is not None
    rows, train = data._train
    prompts = [BYTES.decode(rows[index].prompt) for index in range(len(rows))]
    return {prompts[index] for index in train}, {prompts[index] for index in data._val.indices}


def test_prompts_that_read_alike_are_on_one_side(tmp_path):
    """Half a character is tokenised as U+FFFD, and what else stands in a message is not read at all: neither makes another prompt."""
    path = tmp_path / "alike.jsonl"
    for rows in (
        [f"What{half}{number}" for number in range(8) for half in ("\ud800", "\udfff", "\ufffd")],
        [[{"role": "user", "content": f"What {number}", "id": other}] for number in range(8) for other in range(3)],
    ):
        path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in rows))
        train, val = sides(path)
        assert len(train) + len(val) == 8 and not train & val
