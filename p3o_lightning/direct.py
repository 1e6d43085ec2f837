"""A control beside the pipeline: a policy trained on the comparisons themselves (DPO), without a reward model and without sampling."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, Literal

import torch
from jaxtyping import Float
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torchmetrics import MeanMetric
from transformers import PreTrainedTokenizerBase

from p3o_lightning.baselines import DirectTerms, direct_preference_loss
from p3o_lightning.batches import PairBatch, PromptBatch
from p3o_lightning.errors import InputError
from p3o_lightning.forwards import accepts, eval_mode, positions_of, precise, turn_dropout_off
from p3o_lightning.generation import Sampling
from p3o_lightning.models import ModelSource, load_policy
from p3o_lightning.reference import ReferencedPolicy
from p3o_lightning.rollouts import answers
from p3o_lightning.seeds import mix


class DirectPreferencePolicy(ReferencedPolicy):
    """A policy trained on comparisons alone (DPO): its log-odds against a frozen reference are the reward.

    The reference is a frozen copy of the policy as it starts; with LoRA, the policy with its adapter switched off.

    Args:
        model: hub name, transformers folder, GGUF file, checkpoint of ours, or a from-scratch config such as {model_type: llama, ...};
            best one that has seen the data's kind of reply: a SupervisedPolicy's export.
        reference: model source of the reference; None copies the policy as it is when it is first fitted or evaluated.
        loss_type: "sigmoid" (DPO) or "ipo", which regresses to a fixed lead, log-probabilities averaged over tokens.
        beta: price of leaving the reference: nats of log-odds count beta in the reward.
        label_smoothing: sigmoid: share of labels taken to be wrong, in [0, 0.5).
        disable_dropout: keep dropout off in training too, so that policy and reference start equal.
        tokenizer: folder, hub name, object, or "bytes"; None takes the model's.
        peft_config: fields of peft.LoraConfig, e.g. {r: 16, lora_alpha: 32}; None trains all weights.
        dtype: weights of policy and reference: float32, bfloat16, float16, or auto (as stored).
        torch_compile: compile the layers when fitting, for training and scoring: pays in long runs.
        lr: learning rate of the default AdamW.
        optimizer: factory called with the trainable parameters; None is AdamW(lr, betas=(0.9, 0.95)).
        lr_scheduler: factory called with the optimizer; stepped once an update.
        max_completion_length: tokens a sampled response may have (predict).
        temperature: of sampled responses (predict).
        seed: of sampled responses (predict).
    """

    view = "pairs"

    def __init__(
        self,
        model: ModelSource,
        *,
        reference: ModelSource | None = None,
        loss_type: Literal["sigmoid", "ipo"] = "sigmoid",
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        disable_dropout: bool = True,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        peft_config: dict[str, Any] | Any | None = None,
        dtype: str = "float32",
        torch_compile: bool = False,
        lr: float = 1e-6,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        max_completion_length: int = 64,
        temperature: float = 1.0,
        seed: int = 0,
    ) -> None:
        arguments = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        _check(loss_type, beta, label_smoothing)
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
        self.keep_reference(reference, dtype)
        if disable_dropout:
            turn_dropout_off(self.model)
        self.loss_type, self.beta, self.label_smoothing = loss_type, beta, label_smoothing
        self.sampling, self.seed = Sampling(1, max_completion_length, temperature), seed
        self.report = nn.ModuleDict({name: MeanMetric() for name in _figures(DirectTerms(*[torch.zeros(())] * 5))})

    def loss(self, batch: PairBatch) -> DirectTerms:
        """DPO's (or IPO's) loss of the batch, the mean over its pairs."""
        with torch.no_grad(), self._as_reference():
            ref_logps = pair_logps(self.reference, batch)
        return direct_preference_loss(
            pair_logps(self.model, batch),
            ref_logps,
            batch.response_lengths,
            loss_type=self.loss_type,
            beta=self.beta,
            label_smoothing=self.label_smoothing,
        )

    def _as_reference(self) -> AbstractContextManager[Any]:
        """Inside, `self.reference` is what its name says: with LoRA it is the policy, dropout and adapter off."""
        if not self.adapter_is_policy:
            return nullcontext()
        stack = ExitStack()
        stack.enter_context(eval_mode(self.model))
        stack.enter_context(self.model.disable_adapter())
        return stack

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        """The loss of the batch."""
        terms = self.loss(batch)
        figures = self.over_processes(_figures(terms))
        self.log_dict({name: figures.pop(name) for name in ("loss", "rewards/accuracies")}, prog_bar=True)
        self.log_dict(figures)
        return terms.loss

    # ---- evaluation

    def validation_step(self, batch: PairBatch, batch_idx: int) -> None:
        """`val/loss`, `val/rewards/accuracies`, ...: over the whole set, each pair counted once."""
        figures = _figures(self.loss(batch))
        for name, metric in self._reports():
            metric.update(figures[name], len(batch.tokens))

    def on_validation_epoch_end(self) -> None:
        """Write the figures of the whole validation set."""
        self._log_report("val")

    def test_step(self, batch: PairBatch, batch_idx: int) -> None:
        """`test/...`, as in validation."""
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """Write the figures of the whole test set."""
        self._log_report("test")

    def _log_report(self, stage: str) -> None:
        for name, metric in self._reports():
            self.log(f"{stage}/{name}", metric.compute().float(), sync_dist=True)
            metric.reset()

    def _reports(self) -> list[tuple[str, Any]]:
        return list(self.report.items())

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        """One sampled response for each prompt: rows {"prompt", "responses"}."""
        return answers(self, batch, self.sampling, mix(self.seed, batch_idx))


def pair_logps(model: Any, batch: PairBatch) -> Float[Tensor, "pair 2"]:
    """Nats of the chosen and the rejected response of every pair, each a plain sum over its tokens, EOS included; in float32 at least."""
    tokens, attention = batch.tokens.flatten(0, 1), batch.attention_mask.flatten(0, 1)
    options: dict[str, Any] = {"attention_mask": attention.long(), "use_cache": False}
    if accepts(model, "position_ids"):
        options["position_ids"] = positions_of(attention)
    logits = model(input_ids=tokens, **options).logits[:, :-1]
    ends = attention.sum(-1, keepdim=True)
    place = torch.arange(1, tokens.shape[1], device=tokens.device)  # position t predicts token t + 1
    scored = (place >= ends - batch.response_lengths.view(-1, 1)) & (place < ends)
    chosen = precise(logits[scored])  # the responses' positions alone: a prompt's logits are as large, and not needed
    logps = chosen.gather(-1, tokens[:, 1:][scored].unsqueeze(-1)).squeeze(-1) - chosen.logsumexp(-1)
    rows = scored.nonzero()[:, 0]
    return torch.zeros(len(tokens), dtype=logps.dtype, device=logps.device).index_add(0, rows, logps).view(-1, 2)


def _figures(terms: DirectTerms) -> dict[str, Tensor]:
    return {
        "loss": terms.loss.detach(),
        "rewards/chosen": terms.chosen,
        "rewards/rejected": terms.rejected,
        "rewards/accuracies": terms.accuracy,
        "rewards/margins": terms.margin,
    }


def _check(loss_type: str, beta: float, label_smoothing: float) -> None:
    for name, value, valid, wanted in (
        ("loss_type", loss_type, loss_type in ("sigmoid", "ipo"), "sigmoid or ipo"),
        ("beta", beta, beta > 0, "a price above 0, e.g. 0.1"),
        ("label_smoothing", label_smoothing, 0 <= label_smoothing < 0.5, "the share of wrong labels, in [0, 0.5), e.g. 0.1"),
        ("label_smoothing", label_smoothing, loss_type == "sigmoid" or label_smoothing == 0, "0, since ipo reads none"),
    ):
        if not valid:
            raise InputError(f"model.{name} is {value!r}: choose {wanted}.")
