"""Stage 2: a scalar reward learned from comparisons (Bradley-Terry)."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from p3o_lightning.batches import PairBatch
from p3o_lightning.errors import InputError
from p3o_lightning.metrics import PairReport
from p3o_lightning.models import ModelSource, load_reward_backbone
from p3o_lightning.objectives import bradley_terry_loss
from p3o_lightning.scoring import grouped_scores
from p3o_lightning.stage import Stage
from p3o_lightning.tokenizers import distinct_pad_token


class RewardModel(Stage):
    """A scalar reward learned from comparisons: P(chosen beats rejected) = sigmoid(r(chosen) - r(rejected)).

    Args:
        model: hub name, transformers folder, GGUF file, checkpoint of ours, or a from-scratch config; a causal model gets a scalar head.
        tokenizer: folder, hub name, object, or "bytes"; None takes the model's.
        peft_config: fields of peft.LoraConfig, e.g. {r: 16, lora_alpha: 32}; the head is trained in full. None trains all weights.
        dtype: weights as float32, bfloat16, float16, or auto (as stored).
        torch_compile: compile the layers when fitting, for training and scoring: pays in long runs.
        label_smoothing: share of labels taken to be wrong, in [0, 0.5).
        center_coef: weight of (r(chosen) + r(rejected))^2, which keeps rewards near 0; 0 = off, 0.01 is usual.
        lr: learning rate of the default AdamW.
        optimizer: factory called with the trainable parameters; None is AdamW(lr, betas=(0.9, 0.95)).
        lr_scheduler: factory called with the optimizer; stepped once an update.
    """

    view = "pairs"

    def __init__(
        self,
        model: ModelSource,
        *,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        peft_config: dict[str, Any] | Any | None = None,
        dtype: str = "float32",
        torch_compile: bool = False,
        label_smoothing: float = 0.0,
        center_coef: float = 0.0,
        lr: float = 1e-5,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        arguments = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        if not 0 <= label_smoothing < 0.5:
            raise InputError(f"model.label_smoothing is {label_smoothing}: choose the share of wrong labels, in [0, 0.5), e.g. 0.1.")
        if not center_coef >= 0:
            raise InputError(f"model.center_coef is {center_coef}: choose 0 (off) or a weight above it, e.g. 0.01.")
        super().__init__(
            model,
            load_reward_backbone,
            tokenizer=tokenizer,
            peft_config=peft_config,
            dtype=dtype,
            torch_compile=torch_compile,
            lr=lr,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            arguments=arguments,
        )
        self.label_smoothing, self.center_coef = label_smoothing, center_coef
        self.report = PairReport()

    def prepare_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
        """A padding id that differs from EOS: transformers pools the exported model by it."""
        return distinct_pad_token(tokenizer)

    def forward(self, batch: PairBatch) -> Float[Tensor, "pair 2"]:
        """Rewards of the chosen and the rejected response of every pair, in one forward."""
        return grouped_scores(self.model, batch.tokens.flatten(0, 1), batch.attention_mask.flatten(0, 1), 2).view(-1, 2)

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        """Bradley-Terry loss of the batch."""
        chosen, rejected = self(batch).unbind(1)
        terms = bradley_terry_loss(
            chosen, rejected, margin=batch.margin, label_smoothing=self.label_smoothing, center_coef=self.center_coef
        )
        figures = self.over_processes({"loss": terms.loss, "accuracy": terms.accuracy, "margin": terms.margin})
        self.log_dict(figures, prog_bar=True)
        return terms.loss

    def validation_step(self, batch: PairBatch, batch_idx: int) -> None:
        """`val/accuracy`, `val/log_loss` and the rest of PairReport, each pair counted once."""
        self.report.update(self(batch), batch.response_lengths)

    def on_validation_epoch_end(self) -> None:
        """Write the report of the whole validation set."""
        self._log_report("val")

    def test_step(self, batch: PairBatch, batch_idx: int) -> None:
        """`test/...`, as in validation."""
        self.report.update(self(batch), batch.response_lengths)

    def on_test_epoch_end(self) -> None:
        """Write the report of the whole test set."""
        self._log_report("test")

    def _log_report(self, stage: str) -> None:
        figures = self.report.compute()
        self.report.reset()
        self.log_dict({f"{stage}/{name}": value.float() for name, value in figures.items()}, sync_dist=True)
