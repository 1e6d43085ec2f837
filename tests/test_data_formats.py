"""The same rows in every format give the same result; prompts are cut where they should be; bad files stop with one helpful line."""

import csv
import gzip
import json
import sys
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from p3o_lightning.data_files import read_records
from p3o_lightning.data_formats import Row, Unusable, normalise, split_messages, split_texts
from p3o_lightning.errors import InputError

datasets.disable_progress_bars()

PAIRS = [
    {"prompt": "What is the sky?", "chosen": " It is blue.", "rejected": " It is, “green”,\n\nI think."},
    {"prompt": "Count to three", "chosen": " 1 2 3", "rejected": " no\x00thing"},
    {"prompt": "Grüße, 世界 😀", "chosen": " hi", "rejected": " go away"},
]
USER, ANSWER = {"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def rows_of(path: Path | str, view: str = "pairs", columns: dict[str, str] | None = None, **options) -> list[Row | Unusable]:
    return list(normalise(read_records(str(path), **options), view, columns))


def write(folder: Path, kind: str, rows: list[dict]) -> Path:
    path = folder / f"prefs{kind}"
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if kind == ".json":
        path.write_text(json.dumps(rows, indent=1))
    elif kind == ".json.gz":
        path.write_bytes(gzip.compress(json.dumps(rows, ensure_ascii=False).encode()))
    elif kind == ".jsonl":
        path.write_text("\ufeff" + lines + "\n", encoding="utf-8")
    elif kind == ".jsonl.gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif kind == ".parquet":
        pa.parquet.write_table(pa.Table.from_pylist(rows), path)
    elif kind == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif kind == ".dataset":
        datasets.Dataset.from_list(rows).save_to_disk(path)
    elif kind == ".splits":
        datasets.DatasetDict({"train": datasets.Dataset.from_list(rows), "test": datasets.Dataset.from_list(rows[:1])}).save_to_disk(path)
    elif kind == ".folder":
        path.mkdir()
        write(path, ".jsonl", rows[:1])
        (path / "quite.json").write_text(json.dumps(rows[1:]))
        (path / "README.md").write_text("not data")
    return path


KINDS = [".json", ".json.gz", ".jsonl", ".jsonl.gz", ".parquet", ".csv", ".dataset", ".splits", ".folder"]


# ---- formats ----


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_gives_the_same_rows(tmp_path, kind):
    pairs = PAIRS
    if kind == ".csv" and sys.version_info < (3, 11):  # whose csv module takes no NUL
        pairs = [row for row in PAIRS if "\0" not in "".join(row.values())]
        assert len(pairs) == len(PAIRS) - 1
    expected = [Row(row["prompt"], (row["chosen"], row["rejected"]), None, {}) for row in pairs]
    assert rows_of(write(tmp_path, kind, pairs)) == expected


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != ".csv"])
def test_every_format_holds_conversations_and_margins(tmp_path, kind):
    other = message("assistant", "Go.") | {"name": "x"}
    rows = [
        {"chosen": [USER, ANSWER], "rejected": [USER, other], "margin": 1.5, "level": 3},
        {"chosen": [USER, ANSWER, USER, ANSWER], "rejected": [USER, ANSWER, USER, other], "margin": 2, "level": None},
    ]
    assert rows_of(write(tmp_path, kind, rows)) == [
        Row([USER], ([ANSWER], [other]), 1.5, {"level": 3}),
        Row([USER, ANSWER, USER], ([ANSWER], [other]), 2.0, {"level": None}),
    ]


def test_a_margin_in_csv_is_a_number(tmp_path):
    path = write(tmp_path, ".csv", [{"prompt": "a", "chosen": "b", "rejected": "c", "margin": "0.5"}])
    assert rows_of(path) == [Row("a", ("b", "c"), 0.5, {})]


def test_splits_are_named(tmp_path):
    path = write(tmp_path, ".splits", PAIRS)
    assert len(rows_of(path, split="test")) == 1
    with pytest.raises(InputError, match=r"data\.split is 'dev', but data\.path '.*' has the splits train, test: name one"):
        rows_of(path, split="dev")


def test_several_ranks_share_the_records(tmp_path):
    path = write(tmp_path, ".jsonl", PAIRS)
    shares = [[record.where[-6:] for record in read_records(str(path), rank=rank, world_size=2)] for rank in range(2)]
    assert shares == [["line 1", "line 3"], ["line 2"]]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_dataset_is_read_whole_or_shared_by_the_ranks_of_a_stream(monkeypatch, streaming):
    def load_dataset(name, split, streaming):
        assert (name, split) == ("owner/prefs", "train")
        whole = datasets.Dataset.from_list(PAIRS)
        return whole.to_iterable_dataset() if streaming else whole

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(rows_of("owner/prefs", streaming=streaming)) == 3
    shares = [[row.prompt for row in rows_of("owner/prefs", streaming=True, rank=rank, world_size=2)] for rank in range(2)]
    assert sorted(map(len, shares)) == [1, 2] and sorted([*shares[0], *shares[1]]) == sorted(row["prompt"] for row in PAIRS)


# ---- column styles ----


@pytest.mark.parametrize(
    ("view", "row", "expected"),
    [
        ("demonstrations", {"prompt": "a", "completion": " b"}, Row("a", (" b",), None, {})),
        ("demonstrations", {"messages": [USER, ANSWER]}, Row([USER], ([ANSWER],), None, {})),
        ("demonstrations", {"text": "all of it"}, Row("", ("all of it",), None, {})),
        ("demonstrations", {"chosen": "a b", "rejected": "a c"}, Row("a", (" b",), None, {})),
        ("demonstrations", {"messages": [USER]}, Unusable("empty reply")),
        ("demonstrations", {"text": " \n"}, Unusable("empty reply")),
        ("prompts", {"prompt": "a", "answer": 42}, Row("a", (), None, {"answer": 42})),
        ("prompts", {"prompt": [USER]}, Row([USER], (), None, {})),
        ("prompts", {"prompt": "a", "completion": "b"}, Row("a", (), None, {"completion": "b"})),
        ("prompts", {"messages": [USER, ANSWER]}, Row([USER], (), None, {})),
        ("prompts", {"messages": [USER]}, Row([USER], (), None, {})),
        ("prompts", {"chosen": "a b", "rejected": "a c", "margin": 1}, Row("a", (), None, {})),
        ("prompts", {"chosen": "b", "rejected": "c"}, Unusable("empty prompt")),
        ("pairs", {"chosen": "b", "rejected": "c"}, Row("", ("b", "c"), None, {})),
        ("pairs", {"prompt": " ", "chosen": "b", "rejected": "c"}, Unusable("empty prompt")),
        ("pairs", {"prompt": [], "chosen": "b", "rejected": "c"}, Unusable("empty prompt")),
        ("pairs", {"prompt": "a", "chosen": "b", "rejected": "\t"}, Unusable("empty reply")),
        ("pairs", {"prompt": "a", "chosen": [], "rejected": "c"}, Unusable("empty reply")),
        ("pairs", {"prompt": [USER], "chosen": "b", "rejected": [ANSWER]}, Row([USER], ([message("assistant", "b")], [ANSWER]), None, {})),
        ("pairs", {"prompt": [USER], "chosen": [ANSWER, ANSWER], "rejected": [ANSWER]}, Unusable("several messages in a reply")),
        # UltraFeedback: the question is in `prompt`, and once more in the conversations
        ("pairs", {"prompt": "Hi?", "chosen": [USER, ANSWER], "rejected": [USER, ANSWER]}, Row([USER], ([ANSWER], [ANSWER]), None, {})),
        ("pairs", {"prompt": "Hi?", "chosen": [ANSWER], "rejected": [ANSWER]}, Row([USER], ([ANSWER], [ANSWER]), None, {})),
        ("pairs", {"chosen": [USER, ANSWER], "rejected": [message("user", "Ho"), ANSWER]}, Unusable("different contexts")),
    ],
    ids=str,
)
def test_a_row_of_each_style(tmp_path, view, row, expected):
    assert rows_of(write(tmp_path, ".json", [row]), view) == [expected]


def test_columns_are_renamed_and_others_kept(tmp_path):
    path = write(tmp_path, ".jsonl", [{"question": "a", "good": "b", "bad": "c", "id": 7}])
    names = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    assert rows_of(path, columns=names) == [Row("a", ("b", "c"), None, {"id": 7})]


# ---- implicit prompts ----


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        # the first reply is the beginning of the second: a word must stay for it
        ("The sky is blue", "The sky is blue and green", ("The sky is", " blue", " blue and green")),
        ("Q: 1+1? A: two", "Q: 1+1? A: too", ("Q: 1+1? A:", " two", " too")),
        ("Say it.\nYes", "Say it.\nNo", ("Say it.\n", "Yes", "No")),
        ("a b", "a b", ("a", " b", " b")),
        ("one  two", "one  six", ("one ", " two", " six")),
        ("yes", "no", ("", "yes", "no")),
        ("the sky is blue", "the skyline", ("the", " sky is blue", " skyline")),
        ("blue", "blue", ("", "blue", "blue")),
        ("\n\nHuman: Hi\n\nAssistant: Yes", "\n\nHuman: Hi\n\nAssistant: Yes!", ("\n\nHuman: Hi\n\nAssistant:", " Yes", " Yes!")),
        # a reply that quotes the marker: the last one counts, and then the contexts differ
        ("\n\nHuman: Hi\n\nAssistant: A\n\nAssistant: B", "\n\nHuman: Hi\n\nAssistant: C", Unusable("different contexts")),
        ("\n\nHuman: Hi\n\nAssistant: A", "\n\nHuman: Hi", Unusable("different contexts")),
        ("\n\nHuman: Hi\n\nAssistant: ", "\n\nHuman: Hi\n\nAssistant: C", Unusable("empty reply")),
        ("", "words", Unusable("empty reply")),
        (" ", "\n", Unusable("empty reply")),
        ("It says \n\nAssistant: x", "It says no", ("It says", " \n\nAssistant: x", " no")),
    ],
)
def test_where_a_prompt_ends(chosen, rejected, expected):
    assert split_texts(chosen, rejected) == expected


PARTS = st.sampled_from(["a", "b", " ", "\n", ".", "é", "\ud800", "\n\nAssistant:", "\n\nHuman:", "word"])
TEXTS = st.lists(PARTS, max_size=10).map("".join) | st.text(max_size=8)


@given(TEXTS, TEXTS, TEXTS)
@example("The sky is blue", "", " and green")
def test_prompt_and_reply_are_the_original_text(beginning, one, other):
    chosen, rejected = beginning + one, beginning + other
    split = split_texts(chosen, rejected)
    if isinstance(split, Unusable):
        assert not (chosen.strip() and rejected.strip()) or "\n\nAssistant:" in chosen + rejected
        return
    prompt, *replies = split
    assert [prompt + reply for reply in replies] == [chosen, rejected]
    assert all(reply.strip() for reply in replies)
    if prompt and "\n\nAssistant:" not in chosen + rejected:
        assert prompt[-1].isspace() or all(reply[0].isspace() for reply in replies), "no word is split"


MESSAGES = st.lists(st.sampled_from([message(role, content) for role in ("user", "assistant") for content in ("a", "b", "")]), max_size=4)


@given(MESSAGES, MESSAGES.filter(len), MESSAGES.filter(len))
def test_prompt_and_reply_are_the_original_conversation(beginning, one, other):
    chosen, rejected = beginning + one, beginning + other
    prompt, *replies = split_messages(chosen, rejected)
    assert [prompt + reply for reply in replies] == [chosen, rejected]
    assert all(replies)
    assert min(map(len, replies)) == 1 or replies[0][0] != replies[1][0], "nothing that both say is left in the replies"


# ---- bad files ----


def error_of(path: Path | str, view: str = "pairs", columns: dict[str, str] | None = None) -> str:
    with pytest.raises(InputError) as caught:
        rows_of(path, view, columns)
    text = str(caught.value)
    assert "\n" not in text
    return text


GOOD = '{"prompt": "a", "chosen": "b", "rejected": "c"}'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a", ', "line 2 is not valid JSON (Expecting property name enclosed in double quotes"),
        ("[" * 100_000, "line 2 is not valid JSON (maximum recursion depth exceeded"),
        ('{"prompt": 1' + "0" * 5000 + "}", "line 2 is not valid JSON (Exceeds the limit"),
        ("17", "line 2: 17 is no object: write"),
        ('{"prompt": "a", "chosen": "b"}', "line 2: column 'rejected' is missing (found: 'prompt', 'chosen'): give it in every row."),
        ('{"chosen": "b", "rejected": "c"}', "line 2: column 'prompt' is missing"),
        (
            '{"prompt": "a", "chosen": 17, "rejected": "c"}',
            'line 2, column \'chosen\': 17 is no text: write a text, or a list of {"role", "content"} messages.',
        ),
        ('{"prompt": null, "chosen": "b", "rejected": "c"}', "line 2, column 'prompt': None is no text"),
        ('{"prompt": {"role": "user"}, "chosen": "b", "rejected": "c"}', "line 2, column 'prompt': {'role': 'user'} is no text"),
        ('{"prompt": NaN, "chosen": "b", "rejected": "c"}', "line 2, column 'prompt': nan is no text"),
        ('{"prompt": ["a"], "chosen": "b", "rejected": "c"}', "line 2, column 'prompt', message 1: 'a' is no message: write"),
        (
            '{"prompt": [{"role": "user"}], "chosen": "b", "rejected": "c"}',
            "line 2, column 'prompt', message 1: {'role': 'user'} has no text 'content': write",
        ),
        ('{"prompt": [{"content": "a", "role": 1}], "chosen": "b", "rejected": "c"}', "has no text 'role'"),
        ('{"prompt": "a", "chosen": "b", "rejected": "c", "margin": 1}', "line 2: column 'margin' is there, but the first row has none"),
    ],
    ids=lambda value: value[:40],
)
def test_a_malformed_line_is_named_with_its_fix(tmp_path, line, message):
    path = tmp_path / "prefs.jsonl"
    path.write_text(f"{GOOD}\n{line}\n{GOOD}\n")
    text = error_of(path)
    assert message in text and str(path) in text


@pytest.mark.parametrize("margin", ['"high"', "null", "true", "NaN", "1e999", "[1]"])
def test_a_margin_must_be_a_number(tmp_path, margin):
    path = tmp_path / "prefs.json"
    path.write_text(f'[{GOOD[:-1]}, "margin": {margin}}}]')
    assert "row 1, column 'margin': " in (text := error_of(path))
    assert "is no finite number: write how much better the chosen reply is, e.g. 1.5." in text


def test_a_long_value_is_cut(tmp_path):
    path = tmp_path / "prefs.jsonl"
    path.write_text(json.dumps({"prompt": {"a\n" * 1000: ["x" * 1000] * 50}, "chosen": "b", "rejected": "c"}))
    assert len(error_of(path)) < 300 + len(str(path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("prefs.jsonl", b'{"prompt": "\xff"}', "line 1: byte 12 is no UTF-8: save the file as UTF-8."),
        ("prefs.jsonl", b"", "which holds no row: write at least two prompts into it."),
        ("prefs.json", b"[]", "which holds no row"),
        ("prefs.json", b'{"prompt": "a"}', "holds no list of objects: write [{...}, {...}], or one object a line into a .jsonl file."),
        ("prefs.json", b'[{"prompt": "a"}', "is not valid JSON (Expecting ',' delimiter: line 1 column 17 (char 16))"),
        ("prefs.json", b"\xff", "byte 0 is no UTF-8"),
        ("prefs.jsonl.gz", b"no gzip", "which cannot be read as gz: Not a gzipped file"),
        ("prefs.jsonl.gz", gzip.compress(b'{"prompt": "a"}' * 1000, mtime=0)[:-20], "which cannot be read as gz"),
        ("prefs.parquet", b"no parquet", "which cannot be read as parquet"),
        (
            "prefs.csv",
            b"prompt,chosen,rejected\na,b,c,d\n",
            "row 1 has more values than the header has columns: quote texts that hold commas.",
        ),
        ("prefs.csv", b"prompt,chosen,rejected\na,b\n", "row 1: column 'rejected' is missing"),
        ("prefs.csv", b"prompt\n\xff\n", "which cannot be read as csv"),
        ("prefs.pkl", b"\x80\x04N.", "a kind of file that is not read here: give one of .jsonl, .jsonl.gz, .json"),
        ("prefs.txt", b"a", "a kind of file that is not read here"),
    ],
)
def test_a_bad_file_is_named_with_its_fix(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    text = error_of(tmp_path / name)
    assert message in text and "data.path" in text and name in text


def test_a_missing_file_is_not_looked_up_on_the_hub(tmp_path):
    for name in ("nowhere.jsonl", str(tmp_path / "nowhere"), "./nowhere", "data/nowhere.pkl"):
        assert "does not exist: give a file, a folder or a hub name." in error_of(name)


def test_a_hub_name_that_cannot_be_loaded_is_named():
    text = error_of("no-such-owner/no-such-data")
    assert text.startswith("data.path is 'no-such-owner/no-such-data', which `datasets` cannot load (")


def test_an_empty_or_broken_folder_is_named(tmp_path):
    assert "a folder without data: put files into it" in error_of(tmp_path)
    (tmp_path / "dataset_info.json").write_text("{")
    assert "which `datasets` cannot load" in error_of(tmp_path)


def test_unknown_columns_are_listed_with_what_is_accepted(tmp_path):
    path = write(tmp_path, ".jsonl", [{"question": "a", "answer": "b"}])
    assert error_of(path) == (
        f"data.path: {path}, line 1 has the columns 'question', 'answer', but the view 'pairs' needs chosen+rejected: "
        'rename them by data.columns, e.g. {"prompt": "question"}.'
    )
    assert "needs prompt+completion or messages or chosen+rejected or text" in error_of(path, "demonstrations")
    assert "data.columns reads 'prompt' from 'query', but" in error_of(path, columns={"prompt": "query"})
    assert "data.columns names 'reply', which is no column of ours: rename one of prompt, chosen" in error_of(
        path, columns={"reply": "answer"}
    )


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "x"]), inner, max_size=3),
    max_leaves=6,
)
COLUMNS = ["prompt", "chosen", "rejected", "messages", "text", "margin", "completion"]


@settings(max_examples=150)
@given(
    st.lists(st.dictionaries(st.sampled_from(COLUMNS), VALUES, max_size=5), max_size=3),
    st.sampled_from(["pairs", "demonstrations", "prompts"]),
)
def test_whatever_json_holds_only_input_errors_come_out(tmp_path_factory, rows, view):
    path = tmp_path_factory.getbasetemp() / "fuzz.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    try:
        rows_of(path, view)
    except InputError as error:
        assert "\n" not in str(error)


@settings(max_examples=60)
@given(st.binary(max_size=60), st.sampled_from([".jsonl", ".json", ".csv", ".parquet", ".json.gz"]))
def test_whatever_bytes_a_file_holds_only_input_errors_come_out(tmp_path_factory, content, ending):
    path = tmp_path_factory.getbasetemp() / f"fuzz{ending}"
    path.write_bytes(content)
    try:
        rows_of(path, "prompts")
    except InputError as error:
        assert "\n" not in str(error)
