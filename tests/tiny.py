"""What the module tests share: a language of eight letters, models of a few thousand weights, quiet trainers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.loggers import Logger
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from p3o_lightning import PairwisePolicy
from p3o_lightning.batches import PromptBatch
from p3o_lightning.callbacks import LastCheckpoint
from p3o_lightning.sequences import pad_left

LETTERS = "abcdefgh"
LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64, "initializer_range": 0.2}  # dropout 0.1
PROMPTS = ["a", "bc", "defg", "hh", "bad", "c", "fed", "gag", "ha", "beg", "da", "e"]


def letters(pad: str = "<pad>") -> PreTrainedTokenizerFast:
    """One token a letter, then <eos> and <pad>; letters("<eos>") pads with EOS."""
    vocabulary = {word: index for index, word in enumerate([*LETTERS, "<eos>", "<pad>"])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token=pad, clean_up_tokenization_spaces=False)


def share_of_a(completions: list[Any], **_: Any) -> list[float]:
    """The best answer is known: nothing but "a"."""
    texts = [text if isinstance(text, str) else text[-1]["content"] for text in completions]
    return [text.count("a") / max(len(text), 1) for text in texts]


def collate(prompts: list[str]) -> PromptBatch:
    tokens, mask = pad_left([letters()(prompt)["input_ids"] for prompt in prompts], 9)
    return PromptBatch(tokens, mask, list(prompts), {"number": [len(prompt) for prompt in prompts]})


def prompts(batch_size: int = 4, shuffle: bool = False, count: int = len(PROMPTS), **options: Any) -> DataLoader:
    return DataLoader(PROMPTS[:count], batch_size=batch_size, shuffle=shuffle, collate_fn=collate, **options)  # type: ignore[arg-type]


def policy(owner: type[PairwisePolicy] = PairwisePolicy, **settings: Any) -> PairwisePolicy:
    torch.manual_seed(0)  # of the weights
    given = {"model": LLAMA, "reward_funcs": share_of_a, "tokenizer": letters(), "max_completion_length": 5, "lr": 1e-2, **settings}
    return owner(**given)


def trainer(root: Any, **settings: Any) -> L.Trainer:
    given = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(item, L.callbacks.Checkpoint) for item in settings.get("callbacks", [])),
        "num_sanity_val_steps": 0,
        "default_root_dir": str(root),
        **settings,
    }
    return L.Trainer(**given)


def weights(module: L.LightningModule) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def preferences(folder: Path, rows: int = 16) -> Path:
    """Comparisons that prefer "a", with as many distinct prompts; some replies are longer than others."""
    path = Path(folder) / "preferences.jsonl"
    pick = [LETTERS[(3 * row) % 8] + LETTERS[row // 8] for row in range(rows)]
    lines = [
        {"prompt": prompt, "chosen": "a" * (1 + row % 4), "rejected": "hg"[row % 2] * (1 + row % 3)} for row, prompt in enumerate(pick)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


class Recorder(Logger):
    """Keeps what is logged: rows of (step, metrics)."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []

    name = "recorder"  # type: ignore[assignment]
    version = 0  # type: ignore[assignment]

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert step is not None
        self.rows.append((step, {name: float(value) for name, value in metrics.items() if name != "epoch"}))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def rollouts(self) -> list[tuple[int, str]]:
        """Step and figures of every rollout, as text: equal text, equal bits."""
        return [(step, json.dumps(row, sort_keys=True)) for step, row in self.rows if "objective/kl" in row]


class KeepAll(LastCheckpoint):
    """Keeps a copy of every last.ckpt, and what Lightning saves at the end of an epoch and of a validation."""

    def __init__(self, folder: Path) -> None:
        super().__init__(every_n_steps=1)
        self.folder, self.kept = folder, []
        folder.mkdir()

    def _next(self) -> Path:
        self.kept.append(self.folder / f"{len(self.kept)}.ckpt")
        return self.kept[-1]

    def save(self, trainer):
        super().save(trainer)
        shutil.copy(self.path(trainer), self._next())

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.save_checkpoint(self._next())

    def on_validation_end(self, trainer, pl_module):
        if self.updated:
            trainer.save_checkpoint(self._next())
