"""TRL's side: `python trl_side.py FOLDER default|tuned`, in an environment with trl==1.16.0. The same work, by RLOOTrainer."""

from __future__ import annotations

import sys
from typing import Any

from datasets import load_dataset
from gate import Gate
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl import RLOOConfig, RLOOTrainer
from work import NEW_TOKENS, PROMPTS, RESPONSES

TUNED = {"gradient_checkpointing": False, "disable_dropout": True, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 4}


class Iterations(TrainerCallback):
    """The gate opens before a step, and closes after it."""

    def __init__(self) -> None:
        self.gate = Gate()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.gate.wait()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.gate.report()


def main(folder: str, how: str) -> None:
    rows = PROMPTS * RESPONSES
    settings: dict[str, Any] = {"per_device_train_batch_size": rows, **(TUNED if how == "tuned" else {})}
    trainer = RLOOTrainer(
        model=f"{folder}/policy",
        reward_funcs=AutoModelForSequenceClassification.from_pretrained(f"{folder}/reward", num_labels=1),
        args=RLOOConfig(
            output_dir=f"{folder}/trl",
            use_cpu=True,
            bf16=False,
            num_generations=RESPONSES,
            max_completion_length=NEW_TOKENS,
            max_steps=1000,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            **settings,
        ),
        train_dataset=load_dataset("json", data_files=f"{folder}/prompts.jsonl", split="train"),
        processing_class=AutoTokenizer.from_pretrained(f"{folder}/policy", padding_side="left"),
        callbacks=[Iterations()],
    )
    trainer.train()


if __name__ == "__main__":
    main(*sys.argv[1:])
