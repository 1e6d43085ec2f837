"""Stage 2: a preference with a known answer is learnt, the figures count every pair once, and what is saved judges as what was trained.

The power of these tests, found by planting one error at a time in reward_model.py:
    planted error                first test that fails, without test_
    margin of the data ignored   the_loss_is_bradley_terry_with_the_margin_of_the_data
    chosen and rejected swapped  a_separable_preference_is_learnt_and_survives_saving
    padding with EOS             an_export_pads_with_a_token_of_its_own_where_the_model_padded_with_eos
    report not reset             a_separable_preference_is_learnt_and_survives_saving
    settings unchecked           settings_out_of_range_are_told_before_training
    centring not passed on       the_loss_is_bradley_terry_with_the_margin_of_the_data
"""

from __future__ import annotations

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from families import word_tokenizer
from lightning.pytorch.callbacks import ModelCheckpoint
from saved_models import BYTES, TINY, refuses
from test_metrics import by_hand
from torch.testing import assert_close
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from p3o_lightning import RewardModel
from p3o_lightning.batches import PairBatch
from p3o_lightning.encoding import Encoded, collate_pairs
from p3o_lightning.forwards import eval_mode, is_adapted, unwrapped
from p3o_lightning.models import load_policy
from p3o_lightning.objectives import bradley_terry_loss
from p3o_lightning.scoring import grouped_scores
from p3o_lightning.tokenizers import load_tokenizer

WORDS = ["good", "bad", *(f"w{i}" for i in range(8))]


def rows(count: int, tokenizer, seed: int = 0, margins: bool = False) -> list[Encoded]:
    """The chosen response has "good" at some place, the rejected one "bad"; all else is noise, lengths included."""
    generator = np.random.default_rng(seed)
    made = []
    for index in range(count):

        def text(word: str) -> list[int]:
            noise = list(generator.choice(WORDS[2:], generator.integers(1, 6)))
            noise.insert(generator.integers(0, len(noise) + 1), word)
            return [*tokenizer(" ".join(noise))["input_ids"], tokenizer.eos_token_id]

        prompt = tokenizer(" ".join(generator.choice(WORDS[2:], 3)))["input_ids"]
        replies = tuple(np.array(text(word), dtype=np.int32) for word in ("good", "bad"))
        margin = float(generator.uniform(0, 2)) if margins else None
        made.append(Encoded(np.array(prompt, dtype=np.int32), replies, margin, str(index).encode(), "", {}))
    return made


def loader(made: list[Encoded], batch_size: int, pad: int, shuffle: bool = False) -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    return DataLoader(made, batch_size, shuffle, collate_fn=lambda items: collate_pairs(items, pad), generator=generator)


def trainer(root, **settings) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return L.Trainer(**{"accelerator": "cpu", "devices": 1, "num_sanity_val_steps": 0, "default_root_dir": root, **quiet, **settings})


def module(seed: int = 0, tokenizer=None, **settings) -> RewardModel:
    torch.manual_seed(seed)
    return RewardModel(TINY, **{"tokenizer": tokenizer or word_tokenizer(WORDS), "lr": 1e-2, **settings})


@pytest.mark.parametrize(
    "settings", [{}, {"peft_config": {"r": 4}, "lr": 3e-2}, {"dtype": "bfloat16"}], ids=["all weights", "lora", "bfloat16"]
)
def test_a_separable_preference_is_learnt_and_survives_saving(settings, tmp_path):
    reward = module(**settings)
    frozen = {name: value.clone() for name, value in reward.model.named_parameters() if not value.requires_grad}
    head = unwrapped(reward.model).score.weight.clone()
    held_out = loader(rows(101, reward.tokenizer, seed=1), 16, reward.tokenizer.pad_token_id)
    before = trainer(tmp_path).validate(reward, held_out, verbose=False)[0]["val/accuracy"]
    assert 0.2 < before < 0.8
    save = ModelCheckpoint(tmp_path, save_last=True)
    run = trainer(tmp_path, max_steps=60, enable_checkpointing=True, callbacks=[save])
    run.fit(reward, loader(rows(512, reward.tokenizer), 16, reward.tokenizer.pad_token_id, shuffle=True))
    figures = run.validate(reward, held_out, verbose=False)[0]
    assert figures["val/accuracy"] > 0.95
    assert figures["val/accuracy_low"] > 0.9
    assert figures["val/log_loss"] < 0.3
    assert not torch.equal(unwrapped(reward.model).score.weight, head), "the head is trained"
    now = dict(reward.model.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in frozen.items())

    # the checkpoint alone, and the export in plain transformers, judge a right-padded batch alike
    batch = next(iter(held_out))
    with torch.no_grad(), eval_mode(reward.model):
        expected = reward(batch)
        again = RewardModel.load_from_checkpoint(tmp_path / "last.ckpt")
        assert is_adapted(again.model) == ("peft_config" in settings)
        with eval_mode(again.model):
            assert torch.equal(again(batch), expected)
        folder = reward.export(tmp_path / "export")
        plain, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
        assert tokenizer.get_vocab() == reward.tokenizer.get_vocab()
        assert plain.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
        mask = batch.attention_mask.flatten(0, 1)
        logits = plain(batch.tokens.flatten(0, 1), attention_mask=mask.long()).logits.float().view(-1, 2)
        coarse = "dtype" in settings  # transformers computes the head in bfloat16
        assert_close(logits, expected, rtol=2e-2 if coarse else 0, atol=5e-2 if coarse else 2e-5)
        exact = grouped_scores(plain, batch.tokens.flatten(0, 1), mask, 2).view(-1, 2)
        assert_close(exact, expected, rtol=0, atol=2e-5)


def test_an_export_pads_with_a_token_of_its_own_where_the_model_padded_with_eos(tmp_path):
    tokenizer = word_tokenizer(WORDS, unk="<unk>", pad=None)
    tokenizer.pad_token = tokenizer.eos_token
    reward = module(tokenizer=tokenizer)
    assert reward.tokenizer.pad_token_id != reward.tokenizer.eos_token_id
    batch = next(iter(loader(rows(9, tokenizer), 9, reward.tokenizer.pad_token_id)))
    plain = AutoModelForSequenceClassification.from_pretrained(reward.export(tmp_path / "export")).eval()
    with torch.no_grad(), eval_mode(reward.model):
        logits = plain(batch.tokens.flatten(0, 1), attention_mask=batch.attention_mask.flatten(0, 1).long()).logits.view(-1, 2)
        assert_close(logits, reward(batch), rtol=0, atol=1e-5)


def test_a_new_padding_token_is_embedded():
    tokenizer = word_tokenizer(WORDS, unk=None, pad=None)
    tokenizer.pad_token = tokenizer.eos_token
    reward = RewardModel(load_policy(TINY, tokenizer), tokenizer=tokenizer)
    assert reward.tokenizer.pad_token_id == len(tokenizer) == reward.model.get_input_embeddings().num_embeddings - 1
    assert reward(collate_pairs(rows(9, tokenizer), reward.tokenizer.pad_token_id)).isfinite().all()


def test_validation_figures_count_every_pair_once(tmp_path):
    reward = module()
    held_out = rows(23, reward.tokenizer, seed=5)  # batches of 8, 8 and 7
    figures = trainer(tmp_path).validate(reward, loader(held_out, 8, 0), verbose=False)[0]
    with torch.no_grad(), eval_mode(reward.model):
        batches = [collate_pairs([row], 0) for row in held_out]
        scores = torch.cat([reward(batch) for batch in batches]).double().numpy()
    lengths = torch.cat([batch.response_lengths for batch in batches]).numpy()
    for name, value in by_hand(scores, lengths).items():
        assert figures[f"val/{name}"] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    tested = trainer(tmp_path).test(reward, loader(held_out, 5, 0), verbose=False)[0]
    for name, value in figures.items():
        assert tested[name.replace("val/", "test/")] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    assert trainer(tmp_path).validate(reward, loader(held_out, 8, 0), verbose=False)[0] == figures, "nothing is left over from before"


def test_the_loss_is_bradley_terry_with_the_margin_of_the_data():
    reward = module(label_smoothing=0.1, center_coef=0.02)
    reward.model.eval()
    reward.log = lambda *_, **__: None  # type: ignore[method-assign]
    batch = collate_pairs(rows(6, reward.tokenizer, margins=True), 0)
    assert batch.margin is not None and batch.margin.max() > 0.5
    with torch.no_grad():
        chosen, rejected = reward(batch).unbind(1)
        expected = bradley_terry_loss(chosen, rejected, margin=batch.margin, label_smoothing=0.1, center_coef=0.02).loss
        assert torch.equal(reward.training_step(batch, 0), expected)
        assert not torch.isclose(reward.training_step(batch._replace(margin=None), 0), expected)
        swapped = PairBatch(batch.tokens.flip(1), batch.attention_mask.flip(1), batch.response_lengths.flip(1), batch.margin)
        assert_close(reward(swapped), torch.stack([rejected, chosen], 1))
        assert not torch.isclose(reward.training_step(swapped, 0), expected)


def test_a_row_is_judged_alike_in_any_batch():
    reward = module()
    made = rows(7, reward.tokenizer)
    with torch.no_grad(), eval_mode(reward.model):
        together = reward(collate_pairs(made, 0))
        alone = torch.cat([reward(collate_pairs([row], 0)) for row in made])
    assert_close(together, alone, rtol=0, atol=1e-5)


def test_a_checkpoint_carries_the_tokenizer_and_plain_settings(tmp_path):
    reward = module(label_smoothing=0.2, tokenizer=BYTES)
    trainer(tmp_path, max_steps=1, enable_checkpointing=True, callbacks=[ModelCheckpoint(tmp_path, save_last=True)]).fit(
        reward, loader(rows(4, BYTES), 4, 0)
    )
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert content["hyper_parameters"]["label_smoothing"] == 0.2 and "tokenizer" not in content["hyper_parameters"]
    assert not any("report" in name for name in content["state_dict"])
    again = RewardModel.load_from_checkpoint(tmp_path / "last.ckpt", center_coef=0.5)
    assert (again.label_smoothing, again.center_coef) == (0.2, 0.5)
    assert again.tokenizer.get_vocab() == load_tokenizer(tmp_path / "last.ckpt").get_vocab() == BYTES.get_vocab()


@pytest.mark.parametrize(("setting", "value"), [("label_smoothing", 0.5), ("label_smoothing", -0.1), ("center_coef", -1.0), ("lr", 0.0)])
def test_settings_out_of_range_are_told_before_training(setting, value):
    refuses(lambda: module(**{setting: value}), f"model.{setting} is {value}", "choose")
