"""Loaders that resume exactly: the position is Lightning's own, and every step has a seed of its own."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import count, islice
from typing import Any

import lightning.pytorch as L
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from p3o_lightning.encoding import Encoded
from p3o_lightning.errors import InputError
from p3o_lightning.seeds import mix

_WINDOW = 8  # batches whose rows are sorted by length together: most of the padding is saved, most of the shuffling is kept
_BUFFER = 1024  # rows of a stream among which the next one is drawn


class LengthGroupedSampler(DistributedSampler[Any]):
    """Indices of one rank, so that a batch holds rows of about one length, and all ranks hold about that length at the same step.

    Grouping is done here, not in a batch sampler: Lightning leaves a DistributedSampler as it is under every strategy, and refuses a batch
    sampler of its user's. The order is a function of (seed, epoch); `set_epoch` sets the epoch, `start` the batches of it to leave out.

    Args:
        lengths: tokens of every row.
        batch_size: rows a batch on one rank.
        grouped: False shuffles only.
        options: DistributedSampler's: num_replicas, rank, shuffle, seed, drop_last. What drop_last keeps is whole batches on every rank;
            without it, the last batches are filled with rows of the first.
    """

    def __init__(self, lengths: NDArray[Any], batch_size: int, *, grouped: bool = True, **options: Any) -> None:
        super().__init__(lengths, **options)  # type: ignore[arg-type]  # asked for its length only
        self.lengths, self.batch_size, self.grouped = lengths, batch_size, grouped
        self.start = 0

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(mix(self.seed, self.epoch))
        rows, step = len(self.lengths), self.batch_size * self.num_replicas
        order = torch.randperm(rows, generator=generator).tolist() if self.shuffle else list(range(rows))
        if self.shuffle and self.grouped:
            windows = (order[begin : begin + step * _WINDOW] for begin in range(0, rows, step * _WINDOW))
            order = [row for window in windows for row in sorted(window, key=lambda row: -self.lengths[row])]
        total = self._steps() * step
        order = (order * -(-total // max(rows, 1)))[:total]
        batches = [order[begin : begin + step] for begin in range(0, total, step)]
        if self.shuffle:
            batches = [batches[index] for index in torch.randperm(len(batches), generator=generator).tolist()]
        return iter([row for batch in batches[self.start :] for row in batch[self.rank :: self.num_replicas]])

    def __len__(self) -> int:
        return self._steps() * self.batch_size

    def _steps(self) -> int:
        rows, step = len(self.lengths), self.batch_size * self.num_replicas
        return rows // step if self.drop_last else -(-rows // step)


class PositionedLoader:
    """A training loader that starts where Lightning's own progress is, so that a killed run goes on with the very next batch.

    Lightning resumes a plain DataLoader at the beginning of its epoch. Here the position is asked at the first `next()`, when Lightning has
    restored it, and torch is seeded before every batch, so that dropout repeats too. A stream has no length: its epoch is the whole run,
    `max_steps` long, which also keeps Lightning from fetching ahead of the position.

    Args:
        inner: a DataLoader, with a LengthGroupedSampler or over a stream.
        module: the module that is fitted.
        seed: of all steps.
    """

    def __init__(self, inner: DataLoader[Any], module: L.LightningModule, seed: int = 0) -> None:
        self.inner, self.module, self.seed = inner, module, seed
        self._streamed = isinstance(inner.dataset, IterableDataset)

    def __len__(self) -> int:
        if not self._streamed:
            return len(self.inner)
        return self.module.trainer.max_steps * self.module.trainer.accumulate_grad_batches

    def __iter__(self) -> Iterator[Any]:
        trainer = self.module.trainer
        start, epoch = trainer.fit_loop.batch_idx + 1, trainer.current_epoch
        if start >= min(len(self), trainer.num_training_batches):
            return  # Lightning asks for one batch too many when it resumes at the end of an epoch
        if self._streamed:
            # the stream runs through all epochs, if limit_train_batches makes several of them
            epoch, start = 0, trainer.fit_loop.epoch_loop.batch_progress.total.completed
            batches: Iterator[Any] = islice(self.inner, start, None)
        else:
            sampler: Any = self.inner.sampler
            sampler.set_epoch(epoch)
            sampler.start = start
            batches = iter(self.inner)
        for step in count(start):
            batch = next(batches, None)
            if batch is None:
                return
            torch.manual_seed(mix(self.seed, epoch, step, trainer.global_rank))
            yield batch

    # Lightning warns that a loader without these cannot resume; there is nothing to keep.
    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class EndlessRows(IterableDataset[Encoded]):
    """Rows of a stream, shuffled within a buffer, again and again: ranks whose shares differ in size would else wait for each
    other for ever at the end.

    Args:
        open_rows: opens the stream at its beginning.
        seed: the order is a function of (seed, pass).
    """

    def __init__(self, open_rows: Callable[[], Iterator[Encoded]], seed: int = 0) -> None:
        self.open_rows, self.seed = open_rows, seed

    def __iter__(self) -> Iterator[Encoded]:
        rows = 0
        for number in count():
            draw = random.Random(mix(self.seed, number))
            buffer: list[Encoded] = []
            for row in self.open_rows():
                rows += 1
                if len(buffer) < _BUFFER:
                    buffer.append(row)
                    continue
                index = draw.randrange(_BUFFER)
                buffer[index], row = row, buffer[index]
                yield row
            if rows == 0:
                raise InputError("data.path has no usable row in its stream: set data.streaming to false to see what was dropped, and why.")
            draw.shuffle(buffer)
            yield from buffer
