"""PreferenceDataModule: one data set, three views of it, for three stages of training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple, get_args

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import PreTrainedTokenizerBase

from p3o_lightning.batches import DemonstrationBatch, PairBatch, PromptBatch
from p3o_lightning.data_files import check_rows, described, fetch, is_hub_name, read_records
from p3o_lightning.data_formats import Unusable, View, normalise
from p3o_lightning.encoding import (
    Encoded,
    Encoder,
    TokenRows,
    collate_demonstrations,
    collate_pairs,
    collate_prompts,
    encode_prompt,
    encode_response,
)
from p3o_lightning.errors import InputError
from p3o_lightning.loaders import EndlessRows, LengthGroupedSampler, PositionedLoader

__all__ = ["DataReport", "PreferenceDataModule", "encode_prompt", "encode_response"]


class DataReport(NamedTuple):
    """What became of the rows, counted over `path` and `val_path`."""

    rows: int
    usable: int
    dropped: dict[str, int]  # reason -> rows
    train: int  # rows
    val: int  # rows

    def __str__(self) -> str:
        line = f"data: {self.rows:,} rows, {self.usable:,} usable"
        if self.train or self.val:  # none of them to predict
            line += f", {self.train:,} for training, {self.val:,} for validation"
        return f"{line}; dropped {self.rows - self.usable:,}: {_reasons(Counter(self.dropped))}" if self.dropped else line


class PreferenceDataModule(L.LightningDataModule):
    """Preference data as demonstrations (SFT), pairs (reward model) or prompts (P3O); one object serves the three stages in turn.

    Columns are TRL's: prompt + chosen + rejected, chosen + rejected (the prompt is what they share; hh-rlhf transcripts are understood),
    prompt + completion, messages, prompt, text; margin is optional beside chosen and rejected. A value is a text or a list of
    {"role", "content"} messages. After `setup()`, `report` says what was used and what was dropped, and why.

    Args:
        path: a .json, .jsonl, .csv or .parquet file (JSON may be gzipped), a folder of them, a saved `datasets` folder, or a hub name;
            in code also a datasets.Dataset or a list of rows, and so for val_path and predict_path.
        tokenizer: object, folder, hub name or "bytes"; None: the fitted module's.
        view: "demonstrations", "pairs" or "prompts"; None: what the fitted module consumes.
        batch_size: rows a batch on one device; training leaves out the last, partial batch.
        val_batch_size: rows a batch for validation, test and prediction; None: batch_size.
        max_length: tokens of prompt and longest reply together; longer rows are dropped and counted.
        max_prompt_length: tokens of the prompt, likewise; None: limited by max_length alone.
        columns: our column name -> the data's, e.g. {"prompt": "question"}.
        val_path: data for validation; None: a share of path.
        val_fraction: share of the distinct prompts kept for validation, in [0, 1); 0: no validation.
        predict_path: prompts to answer in `predict`; None: path.
        split: which split of a saved or hub dataset.
        chat: parse transcripts and plain prompts into messages and render them with the tokenizer's chat template.
        streaming: read training rows while training, without end: needs trainer.max_steps; not for prompts; validation by val_path only.
        num_workers: processes that prepare batches; a stream uses one at most.
        length_grouped: put rows of about one length into a batch, which saves padding.
        seed: of the split, the order and the steps.
    """

    report: DataReport | None = None

    def __init__(
        self,
        path: str | list[dict[str, Any]],
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        view: View | None = None,
        *,
        batch_size: int = 8,
        val_batch_size: int | None = None,
        max_length: int = 512,
        max_prompt_length: int | None = None,
        columns: dict[str, str] | None = None,
        val_path: str | list[dict[str, Any]] | None = None,
        val_fraction: float = 0.1,
        predict_path: str | list[dict[str, Any]] | None = None,
        split: str = "train",
        chat: bool = False,
        streaming: bool = False,
        num_workers: int = 0,
        length_grouped: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        path = str(path) if isinstance(path, Path) else path
        val_path, predict_path = (str(item) if isinstance(item, Path) else item for item in (val_path, predict_path))
        objects = {"tokenizer": tokenizer, "path": path, "val_path": val_path, "predict_path": predict_path}
        # objects stay out of the checkpoint, which must load with weights_only=True
        self.save_hyperparameters(logger=False, ignore=[name for name, item in objects.items() if not isinstance(item, str | None)])
        for name, rows in list(objects.items())[1:]:
            if not isinstance(rows, str | None):
                check_rows(rows, f"data.{name}", streaming)
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("val_batch_size", val_batch_size, 1),
            ("max_length", max_length, 2),
            ("max_prompt_length", max_prompt_length, 1),
            ("num_workers", num_workers, 0),
        ):
            if value is not None and value < least:
                raise InputError(f"data.{name} is {value}: choose {least} or more.")
        if not 0 <= val_fraction < 1:
            raise InputError(f"data.val_fraction is {val_fraction}: choose a share in [0, 1), e.g. 0.1, or 0 for no validation.")
        self.path, self.tokenizer, self.view, self.batch_size = path, tokenizer, view, batch_size
        self.val_batch_size = batch_size if val_batch_size is None else val_batch_size
        self.max_length, self.max_prompt_length, self.columns, self.chat = max_length, max_prompt_length, columns, chat
        self.val_path, self.val_fraction, self.predict_path, self.split = val_path, val_fraction, predict_path, split
        self.streaming, self.num_workers, self.length_grouped, self.seed = streaming, num_workers, length_grouped, seed
        self._train: tuple[TokenRows, list[int]] | None = None  # all rows, and which of them
        self._val: Subset[Encoded] | None = None
        self._predict: TokenRows | None = None
        self._prepared: tuple[Any, ...] | None = None  # what the last setup was for
        self._fingerprint: str | None = None

    def prepare_data(self) -> None:
        """Download what comes from the hub, once on each machine."""
        for field, path in (("path", self.path), ("val_path", self.val_path), ("predict_path", self.predict_path)):
            if isinstance(path, str) and is_hub_name(path) and not (self.streaming and field == "path"):
                fetch(path, self.split, f"data.{field}")

    def setup(self, stage: str | None = None) -> None:
        """Read, tokenise and split for `stage`: "fit" (also None), "validate", "test" or "predict".

        View and tokenizer are asked of the fitted module each time, where they are not given. Raises InputError for data of no use.
        """
        view: View = "prompts" if stage == "predict" else self._ask("view")
        source = self._ask("tokenizer")
        if self.streaming and view == "prompts" and stage != "predict":
            raise InputError("data.streaming is true, but rollouts need to know how many prompts there are: set data.streaming to false.")
        if self._prepared != (view, source, stage == "predict"):
            self._prepared = self._fingerprint = self._train = self._val = self._predict = None
            self._encoder = self._make_encoder(source, view)
            counts: Counter[str] = Counter()
            if stage == "predict":
                self._predict = self._read("path" if self.predict_path is None else "predict_path", counts)
            else:
                self._split_rows(counts)
            self.report = _report(counts, self._train_rows(), len(self._val or ()))
            self._prepared = (view, source, stage == "predict")
            streamed = self.streaming and stage != "predict"
            news = f"data: {described(self.path)} is streamed; {len(self._val or ()):,} rows for validation"
            rank_zero_info(news if streamed else str(self.report))
        if stage in ("fit", None):
            self._check_training()
        elif stage in ("validate", "test") and not self._val:
            because = "data.streaming is true" if self.streaming else f"data.val_fraction is {self.val_fraction}"
            raise InputError(f"{because} and data.val_path is not set, so no row is held out for it: set data.val_path.")

    def _ask(self, name: str) -> Any:
        """An argument, or the fitted module's attribute of that name."""
        if (value := getattr(self, name)) is not None:
            return value
        module = self.trainer and self.trainer.lightning_module
        if (value := getattr(module, name, None)) is not None:
            return value
        who = "there is no fitted module to ask" if module is None else f"{type(module).__name__} has no attribute {name!r}"
        example = '"pairs"' if name == "view" else "the folder or name of the model"
        raise InputError(f"data.{name} is not set, and {who}: set data.{name}, e.g. to {example}.")

    def _make_encoder(self, source: str | PreTrainedTokenizerBase, view: View) -> Encoder:
        if view not in get_args(View):
            raise InputError(f"data.view is {view!r}: choose one of {', '.join(get_args(View))}.")
        if isinstance(source, str):
            from p3o_lightning.tokenizers import load_tokenizer

            source = load_tokenizer(source)
        return Encoder(source, view, self.max_length, self.max_prompt_length, self.chat)

    def _read(self, name: str, counts: Counter[str]) -> TokenRows:
        """All usable rows of the argument `name`; counts the others by reason, and the usable ones under ""."""
        path, field = getattr(self, name), f"data.{name}"
        here: Counter[str] = Counter()

        def usable() -> Iterator[Encoded]:
            for row in self._encoder(normalise(read_records(path, self.split, field=field), self._encoder.view, self.columns, field)):
                here[row.reason if isinstance(row, Unusable) else ""] += 1
                if not isinstance(row, Unusable):
                    yield row

        rows = TokenRows(usable())
        counts.update(here)
        if not rows:
            raise InputError(
                f"{field} is {described(path)}, of whose {here.total():,} rows none can be used ({_reasons(here)}): {_fix(here)}."
            )
        return rows

    def _split_rows(self, counts: Counter[str]) -> None:
        held_out = None if self.val_path is None else self._read("val_path", counts)
        if held_out is not None:
            self._val = Subset(held_out, range(len(held_out)))
        if self.streaming:
            return
        rows = self._read("path", counts)
        self._fingerprint = rows.fingerprint()
        held: set[bytes] = set()
        if held_out is not None:
            if both := len(set(rows.keys) & set(held_out.keys)):
                rank_zero_warn(
                    f"{both:,} prompts of data.val_path {described(self.val_path or '')} are in data.path too: "
                    "validation is not on unseen prompts."
                )
        elif self.val_fraction > 0:
            if len(set(rows.keys)) < 2:
                raise InputError(
                    f"data.val_fraction is {self.val_fraction}, but {described(self.path)} has one usable prompt only, and no prompt may "
                    "be on both sides of the split: add prompts, set data.val_path, or set data.val_fraction to 0."
                )
            held = held_out_prompts(rows.keys, self.val_fraction, self.seed)
            self._val = Subset(rows, [index for index, key in enumerate(rows.keys) if key in held])
        self._train = rows, [index for index, key in enumerate(rows.keys) if key not in held]

    def _train_rows(self) -> int:
        return len(self._train[1]) if self._train else 0

    def _check_training(self) -> None:
        replicas, rows = self._replicas()["num_replicas"], self._train_rows()
        if self.streaming:
            if self.trainer is not None and self.trainer.max_steps < 0:
                raise InputError("data.streaming is true, so an epoch has no end: set trainer.max_steps, e.g. to 1000.")
        elif rows < self.batch_size * replicas:
            devices = f" on each of {replicas} devices" if replicas > 1 else ""
            raise InputError(
                f"data.batch_size is {self.batch_size}{devices}, but {described(self.path)} has {rows} rows for training, and the "
                f"last, partial batch is left out: set data.batch_size to {max(rows // replicas, 1)} or less, or add rows."
            )

    def _replicas(self) -> dict[str, int]:
        kwargs = self.trainer and self.trainer.distributed_sampler_kwargs
        return {"num_replicas": kwargs["num_replicas"], "rank": kwargs["rank"]} if kwargs else {"num_replicas": 1, "rank": 0}

    def train_dataloader(self) -> Any:
        """Batches of the view in an order that resumes exactly; the fitted module's `wrap_train_dataloader`, if any, has the last word."""
        # the generator: else every pass over a loader would draw from torch's own, and shift what follows
        common: dict[str, Any] = {"collate_fn": self._collate(), "generator": torch.Generator().manual_seed(self.seed), "drop_last": True}
        if self.streaming:
            open_rows = partial(_stream, self.path, self.split, self._replicas(), self._encoder, self.columns)
            stream = EndlessRows(open_rows, self.seed)
            loader = DataLoader(stream, batch_size=self.batch_size, num_workers=min(self.num_workers, 1), **common)
        else:
            rows, indices = self._train or (None, [])
            assert rows is not None
            sampler = LengthGroupedSampler(
                rows.lengths[indices],
                self.batch_size,
                grouped=self.length_grouped,
                shuffle=not getattr(self.trainer, "overfit_batches", 0),
                seed=self.seed,
                drop_last=True,
                **self._replicas(),
            )
            loader = DataLoader(Subset(rows, indices), batch_size=self.batch_size, sampler=sampler, num_workers=self.num_workers, **common)
        if self.trainer is None:
            return loader
        module = self.trainer.lightning_module
        wrap = getattr(module, "wrap_train_dataloader", None)
        return PositionedLoader(loader, module, self.seed) if wrap is None else wrap(loader)

    def val_dataloader(self) -> Any:
        """The rows held out, in the order of the data; no loader if there are none."""
        return self._in_order(self._val) if self._val else []

    def test_dataloader(self) -> Any:
        """The same rows as for validation."""
        return self.val_dataloader()

    def predict_dataloader(self) -> Any:
        """All prompts of `predict_path`, or of `path`."""
        assert self._predict is not None
        return self._in_order(self._predict)

    def _in_order(self, rows: Dataset[Encoded]) -> DataLoader[Encoded]:
        # without a sampler of ours, Lightning splits the rows among the ranks; to predict, it rebuilds the loader from its keywords
        generator = torch.Generator().manual_seed(self.seed)
        return DataLoader(
            rows, batch_size=self.val_batch_size, num_workers=self.num_workers, collate_fn=self._collate(), generator=generator
        )

    def _collate(self) -> Callable[[list[Encoded]], DemonstrationBatch | PairBatch | PromptBatch]:
        tokenizer = self._encoder.tokenizer
        # any id will do: what is padding is told by the masks
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        return partial(_COLLATE[self._encoder.view], pad=pad)

    def state_dict(self) -> dict[str, Any]:
        """A fingerprint of the rows, kept in checkpoints; the position is Lightning's."""
        return {"fingerprint": self._fingerprint}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Warn if the run that is resumed had other rows."""
        before = state_dict.get("fingerprint")
        if None not in (before, self._fingerprint) and before != self._fingerprint:
            rank_zero_warn(
                f"data.path is {described(self.path)}, whose rows are not those the checkpoint was trained on (other data, tokenizer or "
                "limits): the run goes on, but will not repeat the one that was interrupted."
            )


def held_out_prompts(keys: Iterable[bytes], fraction: float, seed: int) -> set[bytes]:
    """`fraction` of the distinct keys (one at least, never all), chosen by a hash of seed and key, whatever the order of the rows."""
    distinct = sorted(set(keys), key=lambda key: blake2b(key, key=str(seed).encode(), digest_size=16).digest())
    return set(distinct[: min(max(round(fraction * len(distinct)), 1), len(distinct) - 1)])


_COLLATE: dict[str, Callable[..., Any]] = {
    "demonstrations": collate_demonstrations,
    "pairs": collate_pairs,
    "prompts": collate_prompts,
}


def _stream(path: Any, split: str, replicas: dict[str, int], encoder: Encoder, columns: dict[str, str] | None) -> Iterator[Encoded]:
    records = read_records(path, split, streaming=True, rank=replicas["rank"], world_size=replicas["num_replicas"])
    rows = encoder(normalise(records, encoder.view, columns))
    return (row for row in rows if not isinstance(row, Unusable))


def _report(counts: Counter[str], train: int, val: int) -> DataReport:
    dropped = {reason: rows for reason, rows in counts.most_common() if reason}
    return DataReport(counts.total(), counts[""], dropped, train, val)


def _reasons(counts: Counter[str]) -> str:
    return ", ".join(f"{reason} {rows:,}" for reason, rows in counts.most_common() if reason)


def _fix(counts: Counter[str]) -> str:
    reason = max(counts, key=counts.__getitem__)
    if reason.startswith("over "):
        return f"raise data.{reason.removeprefix('over ')}, or shorten the rows"
    if "chat template" in reason:
        return "choose a data.tokenizer with another chat template"
    return "mend the rows, or name the right columns in data.columns"
