"""SupervisedPolicy, and with it RewardModel, through a real Trainer and PreferenceDataModule: the loss, a known answer, exact resume."""

from __future__ import annotations

import pytest
import torch
from tiny import GPT2, LLAMA, KeepAll, equal, letters, preferences, trainer, weights
from torch.testing import assert_close
from torch.utils.data import DataLoader

from p3o_lightning import PreferenceDataModule, RewardModel, SupervisedPolicy
from p3o_lightning.batches import DemonstrationBatch
from p3o_lightning.models import read_checkpoint


def stage(owner, model=LLAMA, **settings):
    torch.manual_seed(0)
    return owner(model, tokenizer=letters(), lr=1e-2, **settings)


def data(path, **settings):
    return PreferenceDataModule(str(path), **{"batch_size": 3, "max_length": 16, "val_fraction": 0.2, **settings})


@pytest.mark.parametrize("owner", [SupervisedPolicy, RewardModel])
@pytest.mark.parametrize(
    "flags",
    [
        {"max_epochs": 2},
        {"max_steps": 6, "accumulate_grad_batches": 2},
        {"max_epochs": 2, "val_check_interval": 3, "limit_train_batches": 3},
    ],
    ids=str,
)
def test_every_checkpoint_resumes_to_the_bit(owner, flags, tmp_path):
    path = preferences(tmp_path)

    def run(ckpt_path=None, callbacks=()):
        module = stage(owner, GPT2)  # with dropout 0.1
        torch.manual_seed(123 if ckpt_path else 321)  # nothing may depend on it
        trainer(tmp_path, callbacks=list(callbacks), **flags).fit(module, data(path), ckpt_path=ckpt_path)
        return module

    keeper = KeepAll(tmp_path / "kept")
    whole = run(callbacks=[keeper])
    assert len(keeper.kept) >= 6 and not equal(weights(whole), weights(stage(owner, GPT2)))
    for checkpoint in keeper.kept[::2]:
        assert equal(weights(run(checkpoint)), weights(whole)), checkpoint.name
        assert read_checkpoint(checkpoint)  # with weights_only=True


def test_the_loss_is_the_mean_over_response_tokens_eos_included():
    module = stage(SupervisedPolicy).eval()
    batch = DemonstrationBatch(
        tokens=torch.tensor([[1, 2, 0, 8], [3, 0, 8, 9]]),
        attention_mask=torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]).bool(),
        response_mask=torch.tensor([[0, 0, 1, 1], [0, 1, 1, 0]]).bool(),
    )
    total, count = module.token_loss(batch)
    by_hand = 0.0
    for row, response in (([1, 2, 0, 8], [2, 3]), ([3, 0, 8], [1, 2])):
        table = module.model(torch.tensor([row])).logits[0].log_softmax(-1)
        by_hand -= sum(float(table[place - 1, row[place]]) for place in response)
    assert int(count) == 4 and float(total) == pytest.approx(by_hand, rel=1e-5)


def test_padding_changes_nothing():
    module = stage(SupervisedPolicy).eval()
    tokens, real = torch.tensor([[1, 2, 0, 8]]), torch.ones(1, 4).bool()
    response = torch.tensor([[False, False, True, True]])
    wider = [torch.cat([part, torch.full((1, 3), value).to(part.dtype)], 1) for part, value in ((tokens, 8), (real, 0), (response, 0))]
    assert_close(module.token_loss(DemonstrationBatch(*wider))[0], module.token_loss(DemonstrationBatch(tokens, real, response))[0])


@pytest.mark.parametrize(("sizes", "updates"), [((1, 5), 1), ((2, 3, 1), 1), ((3, 1, 2, 4), 2)])
def test_accumulated_batches_are_one_batch(sizes, updates, tmp_path):
    """However unequal their numbers of tokens; what is left at the end of an epoch, too. SGD shows a gradient's size, Adam would not."""
    draw = torch.Generator().manual_seed(1)
    batches, each = [], -(-len(sizes) // updates)
    for rows in sizes:
        lengths = torch.randint(2, 9, (rows, 1), generator=draw)
        real = torch.arange(8) < lengths
        batches.append(DemonstrationBatch(torch.randint(8, (rows, 8), generator=draw), real, real & (torch.arange(8) > 0)))
    whole = [
        DemonstrationBatch(*(torch.cat(parts) for parts in zip(*batches[at : at + each], strict=True))) for at in range(0, len(sizes), each)
    ]

    def after(loader, **flags):
        module = stage(SupervisedPolicy, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.5))
        trainer(tmp_path, max_epochs=1, gradient_clip_val=0.2, **flags).fit(module, DataLoader(loader, batch_size=None))
        return weights(module)

    once, accumulated = after(whole), after(batches, accumulate_grad_batches=each)
    assert not equal(once, weights(stage(SupervisedPolicy)))
    for name, value in once.items():
        assert_close(accumulated[name], value, rtol=0, atol=1e-6)


def test_it_learns_the_demonstrations(tmp_path):
    module = stage(SupervisedPolicy, max_completion_length=6)
    run = trainer(tmp_path, max_steps=60)
    run.fit(module, data(preferences(tmp_path)))
    (figures,) = run.validate(module, data(preferences(tmp_path)), verbose=False)
    assert figures["val/loss"] < 1.0
    rows = [row for batch in run.predict(module, data(preferences(tmp_path))) for row in batch]
    text = "".join(response for row in rows for response in row["responses"])
    assert len(rows) == 16 and text.count("a") / len(text) > 0.9


def test_it_answers_under_bf16_true(tmp_path):
    rows = [
        row
        for batch in trainer(tmp_path, precision="bf16-true").predict(stage(SupervisedPolicy), data(preferences(tmp_path)))
        for row in batch
    ]
    assert len(rows) == 16 and all(row["responses"] for row in rows)


def test_validation_weighs_every_token_alike(tmp_path):
    """However the rows are cut into batches."""
    module, path = stage(SupervisedPolicy), preferences(tmp_path)
    (one,) = trainer(tmp_path).validate(module, data(path, val_batch_size=1, val_fraction=0.5), verbose=False)
    (all_at_once,) = trainer(tmp_path).validate(module, data(path, val_batch_size=100, val_fraction=0.5), verbose=False)
    assert one["val/loss"] == pytest.approx(all_at_once["val/loss"], rel=1e-5)
    (tested,) = trainer(tmp_path).test(module, data(path, val_fraction=0.5), verbose=False)
    assert tested["test/loss"] == pytest.approx(one["val/loss"], rel=1e-5)


@pytest.mark.parametrize("flags", [{"precision": "bf16-mixed"}, {"gradient_clip_val": 0.1}, {"fast_dev_run": True}], ids=str)
def test_trainer_flags_work(flags, tmp_path):
    module = stage(SupervisedPolicy)
    trainer(tmp_path, **{"max_steps": 2, **flags}).fit(module, data(preferences(tmp_path)))
    assert not equal(weights(module), weights(stage(SupervisedPolicy)))
