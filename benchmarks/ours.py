"""Our side: `python ours.py FOLDER CASE [compiled]`. An iteration is a rollout and its updates, or a pass over a reward model's pairs."""

from __future__ import annotations

import json
import sys
from typing import Any

import lightning.pytorch as L
import torch
from cases import Case
from gate import Gate, peak_mib

from p3o_lightning import PairwisePolicy, PreferenceDataModule, RewardModel

PRECISION = {"float32": "32-true", "bfloat16": "bf16-mixed"}


class Iterations(L.Callback):
    """The gate opens at the start of training and after every iteration, which ends with the last of `batches` training steps."""

    def __init__(self, gate: Gate, batches: int) -> None:
        self.gate, self.batches, self.done = gate, batches, 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.gate.wait()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.steps = trainer.global_step
        self.gate.enter("update")

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.gate.leave()
        self.gate.did(steps=trainer.global_step - self.steps, **trained(batch))
        self.done += 1
        if self.done % self.batches == 0:
            self.gate.report()
            self.gate.wait()


def trained(batch: Any) -> dict[str, int]:
    """Work of a training step: responses of experience, or pairs and all their tokens."""
    if hasattr(batch, "completion_mask"):
        return {"trained_rows": batch.completion_mask[..., 0].numel()}
    return {"pairs": len(batch.tokens), "tokens": batch.attention_mask.sum()}


def watch(policy: Any, gate: Gate) -> None:
    """Phases of a rollout, and how much went through each."""
    gate.watch(policy, "sample_with_logps", "generation")
    gate.watch(policy, "policy_logps", "scoring")
    gate.watch(policy, "reference_logps", "scoring", lambda _, *given: {"reference_rows": given[2][..., 0].numel()})
    gate.watch(policy, "score", "scoring", lambda scores, *_: {"reward_rows": scores.numel()})
    gate.watch(policy, "after_rollout", "logging", rollout)
    gate.watch(policy, "log_update", "logging")


def rollout(_: Any, prompts: Any, experience: Any) -> dict[str, int]:
    """Work of a rollout."""
    rows, responses = experience.completion_mask[..., 0].numel(), experience.completion_mask.shape[1]
    return {"rows": rows, "tokens": experience.completion_mask.sum(), "prompt_tokens": prompts.attention_mask.sum() * responses}


def main(folder: str, described: str, compiled: str = "") -> None:
    case, idle_mib = Case(**json.loads(described)), peak_mib()
    torch.manual_seed(0)
    lora = {"r": case.lora, "lora_alpha": 2 * case.lora} if case.lora else None
    micro_batch = min(case.micro_batch, case.prompts)
    settings: dict[str, Any] = {"precision": PRECISION[case.dtype], "torch_compile": bool(compiled)}
    if case.kind == "policy":
        module: Any = PairwisePolicy(
            f"{folder}/policy",
            f"{folder}/reward",
            num_generations=case.responses,
            num_iterations=case.epochs,
            micro_batch_size=micro_batch,
            max_completion_length=case.new_tokens,
            kl_coef=0.05,
            peft_config=lora,
            torch_compile=bool(compiled),
            lr=case.lr,
        )
        data = PreferenceDataModule(f"{folder}/prompts.jsonl", batch_size=case.prompts, val_fraction=0)
        accumulate = case.prompts // micro_batch
        batches, settings["micro_batch_size"] = accumulate * case.epochs, micro_batch
    else:
        module = RewardModel(f"{folder}/reward", peft_config=lora, torch_compile=bool(compiled), lr=case.lr)
        data = PreferenceDataModule(f"{folder}/pairs.jsonl", batch_size=micro_batch, val_fraction=0)
        accumulate = case.prompts // micro_batch
        batches, settings["micro_batch_size"] = accumulate * case.updates, micro_batch
    gate = Gate(["torch", "transformers", "lightning"], idle_mib, settings, case.gpu)
    if case.kind == "policy":
        watch(module, gate)
    trainer = L.Trainer(
        accelerator="gpu" if case.gpu else "cpu",
        devices=1,
        precision=settings["precision"],
        max_steps=1000,
        accumulate_grad_batches=accumulate,
        callbacks=[Iterations(gate, batches)],
        logger=case.logger,
        log_every_n_steps=1 if case.logger else 50,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(module, data)


if __name__ == "__main__":
    main(*sys.argv[1:])
