"""In a worker of `p3o frontier`: make a seed's task, or train one run and measure it along its path."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch

from p3o_lightning.batches import PromptBatch
from p3o_lightning.callbacks import Export
from p3o_lightning.commands import trainer as fitting
from p3o_lightning.commands.demo import distinct_2
from p3o_lightning.commands.frontier_plan import RunJob, Settings, TaskJob
from p3o_lightning.errors import Diverged, InputError, Stopped
from p3o_lightning.forwards import eval_mode
from p3o_lightning.frontier import score_win_rate
from p3o_lightning.function_reward import FunctionReward
from p3o_lightning.generation import Sampling, decode_completions
from p3o_lightning.model_reward import ModelReward
from p3o_lightning.models import load_reward_backbone
from p3o_lightning.responses import Responses
from p3o_lightning.rewards import JudgeReward
from p3o_lightning.scoring import grouped_logits
from p3o_lightning.seeds import mix
from p3o_lightning.tokenizers import load_tokenizer

DONE, PATH, LOG = "done.json", "path.jsonl", "log.txt"
DIVERGED = "diverged: "  # begins the outcome of a run that met a number which is not finite


def work(job: TaskJob | RunJob) -> None:
    """Do the job in its folder; what it prints goes to the log there."""
    folder = Path(job.folder)
    folder.mkdir(parents=True, exist_ok=True)
    started, spent = time.time(), time.process_time()
    with printing_to(folder / LOG):
        try:
            outcome = make_task(job) if isinstance(job, TaskJob) else train(job)
        except Exception:
            traceback.print_exc()  # into the log, where whoever asks why will look
            raise
        done = {"outcome": outcome, "seconds": round(time.time() - started, 2), "cpu_seconds": round(time.process_time() - spent, 2)}
    write_whole(folder / DONE, json.dumps({**done, "job": job._asdict()}, indent=1, default=str))


def make_task(job: TaskJob) -> str:
    """The task's data, then its stages in order; each leaves its export in a folder of its name."""
    folder = Path(job.folder)
    if job.task is not None:
        imported(job.task, "task")(folder, job.seed)
    for stage in job.stages:
        root = folder / stage.name
        seeds = {"seed_everything": job.seed, "data.seed": job.seed}
        settings = {**seeds, **stage.settings, "trainer.default_root_dir": str(root)}
        fitting.main(["fit", *configs(stage.configs), *flags(settings), "--quiet"])
    return "finished"


def train(job: RunJob) -> str:
    """One run, from its start or from its last checkpoint. One that ends itself (a KL budget, a NaN) is done, and measured up to there."""
    seeds = {"seed_everything": job.seed, "model.seed": job.seed, "data.seed": job.seed}
    settings = {**seeds, **job.settings, "trainer.default_root_dir": job.folder}
    arguments = ["fit", *configs(job.configs), *flags(settings), "--quiet"]
    if (Path(job.folder) / "checkpoints" / "last.ckpt").exists():
        arguments.append("--ckpt_path=last")
    try:
        fitting.main(arguments, lambda given: FrontierRun(given, job))  # type: ignore[arg-type]
    except Stopped as stop:
        return (DIVERGED if isinstance(stop, Diverged) else "") + " ".join(str(stop).split())
    return "finished"


def configs(paths: list[str]) -> list[str]:
    """`--config` of each."""
    return [f"--config={path}" for path in paths]


def flags(settings: Settings) -> list[str]:
    """`p3o fit` flags of dotted keys; texts as they are, all else as JSON, which is YAML."""
    return [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in settings.items()]


class FrontierRun(fitting.StageCLI):
    """A fit of `job.rollouts` rollouts that is measured along its path, and exports nothing."""

    def __init__(self, arguments: list[str], job: RunJob) -> None:
        self.job = job
        super().__init__(arguments)

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """The config's, as long as the plan says, with the measuring callback."""
        if self.job.rollouts is not None:
            kwargs["max_steps"] = self.job.rollouts * self._updates_a_rollout()
        trainer = super().instantiate_trainer(**kwargs)
        kept = [item for item in trainer.callbacks if not isinstance(item, Export)]  # type: ignore[attr-defined]
        trainer.callbacks = [Measure(self.job, self.resumed_step), *kept]  # type: ignore[attr-defined]
        return trainer

    def _updates_a_rollout(self) -> int:
        size = self.datamodule.batch_size
        micro_batches = self.model.num_iterations * (size // (self.model.micro_batch_size or size))
        return max(micro_batches // self._get(self.config_init, "trainer").accumulate_grad_batches, 1)


class Measure(L.Callback):
    """Writes a line to path.jsonl before the first update and `times` times after.

    Each line holds the means over held-out responses, and each response's scores. The draws are a function of the seed, so that every
    evaluation of every run of a seed sees the same; training sees nothing of it.
    """

    def __init__(self, job: RunJob, resumed_step: int | None) -> None:
        self.evaluate, self.path = job.evaluate, Path(job.folder) / PATH
        self.seed, self.resumed_step = job.seed, resumed_step
        self.gold: Callable[[Responses], torch.Tensor] | None = None
        self.prompts: list[PromptBatch] = []
        self.steps: set[int] = set()
        self.lines: list[dict[str, Any]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take up the lines of before the checkpoint, or measure the start."""
        if isinstance(pl_module.rewards.sources[0], JudgeReward):  # type: ignore[union-attr, index]
            raise InputError(
                "model.reward_funcs begins with a judge, which has no scores to measure: put a reward first, of weight 0 if need be."
            )
        self.prompts = held_out(trainer, pl_module, self.evaluate.prompts)
        self.gold = None if self.evaluate.gold is None else gold_reward(self.evaluate.gold, pl_module)
        updates = trainer.max_steps
        if updates < 0:
            updates = int(trainer.num_training_batches // trainer.accumulate_grad_batches * (trainer.max_epochs or 1))
        self.steps = evaluation_steps(updates, self.evaluate.times)
        if trainer.global_step == 0:
            self.path.unlink(missing_ok=True)
            self.measure(trainer, pl_module)
        else:
            self.lines = [line for line in read_lines(self.path) if line["updates"] <= trainer.global_step]
            write_whole(self.path, "".join(json.dumps(line) + "\n" for line in self.lines))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Measure where it is due."""
        if trainer.global_step in self.steps and self.lines[-1]["updates"] < trainer.global_step:
            self.measure(trainer, pl_module)

    @torch.no_grad()
    def measure(self, trainer: L.Trainer, policy: Any) -> None:
        """Sample from the held-out prompts, score, and write the line."""
        made, latest = policy.sampling, policy.rollout_rewards
        policy.sampling = Sampling(self.evaluate.responses, made.max_completion_length, made.temperature, made.top_p, made.top_k)
        try:
            with trainer.precision_plugin.forward_context():  # as training draws them
                each, texts, lengths, ended = self._responses(policy)
        finally:
            policy.sampling, policy.rollout_rewards = made, latest
        line: dict[str, Any] = {
            "updates": trainer.global_step,
            "responses": policy.state.rollouts * trainer.train_dataloader.batch_size * made.num_generations,  # type: ignore[union-attr]
            **{name: round(float(values.mean()), 6) for name, values in each.items()},
            "length": round(float(lengths.mean()), 4),
            "distinct_2": round(distinct_2(texts), 6),
            "ended": round(float(ended.mean()), 4),
            "kl_coef": policy.state.kl_coef,
        }
        line |= {f"{name}_each": [[round(value, 4) for value in row] for row in values.tolist()] for name, values in each.items()}
        start = self.lines[0] if self.lines else line
        for name in ("learned", "gold"):
            if name in each:
                line[f"win_rate_{name}"] = round(score_win_rate(line[f"{name}_each"], start[f"{name}_each"]), 6)
        self.lines.append(line)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _responses(self, policy: Any) -> tuple[dict[str, torch.Tensor], list[str], torch.Tensor, torch.Tensor]:
        columns: dict[str, list[torch.Tensor]] = {"kl": [], "learned": [], "gold": []}
        texts, lengths, ended = [], [], []
        for number, batch in enumerate(self.prompts):
            tokens, mask = policy.sample(batch, seed=mix(self.seed, number, 3))
            columns["kl"].append(expected_kl(policy, batch, tokens, mask))
            policy.score(batch, tokens, mask)
            columns["learned"].append(policy.rollout_rewards[policy.rewards.sources[0].name])  # the first alone, without its weight
            rows = decode_completions(policy.tokenizer, tokens, mask)
            if self.gold is not None:
                columns["gold"].append(self.gold(Responses(batch, tokens, mask, rows)))
            texts += [text for row in rows for text in row]
            lengths.append(mask.sum(-1).float())
            ended.append(policy.ended(tokens, mask).float())
        return (
            {name: torch.cat(values).float().cpu() for name, values in columns.items() if values},
            texts,
            torch.cat(lengths),
            torch.cat(ended),
        )


def gold_reward(name: str, policy: Any) -> Callable[[Responses], torch.Tensor]:
    """A dotted function, or a reward model in a folder, which goes to the policy's device."""
    if "/" not in name and not Path(name).exists():
        return FunctionReward(imported(name, "evaluate.gold"))
    own = load_tokenizer(name)
    reward = ModelReward(load_reward_backbone(name, own, policy.hparams["dtype"], trained=True), own, policy.tokenizer, "gold")
    reward.network.to(policy.device)
    return reward


def expected_kl(policy: Any, batch: PromptBatch, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """KL to the reference along each response, nats: at every token the whole next-token distributions are compared, not the token drawn.

    Its mean is an unbiased estimate of the KL of whole responses, and much less noisy than that of log pi - log pi_ref, which may even
    be negative (Amini, Vieira and Cotterell 2025, arXiv 2504.10637).
    """
    estimates = []
    for rows in torch.arange(len(tokens), device=tokens.device).split(32):  # logits over a whole vocabulary are large
        inputs = (batch.tokens[rows], batch.attention_mask[rows], tokens[rows], mask[rows], policy.sampling.temperature)
        with eval_mode(policy.model), policy.whole_weights():
            now = grouped_logits(policy.model, *inputs).log_softmax(-1)
            with policy.model.disable_adapter() if policy.adapter_is_policy else nullcontext():
                reference = grouped_logits(policy.reference, *inputs).log_softmax(-1)
        each = (now.exp() * (now - reference)).sum(-1)
        estimates.append(each.new_zeros(mask[rows].shape).masked_scatter(mask[rows], each).sum(-1))
    return torch.cat(estimates)


def held_out(trainer: L.Trainer, policy: L.LightningModule, count: int) -> list[PromptBatch]:
    """The first `count` prompts of the validation rows, on the policy's device."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    batches: list[PromptBatch] = []
    for batch in data.val_dataloader():
        rows = min(count - sum(len(taken.prompts) for taken in batches), len(batch.prompts))
        if rows < 1:
            break
        columns = {name: values[:rows] for name, values in batch.columns.items()}
        batches.append(
            PromptBatch(batch.tokens[:rows].to(policy.device), batch.attention_mask[:rows].to(policy.device), batch.prompts[:rows], columns)
        )
    if not batches:
        raise InputError("data holds out no prompts to measure on: set data.val_fraction, e.g. to 0.1, or data.val_path.")
    return batches


def evaluation_steps(updates: int, times: int) -> set[int]:
    """`times` updates, the last among them, at distances that grow: reward rises fastest, for its KL, where KL is small.

    >>> sorted(evaluation_steps(80, 4))
    [5, 20, 45, 80]
    """
    return {max(round(updates * (number / times) ** 2), 1) for number in range(1, times + 1)}


def imported(name: str, key: str) -> Any:
    """What a dotted name of the plan stands for."""
    module, _, attribute = str(name).rpartition(".")
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(
            f"{key} is {name!r}, which cannot be imported ({error}): give module.function, from the folder you run in."
        ) from error
    if not callable(found):
        raise InputError(f"{key} is {name!r}, which is no function: give module.function.")
    return found


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSON-lines file; a last one that was cut off is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with suppress(json.JSONDecodeError):
            lines.append(json.loads(text))
    return lines


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all."""
    aside = path.with_name(path.name + ".partial")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


@contextmanager
def printing_to(path: Path) -> Iterator[None]:
    """Whatever the process prints, libraries written in C included, goes to the end of a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    before = os.dup(1), os.dup(2)
    with path.open("a", encoding="utf-8") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, former in zip((1, 2), before, strict=True):
                os.dup2(former, number)
                os.close(former)
