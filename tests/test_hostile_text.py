"""Strange text survives training and prediction, and acts nowhere: not on the dashboard, not on a terminal, not in a file of JSON lines."""

import json
import re
import time
import unicodedata
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugin_util import markdown_to_safe_html

from p3o_lightning import PreferenceDataModule
from p3o_lightning.data_formats import Row, split_texts
from p3o_lightning.encoding import _as_chat
from p3o_lightning.text import escaped, fenced, json_line, visible

STRANGE = {
    "control characters": "\x00\x01\x07\x08\x0b\x0c\x0e\x1a\x7f\x80\x9f",
    "a terminal escape": "\x1b[2J\x1b[31mred\x1b[0m\x1b]0;title\x07\x9b31m",
    "HTML": "<script>alert(1)</script><img src=x onerror=alert(1)><!-- &lt; &#60; -->",
    "Markdown": "``` ` *a* _b_ [c](javascript:alert(1)) ![d](http://e/f) | g |\n---\n# h\n```",
    "right to left": "שלום עולם مرحبا",
    "an override": "\u202eevil\u202c \u2066isolated\u2069 \u200f",
    "half a character": "\ud800 \udfff \udc00\ud800",
    "zero width": "a\u200bb\u200cc\u200dd\ufeffe",
    "a family": "👩‍👩‍👧‍👦 🏳️‍🌈 👋🏽",
    "combining marks": "Z" + "\u0351" * 30,
    "line ends": "a\r\nb\rc\x85d\u2028e\u2029f",
    "no character": "\ufffe\uffff\U0010ffff",
    "special tokens": "<eos><pad><bos></s><|endoftext|><|im_end|>[INST]",
    "a template": "{{ 7 * 7 }} {% raw %} ${HOME} %s {0} \\N{BULLET}",
    "a path": "../../etc/passwd\x00.txt",
    "spaces": "\u00a0\u2003\u3000 a \t ",
}
MEGABYTE = "a🙂" * 200_000  # 1 MB in UTF-8


@pytest.fixture
def strange(tmp_path):
    """Preferences of strange prompts with strange replies; and one each of a megabyte."""
    rows = [{"prompt": f"{text}?", "chosen": f" {text}.", "rejected": f" {name}."} for name, text in STRANGE.items()]
    rows += [{"prompt": f"{text} again?", "chosen": " Yes.", "rejected": f" {text}", "why": text, text: 1} for text in STRANGE.values()]
    rows += [{"prompt": MEGABYTE, "chosen": " a", "rejected": " b"}, {"prompt": "Long?", "chosen": MEGABYTE, "rejected": " b"}]
    path = tmp_path / "strange.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("stage", ["sft", "reward", "policy"])
def test_strange_text_is_trained_on(p3o, strange, stage):
    ended = p3o(
        *("fit", "--config", f"configs/debug/{stage}.yaml", "--trainer.default_root_dir", "run", "--trainer.max_steps", "2"),
        *("--data.path", strange, "--data.val_fraction", "0.2"),
    )
    dropped = "over max_length 1" if stage == "policy" else "over max_length 2"
    assert ended.code == 0 and dropped in ended.err, ended
    if stage != "reward":
        ended = p3o(
            *("predict", "--config", f"configs/debug/{stage}.yaml", "--trainer.default_root_dir", "run"),
            *("--data.path", strange, "--ckpt_path", "last", "--model.max_completion_length", "3"),
        )
        assert ended.code == 0, ended
        content = (p3o.folder / "run/predictions.jsonl").read_bytes().decode()
        rows = [json.loads(line) for line in content.splitlines()]  # which takes more than \n for the end of a line
        prompts = {row["prompt"] for row in rows}
        assert {f"{text}?" for text in STRANGE.values()} <= prompts and len(rows) == 2 * len(STRANGE) + 1
        assert not any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in content.replace("\n", ""))


def test_a_megabyte_is_read_and_tokenised_in_seconds(tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"prompt": MEGABYTE, "chosen": " a", "rejected": " b"}) + "\n")
    begun = time.process_time()
    data = PreferenceDataModule(str(path), "bytes", "pairs", batch_size=1, val_fraction=0, max_length=10**7, chat=True)
    data.setup()
    assert next(iter(data.train_dataloader())).tokens.shape[-1] > 10**6
    assert time.process_time() - begun < 20  # about 2


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ("a" * 10**6, "a" * 10**6 + "b"),
        (" " * 10**6 + "a", " " * 10**6 + "b"),
        ("a " * 500_000 + "c", "a " * 500_000 + "d"),
        ("\n\nAssistant:" * 80_000 + " a", "\n\nAssistant:" * 80_000 + " b"),
        ("\n\nHuman: a\n\nAssistant: b" * 40_000, "\n\nHuman: a\n\nAssistant: b" * 39_999 + "\n\nHuman: a\n\nAssistant: c"),
        ("\n" * 10**6 + "Human:", "\n" * 10**6 + "Assistant:"),
    ],
    ids=range(6),
)
def test_no_megabyte_takes_long_to_cut(chosen, rejected):
    begun = time.process_time()
    prompt, *replies = split_texts(chosen, rejected)
    assert [prompt + reply for reply in replies] == [chosen, rejected]
    _as_chat(Row(prompt, tuple(replies), None, {}))
    assert time.process_time() - begun < 5  # under 1


# ------------------------------------------------------------------------------------------------ the dashboard


class Tags(HTMLParser):
    """The elements of a page, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.text += "\n" if tag == "br" else ""

    def handle_data(self, data: str) -> None:
        self.text += data


every_text = st.text(st.characters() | st.sampled_from("`|<>&*_[]()#\\\n\r~-+!:=^\x02\x03\x1b\u202e\ud800 "), max_size=40)


def assert_a_cell_shows(text: str) -> None:
    page = Tags(markdown_to_safe_html(f"| a | b |\n|---|---|\n| {escaped(text)} | end |\n"))
    assert [name for name in page.elements if name != "br"] == ["table", "thead", "tr", "th", "th", "tbody", "tr", "td", "td"]
    assert page.elements.count("br") == len(re.split("\r\n|\r|\n", text)) - 1
    wanted = "\n".join(map(visible, re.split("\r\n|\r|\n", text)))
    assert " ".join(page.text.split()) == " ".join(f"a b {wanted} end".split())


@given(every_text)
@example("a\\|b | c\n|d|")
@example("\x02wzxhzdk:0\x03 [r]: http://evil")
def test_a_cell_of_a_table_shows_its_text_and_nothing_else(text):
    assert_a_cell_shows(text)


@pytest.mark.parametrize("text", STRANGE.values(), ids=STRANGE)
def test_a_strange_text_in_a_cell(text):
    assert_a_cell_shows(text)


@given(every_text)
@example("```\n<script>")
@example("k: |\n  ````\n  ```` \n~~~\n")
@example("a\r```\r<b>")
def test_nothing_ends_a_fence(text):
    page = Tags(markdown_to_safe_html(fenced(text, "yaml")))
    assert page.elements == ["pre", "code"]
    assert page.text.strip("\n") == "\n".join(map(visible, re.split("\r\n|\r|\n", text))).strip("\n")


def test_a_config_stays_in_its_block_on_the_dashboard(p3o):
    name = "```\n\n<img src=x onerror=alert(1)>\n# head [link](http:x) \x1b[31m \u202e.jsonl"
    rows = "".join(json.dumps({"prompt": f"Why {number}?", "chosen": " So.", "rejected": " No."}) + "\n" for number in range(40))
    (p3o.folder / name).write_text(rows)
    ended = p3o(
        "fit", "--config", "configs/debug/reward.yaml", "--trainer.default_root_dir", "run", "--trainer.max_steps=1", "--data.path", name
    )
    assert ended.code == 0, ended
    events = EventAccumulator(str(p3o.folder / "run/logs/version_0"))
    events.Reload()
    (event,) = events.Tensors("config/text_summary")
    text = event.tensor_proto.string_val[0].decode()
    assert text == fenced((p3o.folder / "run/config.yaml").read_text(), "yaml") and text.startswith("````yaml")
    page = Tags(markdown_to_safe_html(text))
    assert page.elements == ["pre", "code"]
    assert "onerror=alert(1)" in page.text and "trainer:" in page.text.split("onerror")[1]  # the whole config, after it too
    assert p3o("fit", "--config", "run/config.yaml", "--trainer.max_steps=1").code == 0  # which is what was given


# ------------------------------------------------------------------------------------------------ the terminal


def test_what_is_visible_acts_on_no_terminal():
    for text in STRANGE.values():
        shown = visible(text)
        assert not any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") or unicodedata.bidirectional(c) in BIDI for c in shown)
        shown.encode()
    assert visible("\x1b[31m\x9b\x7f\u202e\ud800\t") == r"\x1b[31m\x9b\x7f\u202e\ud800\x09"
    for text in (STRANGE["right to left"], STRANGE["a family"], STRANGE["combining marks"], "Grüße, 世界"):
        assert visible(text) == text


BIDI = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")


@pytest.mark.parametrize(
    ("name", "content", "flags"),
    [
        ("d\x1b[31m\x9b2J\u202e.jsonl", "{", []),
        ("data.jsonl", '{"prompt": "\x1b[2J\u202e\x9b"', []),
        ("data.jsonl", '{"\\u001b[2J\\u202e": "\\u009b"}', []),
        ("data.jsonl", '{"chosen": "a", "rejected": {"\\u001b[2J": "\\u202e"}}', []),
        ("data.csv", "chosen,rejected,\x1b[2J,\x1b[2J\n", []),
        ("data.jsonl", "", ["--data.\x1b[2J", "x"]),
        ("data.jsonl", "", ["--model.model", "\x1b[2J\u202e\x9b"]),
        ("data.jsonl", "", ["--model.tokenizer", "./\x1b[2J\u202e\x9b"]),
        ("data.jsonl", "", ["--model.lr", "\x1b[2J\u202e"]),
        ("data.jsonl", "", ["--trainer.accelerator", "\x1b[2J\u202e"]),
        ("data.jsonl", "", ["--config", "\x1b[2J\u202e\x9b"]),
        ("data.jsonl", "", ["--ckpt_path", "\x1b[2J\u202e\x9b"]),
        ("data.jsonl", "", ["--\x1b[2J\u202e"]),
        ("data.jsonl", "", ["\x1b[2J\u202e"]),
    ],
)
def test_an_error_that_quotes_a_stranger_acts_on_no_terminal(p3o, name, content, flags):
    (p3o.folder / name).write_text(content)
    ended = p3o("fit", "--config", "configs/debug/reward.yaml", "--trainer.default_root_dir", "run", "--data.path", name, *flags)
    assert r"\x1b[" in ended.error
    assert not any(
        unicodedata.category(c) == "Cc" or unicodedata.bidirectional(c) in BIDI for c in (ended.out + ended.err).replace("\n", "")
    )


def test_an_unknown_command_acts_on_no_terminal(p3o):
    assert p3o("\x1b[2J\u202e").error.startswith(r"'\x1b[2J\u202e' is no command")


# ------------------------------------------------------------------------------------------------ JSON lines


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | every_text, st.lists, max_leaves=5
    )
)
def test_a_json_line_is_one_line_and_reads_back(value):
    line = json_line({"prompt": value})
    line.encode()
    assert len(line.splitlines()) == 1 and json.loads(line) == {"prompt": json.loads(json.dumps(value))}


def test_what_json_lacks_is_written_all_the_same():
    assert (
        json_line({"a": [float("nan"), float("inf"), -1.5], "b": Path("c"), "d": {1}}) == '{"a": [null, null, -1.5], "b": "c", "d": "{1}"}'
    )
