"""Stage 1: supervised fine-tuning on demonstrations."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torch.optim import Optimizer
from torchmetrics import MeanMetric
from transformers import PreTrainedTokenizerBase

from p3o_lightning.batches import DemonstrationBatch, PromptBatch
from p3o_lightning.generation import Sampling
from p3o_lightning.models import ModelSource, load_policy
from p3o_lightning.rollouts import answers
from p3o_lightning.scoring import unpadded_text_logps
from p3o_lightning.seeds import mix
from p3o_lightning.stage import Stage


class SupervisedPolicy(Stage):
    """A policy fine-tuned on demonstrations: cross-entropy on the response tokens, EOS included.

    Args:
        model: hub name, transformers folder, GGUF file, checkpoint of ours, or a from-scratch config such as {model_type: llama, ...}.
        tokenizer: folder, hub name, object, or "bytes"; None takes the model's.
        peft_config: fields of peft.LoraConfig, e.g. {r: 16, lora_alpha: 32}; None trains all weights.
        dtype: weights as float32, bfloat16, float16, or auto (as stored).
        torch_compile: compile the layers when fitting, for training and scoring: pays in long runs.
        lr: learning rate of the default AdamW.
        optimizer: factory called with the trainable parameters; None is AdamW(lr, betas=(0.9, 0.95)).
        lr_scheduler: factory called with the optimizer; stepped once an update.
        max_completion_length: tokens a sampled response may have (predict).
        temperature: of sampled responses (predict).
        seed: of sampled responses (predict).
    """

    view = "demonstrations"

    def __init__(
        self,
        model: ModelSource,
        *,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        peft_config: dict[str, Any] | Any | None = None,
        dtype: str = "float32",
        torch_compile: bool = False,
        lr: float = 2e-5,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        max_completion_length: int = 64,
        temperature: float = 1.0,
        seed: int = 0,
    ) -> None:
        arguments = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__(
            model,
            load_policy,
            tokenizer=tokenizer,
            peft_config=peft_config,
            dtype=dtype,
            torch_compile=torch_compile,
            lr=lr,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            arguments=arguments,
        )
        self.report = MeanMetric()  # weighted by tokens; self.log rounds such weights over several processes
        self._counts: dict[int, Tensor] = {}  # response tokens of the batches that the next update is made of, by index
        self.sampling = Sampling(1, max_completion_length, temperature)
        self.seed = seed

    def token_loss(self, batch: DemonstrationBatch) -> tuple[Tensor, Tensor]:
        """Summed cross-entropy of the response tokens, in nats, and their number."""
        logps = unpadded_text_logps(self.model, batch.tokens, batch.attention_mask, batch.response_mask)
        return -logps.sum(), batch.response_mask.sum()

    def training_step(self, batch: DemonstrationBatch, batch_idx: int) -> Tensor:
        """Mean cross-entropy per response token; over all batches of the update, once `on_before_optimizer_step` has seen them."""
        total, count = self.token_loss(batch)
        # the processes' gradients are averaged: with the mean of their token counts, every token weighs the same on all of them
        count = self.trainer.strategy.reduce(count.float(), reduce_op="mean")
        self.log_dict(self.over_processes({"loss": total / count}), prog_bar=True)
        accumulate = self.trainer.accumulate_grad_batches
        if batch_idx % accumulate == 0:
            self._counts = {}
        self._counts[batch_idx] = count
        return total / self._first_count * accumulate  # by which Lightning divides

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """The gradient is of the sum over all tokens by the first batch's number of them: make it of the mean, as of one large batch."""
        if self.trainer.accumulate_grad_batches == 1:
            return
        share = self._first_count / torch.stack(list(self._counts.values())).sum()
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(share)

    @property
    def _first_count(self) -> Tensor:
        return next(iter(self._counts.values()))

    def validation_step(self, batch: DemonstrationBatch, batch_idx: int) -> None:
        """`val/loss`: nats per response token over the whole set, each token counted once."""
        self.report.update(*self._mean_loss(batch))

    def on_validation_epoch_end(self) -> None:
        """Write the loss of the whole validation set."""
        self._log_report("val/loss")

    def test_step(self, batch: DemonstrationBatch, batch_idx: int) -> None:
        """`test/loss`, as in validation."""
        self.report.update(*self._mean_loss(batch))

    def on_test_epoch_end(self) -> None:
        """Write the loss of the whole test set."""
        self._log_report("test/loss")

    def _mean_loss(self, batch: DemonstrationBatch) -> tuple[Tensor, Tensor]:
        total, count = self.token_loss(batch)
        return total / count, count

    def _log_report(self, name: str) -> None:
        loss = self.report.compute()
        self.report.reset()
        self.log(name, loss.float(), prog_bar=True, sync_dist=True)

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        """One sampled response for each prompt: rows {"prompt", "responses"}."""
        return answers(self, batch, self.sampling, mix(self.seed, batch_idx))
