"""The data module: what each view's batches hold, which rows are dropped, how prompts are split, and what bad settings are told."""

import gzip
import json
import os
import pickle
import random
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedTokenizerFast

from p3o_lightning.batches import DemonstrationBatch, PairBatch, PromptBatch
from p3o_lightning.data import PreferenceDataModule, encode_prompt, encode_response, held_out_prompts
from p3o_lightning.data_files import read_records
from p3o_lightning.data_formats import Unusable, normalise
from p3o_lightning.encoding import TokenRows
from p3o_lightning.errors import InputError
from p3o_lightning.loaders import PositionedLoader
from p3o_lightning.sequences import pad_left, pad_right
from p3o_lightning.shipped import shipped

CHATML = (
    "{% if messages[0].role != 'system' %}<bos>system\nBe kind.<eos>\n{% endif %}"
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "<bos>{{ m.role }}\n{{ m.content }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<bos>assistant\n{% endif %}"
)


def byte_tokenizer(template: str | None = None, adds_bos: bool = False, eos: bool = True, pad: bool = True) -> PreTrainedTokenizerFast:
    """One token a byte: ids 0, 1, 2 are <pad>, <bos>, <eos>, then the 256 bytes."""
    specials = ["<pad>", "<bos>", "<eos>"]
    vocabulary = {piece: index for index, piece in enumerate([*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), decoders.ByteLevel()
    if adds_bos:
        inner.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    names = {"bos_token": "<bos>"} | ({"eos_token": "<eos>"} if eos else {}) | ({"pad_token": "<pad>"} if pad else {})
    return PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=template, **names)


TOKENIZER = byte_tokenizer()
PAIRS = [{"prompt": f"Question {number}?", "chosen": f" yes {number}", "rejected": " no", "source": number} for number in range(20)]


def write(folder: Path, rows: list[dict], name: str = "prefs.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def data_of(folder: Path, rows: list[dict], view: str = "pairs", tokenizer: PreTrainedTokenizerFast = TOKENIZER, **options):
    options = {"batch_size": 2, "val_fraction": 0.0} | options
    data = PreferenceDataModule(write(folder, rows), tokenizer, view, **options)
    data.setup()
    return data


def first(data: PreferenceDataModule):
    return data._collate()([data._train[0][index] for index in data._train[1]])


def words(tokens: torch.Tensor, mask: torch.Tensor, tokenizer: PreTrainedTokenizerFast = TOKENIZER) -> str:
    return tokenizer.decode(tokens[mask])


# ---- padding ----


@given(st.lists(st.lists(st.integers(0, 9), max_size=5), min_size=1, max_size=4), st.integers(0, 9))
def test_padding_hides_no_token_and_shows_none(rows, value):
    for pad, on_the_left in ((pad_left, True), (pad_right, False)):
        tokens, mask = pad(rows, value)
        assert tokens.shape == mask.shape == (len(rows), max(map(len, rows)))
        assert [row[kept].tolist() for row, kept in zip(tokens, mask, strict=True)] == rows
        assert (tokens[~mask] == value).all()
        ordered = mask if on_the_left else mask.flip(-1)
        assert (ordered[:, 1:] >= ordered[:, :-1]).all(), "all padding on one side"


# ---- batches ----


def test_demonstrations(tmp_path):
    rows = [{"prompt": "ab", "completion": " cd"}, {"prompt": "a", "completion": " bcdef"}]
    batch = first(data_of(tmp_path, rows, "demonstrations"))
    assert isinstance(batch, DemonstrationBatch)
    assert [words(*row) for row in zip(batch.tokens, batch.attention_mask, strict=True)] == ["ab cd<eos>", "a bcdef<eos>"]
    assert [words(*row) for row in zip(batch.tokens, batch.response_mask, strict=True)] == [" cd<eos>", " bcdef<eos>"]
    assert batch.attention_mask.dtype == batch.response_mask.dtype == torch.bool


def test_pairs(tmp_path):
    rows = [{"chosen": "a b", "rejected": "a cde", "margin": 2}, {"chosen": "abc b", "rejected": "abc c", "margin": 0.5}]
    batch = first(data_of(tmp_path, rows))
    assert isinstance(batch, PairBatch)
    assert batch.tokens.shape == (2, 2, 6)
    texts = [[words(*row) for row in zip(*pair, strict=True)] for pair in zip(batch.tokens, batch.attention_mask, strict=True)]
    assert texts == [["a b<eos>", "a cde<eos>"], ["abc b<eos>", "abc c<eos>"]]
    assert batch.response_lengths.tolist() == [[3, 5], [3, 3]]
    assert batch.margin.tolist() == [2.0, 0.5]
    assert first(data_of(tmp_path, PAIRS)).margin is None


def test_prompts(tmp_path):
    rows = [{"prompt": "abc", "answer": 1}, {"prompt": "a", "answer": 2, "hint": "x"}]
    batch = first(data_of(tmp_path, rows, "prompts"))
    assert isinstance(batch, PromptBatch)
    assert batch.tokens[1].tolist()[:2] == [0, 0], "padded on the left"
    assert [words(*row) for row in zip(batch.tokens, batch.attention_mask, strict=True)] == ["abc", "a"]
    assert batch.prompts == ["abc", "a"]
    assert batch.columns == {"answer": [1, 2], "hint": [None, "x"]}


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("template", [None, CHATML])
def test_a_prompt_has_the_same_ids_in_every_view(tmp_path, template, chat):
    tokenizer = byte_tokenizer(template, adds_bos=True)
    contexts = ("\n\nHuman: Hi\n\nAssistant: Ho\n\nHuman: So?\n\nAssistant:", "\n\nHuman: Bye\n\nAssistant:")
    rows = [{"chosen": f"{context} Yes", "rejected": f"{context} No"} for context in contexts]
    prompts = []
    for view in ("demonstrations", "pairs", "prompts"):
        data = data_of(tmp_path, rows, view, tokenizer, chat=chat)
        prompts.append([data._train[0][index].prompt.tolist() for index in range(2)])
    assert prompts[0] == prompts[1] == prompts[2]
    assert prompts[0][0] == encode_prompt(tokenizer, first(data).prompts[0]), (
        "the prompt handed to reward functions is the one that is read"
    )


# ---- BOS, EOS, templates ----


def test_bos_comes_first_where_the_tokenizer_puts_it_and_once(tmp_path):
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "<bos>a", "completion": "b"}]
    for tokenizer, expected in (
        (byte_tokenizer(adds_bos=True), ["<bos>ab<eos>", "<bos>ab<eos>"]),
        (TOKENIZER, ["ab<eos>", "<bos>ab<eos>"]),
    ):
        batch = first(data_of(tmp_path, rows, "demonstrations", tokenizer))
        assert [words(*row) for row in zip(batch.tokens, batch.attention_mask, strict=True)] == expected


def test_a_reply_ends_with_one_eos(tmp_path):
    rows = [{"prompt": "a", "completion": reply} for reply in ("b", "b<eos>", "b<eos>\n")]
    batch = first(data_of(tmp_path, rows, "demonstrations"))
    assert {words(*row) for row in zip(batch.tokens, batch.response_mask, strict=True)} == {"b<eos>"}
    assert encode_response(TOKENIZER, "b") == encode_response(TOKENIZER, "b<eos>x") == [*TOKENIZER("b")["input_ids"], 2]


def test_padding_with_the_eos_id_hides_no_eos(tmp_path):
    batch = first(data_of(tmp_path, PAIRS, tokenizer=byte_tokenizer(pad=False)))
    ends = batch.attention_mask.sum(-1) - 1
    assert (batch.tokens.gather(-1, ends[..., None]) == 2).all()


def test_conversations_go_through_the_chat_template(tmp_path):
    tokenizer = byte_tokenizer(CHATML, adds_bos=True)
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}, {"role": "user", "content": "So?"}]
    rows = [{"messages": [*turns, {"role": "assistant", "content": "Yes"}]}] * 2
    batch = first(data_of(tmp_path, rows, "demonstrations", tokenizer))
    history = "<bos>system\nBe kind.<eos>\n<bos>user\nHi<eos>\n<bos>assistant\nHo<eos>\n<bos>user\nSo?<eos>\n<bos>assistant\n"
    assert words(batch.tokens[0], batch.attention_mask[0]) == history + "Yes<eos>"
    assert words(batch.tokens[0], batch.response_mask[0]) == "Yes<eos>", "the history carries no loss"


def test_conversations_become_transcripts_without_a_template(tmp_path):
    rows = [{"prompt": [{"role": "user", "content": "Hi"}], "chosen": "Yes", "rejected": "No"}] * 2
    batch = first(data_of(tmp_path, rows))
    assert words(batch.tokens[0, 0], batch.attention_mask[0, 0]) == "\n\nHuman: Hi\n\nAssistant: Yes<eos>"


def test_chat_parses_transcripts_and_plain_prompts(tmp_path):
    rows = [
        {"prompt": "Rules.\n\nHuman: Hi\n\nAssistant: Ho\n\nHuman: So?\n\nAssistant:", "completion": " Yes "},
        {"prompt": "Plain", "completion": "Yes"},
    ]
    batch = first(data_of(tmp_path, rows, "demonstrations", byte_tokenizer(CHATML), chat=True))
    texts = [words(*row) for row in zip(batch.tokens, batch.attention_mask, strict=True)]
    assert texts == [
        "<bos>system\nRules.<eos>\n<bos>user\nHi<eos>\n<bos>assistant\nHo<eos>\n<bos>user\nSo?<eos>\n<bos>assistant\nYes<eos>",
        "<bos>system\nBe kind.<eos>\n<bos>user\nPlain<eos>\n<bos>assistant\nYes<eos>",
    ]


def test_chat_parses_a_transcript_without_a_prompt(tmp_path):
    batch = first(data_of(tmp_path, [{"text": "\n\nHuman: Hi\n\nAssistant: Ho"}] * 2, "demonstrations", byte_tokenizer(CHATML), chat=True))
    assert words(batch.tokens[0], batch.response_mask[0]) == "Ho<eos>"


def test_what_the_template_refuses_or_changes_is_counted(tmp_path):
    good = {"prompt": [{"role": "user", "content": "a"}], "chosen": "b", "rejected": "c"}
    data = data_of(tmp_path, [good, good, good | {"prompt": [{"role": "tool", "content": "a"}]}], tokenizer=byte_tokenizer(CHATML))
    assert data.report.dropped == {"refused by the chat template": 1}
    fickle = byte_tokenizer("{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(InputError, match=r"of whose 1 rows none can be used \(changed by the chat template 1\): choose a data\.tokenizer"):
        data_of(tmp_path, [good], tokenizer=fickle)


def test_lone_surrogates_become_the_replacement_character(tmp_path):
    batch = first(data_of(tmp_path, [{"prompt": "a\ud800", "completion": "\udc00b"}] * 2, "demonstrations"))
    assert words(batch.tokens[0], batch.attention_mask[0]) == "a\ufffd\ufffdb<eos>"


# ---- what is dropped ----


def test_dropped_rows_are_counted_by_reason(tmp_path):
    rows = [
        *PAIRS[:2],
        {"prompt": "a", "chosen": " ", "rejected": "b"},
        {"prompt": "", "chosen": "a", "rejected": "b"},
        {"prompt": "p" * 21, "chosen": "a", "rejected": "b"},
        {"prompt": "p" * 20, "chosen": "a", "rejected": "b" * 30},
        {"prompt": "p" * 20, "chosen": "a", "rejected": "b" * 29},
    ]
    data = data_of(tmp_path, [row | {"source": 0} for row in rows], max_length=50, max_prompt_length=20)
    expected = {"empty reply": 1, "empty prompt": 1, "over max_prompt_length": 1, "over max_length": 1}
    assert data.report == (7, 3, expected, 3, 0)


def test_the_report_is_one_line(tmp_path):
    rows = [{"prompt": str(number), "chosen": "a", "rejected": "b" if number % 100 else ""} for number in range(2000)]
    assert str(data_of(tmp_path, rows, val_fraction=0.1).report) == (
        "data: 2,000 rows, 1,980 usable, 1,782 for training, 198 for validation; dropped 20: empty reply 20"
    )


def test_rows_are_kept_in_four_bytes_a_token(tmp_path):
    rows = data_of(tmp_path, PAIRS)._train[0]
    assert rows.tokens.dtype == "int32" and rows.tokens.nbytes == 4 * rows.ends[-1]
    again = pickle.loads(pickle.dumps(rows))
    assert again.fingerprint() == rows.fingerprint() and again[3].prompt.tolist() == rows[3].prompt.tolist()
    assert len(TokenRows([])) == 0 and TokenRows([]).lengths.tolist() == []


# ---- the split ----


@given(st.sets(st.binary(min_size=1, max_size=4), min_size=2, max_size=40), st.floats(0.01, 0.99), st.integers(0, 5), st.randoms())
def test_the_split_is_exact_and_blind_to_the_order_of_rows(keys, fraction, seed, shuffler):
    held = held_out_prompts(keys, fraction, seed)
    assert held < keys
    assert len(held) == min(max(round(fraction * len(keys)), 1), len(keys) - 1)
    rows = [*keys, *keys]
    shuffler.shuffle(rows)
    assert held_out_prompts(rows, fraction, seed) == held


def test_no_prompt_is_on_both_sides_and_every_row_is_on_one(tmp_path):
    rows = [row | {"chosen": f"reply {copy}"} for row in PAIRS for copy in range(3)]
    random.Random(0).shuffle(rows)
    data = data_of(tmp_path, rows, "prompts", val_fraction=0.25)
    train, val = ({row.text for row in part} for part in ((data._train[0][index] for index in data._train[1]), data._val))
    assert not train & val and len(val) == 5 and len(train) == 15
    assert (data.report.train, data.report.val) == (45, 15)
    pairs = data_of(tmp_path, rows, "pairs", val_fraction=0.25)
    assert [row.key for row in pairs._val] == [row.key for row in data._val], "held out in one stage, held out in all"


def test_validation_data_of_its_own(tmp_path):
    val_path = write(tmp_path, PAIRS[:3], "val.jsonl")
    with pytest.warns(UserWarning, match=r"3 prompts of data\.val_path .* are in data\.path too"):
        data = data_of(tmp_path, PAIRS, val_path=val_path)
    assert data.report[:2] == (23, 23) and data.report[3:] == (20, 3)
    assert sum(len(batch.tokens) for batch in data.val_dataloader()) == 3


# ---- loaders ----


class Stage(L.LightningModule):
    """Takes any view, learns nothing of use."""

    def __init__(self, view: str, tokenizer: PreTrainedTokenizerFast = TOKENIZER) -> None:
        super().__init__()
        self.view, self.tokenizer, self.weight = view, tokenizer, nn.Parameter(torch.zeros(()))
        self.batches: list[object] = []

    def training_step(self, batch, batch_idx):
        self.batches.append(batch)
        return self.weight * batch.tokens.float().mean()

    def validation_step(self, batch, batch_idx):
        self.batches.append(batch)

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        self.batches.append(batch)
        return batch

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-4)


def trainer(**options) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return L.Trainer(accelerator="cpu", num_sanity_val_steps=0, **quiet, **options)


def test_one_data_module_serves_three_modules_in_turn(tmp_path):
    data = PreferenceDataModule(write(tmp_path, PAIRS), batch_size=3)
    for view, kind in (("demonstrations", DemonstrationBatch), ("pairs", PairBatch), ("prompts", PromptBatch)):
        module = Stage(view, byte_tokenizer())
        trainer(max_epochs=2).fit(module, data)
        assert len(module.batches) == 2 * (18 // 3 + 1) and all(isinstance(batch, kind) for batch in module.batches)
        assert data._encoder.tokenizer is module.tokenizer


def test_validation_test_and_prediction_see_all_their_rows(tmp_path):
    data = PreferenceDataModule(write(tmp_path, PAIRS), TOKENIZER, "pairs", batch_size=7, val_fraction=0.5, val_batch_size=3)
    for run, rows in (("validate", 10), ("test", 10), ("predict", 20)):
        module = Stage("pairs")
        getattr(trainer(), run)(module, data)
        assert sum(len(batch.tokens) for batch in module.batches) == rows
        assert isinstance(module.batches[0], PromptBatch if run == "predict" else PairBatch)
    module = Stage("pairs")
    data.predict_path = write(tmp_path, [{"prompt": "x"}], "ask.jsonl")
    trainer().predict(module, PreferenceDataModule(data.path, TOKENIZER, predict_path=data.predict_path))
    assert [batch.prompts for batch in module.batches] == [["x"]]


def test_a_module_may_wrap_the_loader(tmp_path):
    class Wrapping(Stage):
        def wrap_train_dataloader(self, loader):
            self.inner = loader
            return PositionedLoader(loader, self, 3)

    module = Wrapping("prompts")
    trainer(max_epochs=1).fit(module, PreferenceDataModule(write(tmp_path, PAIRS), batch_size=9, val_fraction=0))
    assert len(module.inner) == 2 and len(module.batches) == 2


def test_overfit_batches_repeat_the_same_rows(tmp_path):
    module = Stage("prompts")
    trainer(max_epochs=3, overfit_batches=2).fit(module, PreferenceDataModule(write(tmp_path, PAIRS), batch_size=4, val_fraction=0))
    seen = [tuple(batch.prompts) for batch in module.batches]
    assert len(seen) == 6 and seen[:2] == seen[2:4] == seen[4:]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_needs_a_number_of_steps_and_goes_round(tmp_path, workers):
    val_path = write(tmp_path, PAIRS[:5], "val.jsonl")
    path = write(tmp_path, [*PAIRS[5:], {"prompt": "p", "chosen": "", "rejected": "b", "source": 0}])
    data = PreferenceDataModule(path, view="pairs", streaming=True, batch_size=4, val_path=val_path, num_workers=workers)
    module = Stage("pairs")
    trainer(max_steps=6).fit(module, data)
    assert [len(batch.tokens) for batch in module.batches] == [4] * 6 + [4, 1], "six training batches, then the validation"
    assert sum(len(batch.prompts) for batch in trainer().predict(Stage("pairs"), data)) == 15
    with pytest.raises(InputError, match=r"data\.streaming is true, so an epoch has no end: set trainer\.max_steps, e\.g\. to 1000"):
        trainer(max_epochs=1).fit(Stage("pairs"), data)


def test_workers_give_the_same_batches(tmp_path):
    batches = []
    for workers in (0, 2):
        module = Stage("prompts")
        trainer(max_epochs=1).fit(module, PreferenceDataModule(write(tmp_path, PAIRS), batch_size=4, val_fraction=0, num_workers=workers))
        batches.append([batch.prompts for batch in module.batches])
    assert batches[0] == batches[1]


@pytest.mark.parametrize(("view", "streaming"), [("demonstrations", False), ("pairs", False), ("pairs", True), ("prompts", False)])
def test_workers_can_be_sent_what_they_need(tmp_path, view, streaming):
    """They are not forked on macOS, nor on Linux from Python 3.14 on: rows and collation reach them pickled."""
    path = write(tmp_path, PAIRS)
    data = PreferenceDataModule(path, TOKENIZER, view, streaming=streaming, batch_size=4, val_fraction=0)
    data.setup("fit")
    loader = data.train_dataloader()
    rows, collate = pickle.loads(pickle.dumps((loader.dataset, loader.collate_fn)))
    sent, here = ([row for row, _ in zip(dataset, range(4), strict=False)] for dataset in (rows, loader.dataset))
    assert repr(collate(sent)) == repr(loader.collate_fn(here)) and len(sent) == 4


def test_objects_stay_out_of_the_checkpoint_and_other_data_is_noticed(tmp_path):
    data = PreferenceDataModule(write(tmp_path, PAIRS), TOKENIZER, "pairs", batch_size=4)
    assert pickle.loads(pickle.dumps(data)).path == data.path
    assert "tokenizer" not in data.hparams and data.hparams["batch_size"] == 4
    run = trainer(max_steps=2)
    run.fit(Stage("pairs"), data)
    checkpoint = tmp_path / "a.ckpt"
    run.save_checkpoint(checkpoint)
    torch.load(checkpoint, weights_only=True)
    trainer(max_steps=3).fit(Stage("pairs"), PreferenceDataModule(data.path, TOKENIZER, "pairs", batch_size=4), ckpt_path=checkpoint)
    write(tmp_path, PAIRS[:-1])
    with pytest.warns(UserWarning, match=r"data\.path is .*, whose rows are not those the checkpoint was trained on"):
        trainer(max_steps=3).fit(Stage("pairs"), PreferenceDataModule(data.path, TOKENIZER, "pairs", batch_size=4), ckpt_path=checkpoint)


# ---- bad settings ----


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (PAIRS, {"batch_size": 0}, r"data\.batch_size is 0: choose 1 or more\."),
        (PAIRS, {"max_length": 1}, r"data\.max_length is 1: choose 2 or more\."),
        (PAIRS, {"val_fraction": 1.0}, r"data\.val_fraction is 1\.0: choose a share in \[0, 1\), e\.g\. 0\.1, or 0 for no validation\."),
        (PAIRS, {"view": "triples"}, r"data\.view is 'triples': choose one of demonstrations, pairs, prompts\."),
        (PAIRS, {"tokenizer": byte_tokenizer(eos=False)}, r"data\.tokenizer .* has no EOS token, so no reply could end: set"),
        (PAIRS, {"view": "prompts", "streaming": True}, r"data\.streaming is true, but rollouts need .*: set data\.streaming to false\."),
        (PAIRS, {"max_length": 3}, r"of whose 20 rows none can be used \(over max_length 20\): raise data\.max_length, or shorten"),
        (PAIRS, {"batch_size": 21}, r"data\.batch_size is 21, but '.*' has 20 rows for training, .*: set data\.batch_size to 20"),
        (PAIRS[:1], {"batch_size": 8}, r"data\.batch_size is 8, but '.*' has 1 rows for training"),
        (PAIRS[:1], {"val_fraction": 0.1}, r"data\.val_fraction is 0\.1, but '.*' has one usable prompt .* set data\.val_fraction to 0"),
    ],
)
def test_bad_settings_are_named_with_their_fix(tmp_path, rows, options, message):
    with pytest.raises(InputError, match=message) as caught:
        data_of(tmp_path, rows, **options)
    assert "\n" not in str(caught.value)


def test_without_a_module_view_and_tokenizer_must_be_given(tmp_path):
    with pytest.raises(
        InputError, match=r'data\.view is not set, and there is no fitted module to ask: set data\.view, e\.g\. to "pairs"\.'
    ):
        PreferenceDataModule(write(tmp_path, PAIRS)).setup()
    with pytest.raises(InputError, match=r"data\.tokenizer is not set, and there is no fitted module to ask: set data\.tokenizer"):
        PreferenceDataModule(write(tmp_path, PAIRS), view="pairs").setup()
    with pytest.raises(InputError, match=r"data\.view is not set, and BoringModel has no attribute 'view': set data\.view"):
        from lightning.pytorch.demos.boring_classes import BoringModel

        trainer(max_steps=1).fit(BoringModel(), PreferenceDataModule(write(tmp_path, PAIRS)))


def test_nothing_held_out_is_nothing_to_test_on(tmp_path):
    data = PreferenceDataModule(write(tmp_path, PAIRS), val_fraction=0)
    with pytest.raises(
        InputError, match=r"data\.val_fraction is 0 and data\.val_path is not set, so no row is held out for it: set data\.val_path\."
    ):
        trainer().test(Stage("pairs"), data)
    trainer(max_steps=1).fit(Stage("pairs"), data)


def test_a_shipped_path_is_found_where_the_working_directory_has_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("p3o_lightning.shipped._PACKAGE", tmp_path / "package")
    packaged = tmp_path / "package" / "configs" / "debug" / "prefs.jsonl"
    packaged.parent.mkdir(parents=True)
    write(packaged.parent, PAIRS)
    assert shipped("configs/debug/prefs.jsonl") == packaged
    assert shipped("configs/none.yaml") == Path("configs/none.yaml") and shipped("prefs.jsonl") == Path("prefs.jsonl")
    assert len(list(read_records("configs/debug/prefs.jsonl"))) == 20
    own = tmp_path / "configs" / "debug"
    own.mkdir(parents=True)
    write(own, PAIRS[:1])
    assert len(list(read_records("configs/debug/prefs.jsonl"))) == 1, "the user's own file comes first"


# ---- real preferences ----


@pytest.fixture
def harmless() -> Path:
    given = Path(os.environ.get("P3O_DATA") or "unset")
    path = given if given.is_file() else given / "hh-rlhf" / "harmless-base-test.jsonl.gz"
    if not path.is_file():
        pytest.skip("set P3O_DATA to a folder that holds hh-rlhf/harmless-base-test.jsonl.gz, or to that file")
    return path


def test_hh_rlhf_is_read_whole(harmless):
    with gzip.open(harmless, "rt", encoding="utf-8") as file:
        originals = [json.loads(line) for line in file]
    rows = list(normalise(read_records(str(harmless)), "pairs"))
    usable = [(original, row) for original, row in zip(originals, rows, strict=True) if not isinstance(row, Unusable)]
    assert (len(rows), len(usable)) == (2312, 2303)
    assert all([original["chosen"], original["rejected"]] == [row.prompt + reply for reply in row.replies] for original, row in usable)
    assert all(row.prompt.endswith("\n\nAssistant:") for _, row in usable)


def test_hh_rlhf_is_split_by_prompt(harmless):
    data = PreferenceDataModule(str(harmless), TOKENIZER, "prompts", max_length=100_000)
    data.setup()
    assert str(data.report).endswith("dropped 9: different contexts 5, empty reply 4")
    train, val = {data._train[0][index].text for index in data._train[1]}, {row.text for row in data._val}
    assert not train & val and len(val) == round(0.1 * len(train | val))
