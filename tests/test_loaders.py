"""The order of training rows, and exact resume: a run that is killed anywhere and resumed ends with the very same weights."""

import pickle
from pathlib import Path

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from torch import nn
from torch.utils.data import DataLoader, Dataset

from p3o_lightning.encoding import Encoded
from p3o_lightning.errors import InputError
from p3o_lightning.loaders import EndlessRows, LengthGroupedSampler, PositionedLoader

ROWS = 12


def lengths_of(rows: int) -> np.ndarray:
    return np.random.default_rng(0).integers(1, 100, rows)


# ---- the sampler ----


@given(rows=st.integers(1, 60), batch_size=st.integers(1, 5), ranks=st.integers(1, 4), shuffle=st.booleans(), drop_last=st.booleans())
def test_ranks_share_the_rows_and_take_the_same_number_of_batches(rows, batch_size, ranks, shuffle, drop_last):
    lengths = lengths_of(rows)
    samplers = [
        LengthGroupedSampler(lengths, batch_size, num_replicas=ranks, rank=rank, shuffle=shuffle, seed=3, drop_last=drop_last)
        for rank in range(ranks)
    ]
    shares = [list(sampler) for sampler in samplers]
    assert {len(share) for share in shares} == {len(samplers[0])}
    assert len(samplers[0]) % batch_size == 0
    drawn = [row for share in shares for row in share]
    if drop_last:
        assert len(set(drawn)) == len(drawn) == rows // (batch_size * ranks) * batch_size * ranks
    else:
        assert set(drawn) == set(range(rows)), "every row is there; a few fill the last batches"


def test_a_batch_holds_rows_of_about_one_length_on_all_ranks():
    lengths = lengths_of(512)

    def padding(grouped: bool) -> float:
        ranks = [
            list(LengthGroupedSampler(lengths, 8, grouped=grouped, num_replicas=2, rank=rank, seed=1, drop_last=True)) for rank in range(2)
        ]
        batches = lengths[np.array(ranks)].reshape(2, -1, 8)
        assert not grouped or np.abs(batches.mean(-1)[0] - batches.mean(-1)[1]).max() < 5, "no rank waits for another's longer rows"
        longest = batches.max(-1, keepdims=True)
        return float((longest - batches).sum() / (longest.sum() * 8))

    assert padding(grouped=True) < padding(grouped=False) / 3


def test_the_order_depends_on_seed_and_epoch_alone():
    def order(seed: int, epoch: int) -> list[int]:
        sampler = LengthGroupedSampler(lengths_of(64), 4, num_replicas=1, rank=0, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_start_leaves_out_the_first_batches():
    sampler = LengthGroupedSampler(lengths_of(20), 3, num_replicas=2, rank=1, seed=0, drop_last=True)
    whole = list(sampler)
    sampler.start = 2
    assert list(sampler) == whole[6:]


def test_without_shuffling_the_order_is_that_of_the_data():
    sampler = LengthGroupedSampler(lengths_of(7), 2, num_replicas=1, rank=0, shuffle=False, drop_last=True)
    assert list(sampler) == [0, 1, 2, 3, 4, 5]


# ---- streams ----


def encoded(number: int) -> Encoded:
    return Encoded(np.array([number], dtype=np.int32), (), None, b"", "", {})


class Numbers:
    """A stream of the numbers below `rows`; picklable, as a worker process needs it."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __call__(self):
        return (encoded(number) for number in range(self.rows))


def test_a_stream_goes_round_without_end_in_another_order_each_time():
    rows = iter(EndlessRows(Numbers(50), seed=1))
    passes = [[int(next(rows).prompt[0]) for _ in range(50)] for _ in range(3)]
    assert all(sorted(numbers) == list(range(50)) for numbers in passes)
    assert len(set(map(tuple, passes))) == 3
    assert passes[0] == [int(row.prompt[0]) for row, _ in zip(EndlessRows(Numbers(50), seed=1), range(50), strict=False)]


def test_a_long_stream_is_shuffled_within_its_buffer():
    rows = iter(EndlessRows(Numbers(5000), seed=0))
    numbers = [int(next(rows).prompt[0]) for _ in range(5000)]
    assert sorted(numbers) == list(range(5000))
    assert numbers != sorted(numbers)


def test_a_stream_without_a_usable_row_stops():
    with pytest.raises(InputError, match=r"data\.path has no usable row in its stream: set data\.streaming to false"):
        next(iter(EndlessRows(Numbers(0))))


# ---- exact resume ----


class Watched(Dataset):
    """Rows of one number each, that remember which of them were read."""

    def __init__(self) -> None:
        self.read: list[int] = []

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> torch.Tensor:
        self.read.append(index)
        return torch.full((4,), float(index + 1)) / ROWS


def stack_prompts(rows: list[Encoded]) -> torch.Tensor:
    return torch.tensor([[float(row.prompt[0] + 1)] * 4 for row in rows]) / ROWS


class Tiny(L.LightningModule):
    """Two weights and dropout: a batch that is missing, repeated or dropped out in another way shows in the last bit."""

    def __init__(self, streamed: bool = False, validated: bool = False, estimate: bool = False, fail_at: int = -1) -> None:
        super().__init__()
        self.layer, self.dropout = nn.Linear(4, 2), nn.Dropout(0.5)
        self.streamed, self.validated, self.estimate, self.fail_at = streamed, validated, estimate, fail_at
        self.rows = Watched()
        self.seen: list[tuple[int, list[float]]] = []

    def train_dataloader(self):
        if self.streamed:
            inner = DataLoader(EndlessRows(Numbers(7), seed=5), 3, collate_fn=stack_prompts)
        else:
            sampler = LengthGroupedSampler(lengths_of(ROWS), 3, num_replicas=1, rank=0, seed=5, drop_last=True)
            inner = DataLoader(self.rows, 3, sampler=sampler, drop_last=True)
        return PositionedLoader(inner, self, seed=7)

    def val_dataloader(self):
        return DataLoader(self.rows, 3) if self.validated else []

    def validation_step(self, batch, batch_idx):
        torch.rand(3)  # a validation that draws random numbers must not change the training

    def training_step(self, batch, batch_idx):
        if self.global_step == self.fail_at:
            raise KeyboardInterrupt
        self.seen.append((self.global_step, batch[:, 0].tolist()))
        return (self.layer(self.dropout(batch)) - 1).square().mean()

    def configure_optimizers(self):
        if self.estimate:  # makes Lightning build the loader before it restores the position
            assert self.trainer.estimated_stepping_batches > 0
        return torch.optim.Adam(self.parameters(), 0.05)


def fit(folder: Path, options: dict, limits: dict, checkpoint: Path | None = None) -> Tiny:
    torch.manual_seed(0 if checkpoint is None else 99)
    module = Tiny(**options)
    # at every step, and at the end of every epoch
    savers: list[L.Callback] = [
        ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=1, save_on_train_epoch_end=False),
        ModelCheckpoint(folder, filename="{epoch}-end", save_top_k=-1, save_on_train_epoch_end=True),
    ]
    if "fail_at" in options:
        savers.append(OnExceptionCheckpoint(folder, filename="interrupted"))
    trainer = L.Trainer(
        accelerator="cpu",
        callbacks=savers if checkpoint is None else [],
        enable_checkpointing=checkpoint is None,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **limits,
    )
    trainer.fit(module, ckpt_path=checkpoint)
    return module


@pytest.mark.filterwarnings("ignore:.*(num_workers|bottleneck|val_dataloader|validation_step|logging interval|sanity).*")
@pytest.mark.parametrize(
    ("options", "limits"),
    [
        ({}, {"max_epochs": 2}),
        ({"validated": True}, {"max_epochs": 2, "val_check_interval": 2}),
        ({"estimate": True}, {"max_steps": 7}),
        ({}, {"max_steps": 8}),
        ({}, {"max_epochs": 3, "limit_train_batches": 3}),
        ({}, {"max_epochs": 2, "accumulate_grad_batches": 2}),
        ({"streamed": True}, {"max_steps": 6}),
        ({"streamed": True, "validated": True, "estimate": True}, {"max_steps": 6, "max_epochs": 5, "val_check_interval": 3}),
        ({"streamed": True}, {"max_steps": 6, "limit_train_batches": 2}),
    ],
    ids=str,
)
def test_resuming_from_any_checkpoint_gives_the_weights_of_the_uninterrupted_run(tmp_path, options, limits):
    whole = fit(tmp_path, options, limits)
    checkpoints = sorted(tmp_path.glob("*.ckpt"))
    assert len(checkpoints) >= 6
    for checkpoint in checkpoints:
        resumed = fit(tmp_path, options, limits, checkpoint)
        assert resumed.global_step == whole.global_step, checkpoint.name
        for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
            assert torch.equal(one, other), checkpoint.name
        assert resumed.seen == whole.seen[len(whole.seen) - len(resumed.seen) :], checkpoint.name


@pytest.mark.parametrize("streamed", [False, True])
def test_a_run_interrupted_within_a_step_takes_that_step_again(tmp_path, streamed):
    limits = {"max_steps": 7}
    whole = fit(tmp_path / "whole", {"streamed": streamed}, limits)
    with pytest.raises(SystemExit):
        fit(tmp_path, {"streamed": streamed, "fail_at": 5}, limits)
    resumed = fit(tmp_path, {"streamed": streamed}, limits, tmp_path / "interrupted.ckpt")
    assert [step for step, _ in resumed.seen] == [5, 6]
    assert all(torch.equal(one, other) for one, other in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_rows_of_skipped_batches_are_not_read(tmp_path):
    whole = fit(tmp_path, {}, {"max_epochs": 1})
    resumed = fit(tmp_path, {}, {"max_epochs": 1}, tmp_path / "step=3.ckpt")
    assert resumed.rows.read == whole.rows.read[9:]


def test_the_wrapper_shows_lightning_no_sampler_and_no_dataset():
    loader = Tiny().train_dataloader()
    assert len(loader) == ROWS // 3
    assert not hasattr(loader, "sampler") and not hasattr(loader, "dataset"), "Lightning would build it again for overfit_batches"
    assert loader.state_dict() == {}
    assert len(pickle.loads(pickle.dumps(loader))) == ROWS // 3
