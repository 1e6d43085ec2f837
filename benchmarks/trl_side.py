"""TRL's side: `python trl_side.py FOLDER CASE MICRO_BATCH`, with trl==1.16.0. The same work by RLOOTrainer or RewardTrainer.

MICRO_BATCH 0 is TRL as it comes: its own settings in the case's dtype. Another number is TRL tuned: no gradient checkpointing, no
dropout, and so many rows (pairs) a forward.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from cases import Case
from datasets import load_dataset
from gate import Gate, peak_mib
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl import RewardConfig, RewardTrainer, RLOOConfig, RLOOTrainer


class Iterations(TrainerCallback):
    """The gate opens at the start of training and after every iteration, which ends with the last of `updates` optimizer steps."""

    def __init__(self, gate: Gate, updates: int) -> None:
        self.gate, self.updates = gate, updates

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.gate.wait()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.gate.enter("update")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.gate.leave()
        self.gate.did(steps=1)
        if state.global_step % self.updates == 0:
            self.gate.report()
            self.gate.wait()


def watch(trainer: Any, gate: Gate) -> None:
    """Phases of an iteration, and how much went through each. What scores a rollout is what runs while inputs are prepared."""
    gate.watch(trainer, "_prepare_inputs", "other")
    gate.watch(trainer, "_generate", "generation", rollout)
    gate.watch(trainer, "_calculate_rewards", "scoring", lambda _, inputs, prompts, *__: {"reward_rows": len(prompts)})
    gate.watch(trainer, "compute_loss", "update", lambda _, model, inputs, *__: {"trained_rows": len(inputs["completion_ids"])})
    forward = trainer._get_per_token_logps_and_entropies

    def logps(model: Any, tokens: Any, *arguments: Any, **options: Any) -> Any:
        if gate.phase == "update":
            return forward(model, tokens, *arguments, **options)
        if model is trainer.ref_model or adapter_is_off(model):
            gate.did(reference_rows=len(tokens))
        with gate.within("scoring"):
            return forward(model, tokens, *arguments, **options)

    trainer._get_per_token_logps_and_entropies = logps


def adapter_is_off(model: Any) -> bool:
    """Whether the model has adapters and they are switched off."""
    return any(getattr(module, "disable_adapters", False) is True for module in model.modules())


def rollout(result: Any, *_: Any) -> dict[str, int]:
    """Work of a rollout."""
    prompts, completions = result[0], result[1]
    return {"rows": len(completions), "tokens": sum(map(len, completions)), "prompt_tokens": sum(map(len, prompts))}


def pairs(_: Any, model: Any, inputs: Any, *__: Any) -> dict[str, int]:
    """Work of a reward model's training step: chosen and rejected are rows."""
    return {"pairs": len(inputs["input_ids"]) // 2, "tokens": inputs["attention_mask"].sum()}


def main(folder: str, described: str, micro_batch: str) -> None:
    case, tuned, idle_mib = Case(**json.loads(described)), int(micro_batch), peak_mib()
    rows = case.rows if case.kind == "policy" else case.prompts
    settings: dict[str, Any] = {"per_device_train_batch_size": tuned or rows, "gradient_accumulation_steps": rows // (tuned or rows)}
    settings["bf16"] = case.dtype == "bfloat16"  # autocast over float32 weights
    if tuned:
        settings |= {"gradient_checkpointing": False, "disable_dropout": True}
    common: dict[str, Any] = {
        "output_dir": f"{folder}/trl",
        "use_cpu": not case.gpu,
        "max_steps": 1000,
        "save_strategy": "no",
        "report_to": [],
    }
    tokenizer = AutoTokenizer.from_pretrained(f"{folder}/reward", padding_side="left" if case.kind == "policy" else "right")
    gate = Gate(["torch", "transformers", "trl"], idle_mib, settings, case.gpu)
    callbacks = [Iterations(gate, case.epochs if case.kind == "policy" else case.updates)]
    if case.kind == "policy":
        trainer: Any = RLOOTrainer(
            model=f"{folder}/policy",
            reward_funcs=AutoModelForSequenceClassification.from_pretrained(f"{folder}/reward", num_labels=1),
            args=RLOOConfig(
                **common,
                **settings,
                learning_rate=case.lr,
                num_generations=case.responses,
                num_iterations=case.epochs,
                max_completion_length=case.new_tokens,
                disable_tqdm=True,
            ),
            train_dataset=load_dataset("json", data_files=f"{folder}/prompts.jsonl", split="train", cache_dir=f"{folder}/cache"),
            processing_class=tokenizer,
            callbacks=callbacks,
            peft_config=adapter(case.lora, "CAUSAL_LM"),
        )
        watch(trainer, gate)
    else:
        trainer = RewardTrainer(
            model=f"{folder}/reward",
            args=RewardConfig(**common, **settings, learning_rate=case.lr, disable_tqdm=True),
            train_dataset=load_dataset("json", data_files=f"{folder}/pairs.jsonl", split="train", cache_dir=f"{folder}/cache"),
            processing_class=tokenizer,
            callbacks=callbacks,
            peft_config=adapter(case.lora, "SEQ_CLS"),
        )
        gate.watch(trainer, "compute_loss", "update", pairs)
    trainer.train()


def adapter(rank: int, task: str) -> Any:
    """Of PEFT, on all linear layers; None where the weights themselves are trained."""
    if not rank:
        return None
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type=task)


if __name__ == "__main__":
    main(*sys.argv[1:])
