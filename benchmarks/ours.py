"""p3o_lightning's side: `python ours.py FOLDER`. One iteration is a rollout of 16 prompts x 2 responses and one update on it."""

from __future__ import annotations

import sys
from typing import Any

import lightning.pytorch as L
import torch
from gate import Gate
from work import NEW_TOKENS, PROMPTS, RESPONSES

from p3o_lightning import PairwisePolicy, PreferenceDataModule

MICRO_BATCH = 4  # prompts


class Iterations(L.Callback):
    """The gate opens before a rollout: at the start of training, and after every update."""

    def __init__(self) -> None:
        self.gate = Gate()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.gate.wait()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step and (batch_idx + 1) % (PROMPTS // MICRO_BATCH) == 0:
            self.gate.report(tokens=pl_module.state.figures["completions/mean_length"] * PROMPTS * RESPONSES)
            self.gate.wait()


def main(folder: str) -> None:
    torch.manual_seed(0)
    policy = PairwisePolicy(
        f"{folder}/policy",
        f"{folder}/reward",
        num_generations=RESPONSES,
        micro_batch_size=MICRO_BATCH,
        max_completion_length=NEW_TOKENS,
        kl_coef=0.05,
        lr=1e-6,
    )
    data = PreferenceDataModule(f"{folder}/prompts.jsonl", batch_size=PROMPTS, val_fraction=0)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=1000,
        accumulate_grad_batches=PROMPTS // MICRO_BATCH,
        callbacks=[Iterations()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(policy, data)


if __name__ == "__main__":
    main(sys.argv[1])
