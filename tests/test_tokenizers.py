"""Tokenizers: of bytes, of a model source, with a padding token of their own, through a checkpoint; and which are refused.

The power of these tests, found by planting one error at a time in tokenizers.py:
    planted error                          first test that fails, without test_
    special tokens read from text          bytes_round_trip_the_awkward_ones_even_when_saved
    user's tokenizer changed               a_missing_padding_token_becomes_eos_in_a_copy
    pad == eos kept                        a_distinct_padding_token_is_the_unknown_one_or_a_new_one
"""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest
from families import causal, config, word_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from saved_models import BYTES, TINY, checkpoint, refuses

from p3o_lightning import SupervisedPolicy
from p3o_lightning.models import describe, load_policy, load_reward_backbone
from p3o_lightning.tokenizers import byte_tokenizer, distinct_pad_token, load_tokenizer, tokenizer_source


@given(st.text())
def test_bytes_round_trip_any_text(text):
    text = text.encode("utf-8", "replace").decode("utf-8")
    ids = BYTES(text)["input_ids"]
    assert len(ids) == len(text.encode("utf-8")) and max(ids, default=0) < 256
    assert BYTES.decode([*ids, BYTES.eos_token_id], skip_special_tokens=True) == text


@pytest.mark.parametrize("text", ["<eos>", "a <pad> b<bos>", " \t\r\n  x ", "\x00\x7f", "don 't , stop .", "é中😀\ufffd"])
def test_bytes_round_trip_the_awkward_ones_even_when_saved(text, tmp_path):
    BYTES.save_pretrained(tmp_path)
    for tokenizer in (BYTES, load_tokenizer("bytes"), load_tokenizer(tmp_path), copy.deepcopy(BYTES)):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        assert len(tokenizer) == 259 and len({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id}) == 3


def test_bad_tokenizers(policy_folder, tmp_path):
    folder = Path(shutil.copytree(policy_folder, tmp_path / "none"))
    (folder / "tokenizer.json").unlink()
    refuses(lambda: load_tokenizer(folder), "a folder without tokenizer.json", "Save a tokenizer there")
    refuses(lambda: SupervisedPolicy(str(folder)), "a folder without tokenizer.json")
    (folder / "tokenizer.json").write_text("{")
    refuses(lambda: load_tokenizer(folder), "could not be loaded")
    refuses(lambda: load_tokenizer(tmp_path / "absent"), "no such folder")
    refuses(lambda: load_tokenizer("nobody/has-this"), "could not be loaded")
    refuses(lambda: load_tokenizer(tmp_path / "absent.ckpt"), "no such file")
    endless = byte_tokenizer()
    endless.eos_token = None
    refuses(lambda: load_tokenizer(endless), "has no EOS token", "tokenizer.eos_token")


def test_the_tokenizer_of_a_model_source(policy_folder):
    assert tokenizer_source("some/name") == "some/name"
    assert str(tokenizer_source(load_policy(policy_folder, BYTES))) == str(policy_folder)
    for source in (TINY, config("llama"), causal("llama")):
        refuses(lambda source=source: tokenizer_source(source), "model.tokenizer is missing", "'bytes'")


def test_a_missing_padding_token_becomes_eos_in_a_copy():
    own = word_tokenizer(["a"], pad=None)
    loaded = load_tokenizer(own)
    assert loaded.pad_token_id == loaded.eos_token_id == own.eos_token_id
    assert own.pad_token is None
    assert load_tokenizer(BYTES) is BYTES


@pytest.mark.parametrize("unk", ["<unk>", "<eos>", None])
def test_a_distinct_padding_token_is_the_unknown_one_or_a_new_one(unk):
    own = word_tokenizer(["a", "b"], unk=unk, pad=None)
    own.pad_token = own.eos_token
    size = len(own)
    distinct = distinct_pad_token(own)
    assert distinct.pad_token_id not in (None, distinct.eos_token_id)
    assert distinct.pad_token == ("<unk>" if unk == "<unk>" else "<|pad|>")
    assert own.pad_token_id == own.eos_token_id and len(own) == size, "the user's own tokenizer stays as it is"
    assert distinct.eos_token_id == own.eos_token_id and distinct("a b")["input_ids"] == own("a b")["input_ids"]
    model = load_reward_backbone(config("llama", vocab_size=size), distinct)
    assert model.get_input_embeddings().num_embeddings == len(distinct) == model.config.vocab_size
    assert model.config.pad_token_id == distinct.pad_token_id
    assert distinct_pad_token(distinct) is distinct


def test_a_tokenizer_with_a_binary_file_goes_through_a_checkpoint(policy_folder, tmp_path, monkeypatch):
    tokenizer = byte_tokenizer()
    save = tokenizer.save_pretrained

    def with_model(folder):
        save(folder)
        (Path(folder) / "tokenizer.model").write_bytes(b"\x80\xff\x00")

    monkeypatch.setattr(tokenizer, "save_pretrained", with_model)
    files = describe(load_policy(policy_folder, tokenizer), tokenizer)["tokenizer"]
    assert files["tokenizer.model"] == b"\x80\xff\x00" and isinstance(files["tokenizer.json"], str)
    path = checkpoint(SupervisedPolicy(policy_folder, tokenizer=tokenizer), tmp_path / "last.ckpt")
    assert load_tokenizer(path)("hé")["input_ids"] == BYTES("hé")["input_ids"]
