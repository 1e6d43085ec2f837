"""What a policy writes, side by side, on the dashboard."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L
from torch import Tensor

from p3o_lightning.batches import Experience, PromptBatch
from p3o_lightning.callbacks.dashboard import writers
from p3o_lightning.callbacks.rollouts import RolloutObserver, pair_gaps
from p3o_lightning.text import escaped


class SampleTable(RolloutObserver):
    """`samples` in the TEXT tab: prompts, the best and the worst of their responses, reward and KL below each.

    How to read it: whether what the reward prefers is what you prefer. Responses that grow alike, that flatter, or that repeat a phrase
    while `objective/scores` rises are the reward being gamed. KL is log pi - log pi_ref of the whole response, in nats; of a
    judge that compares, the "reward" is the mean gap to the other responses. What a reward function gives to `log_extra` follows.

    Texts are shown as they are: no markup of a prompt or a response acts. Prompts are the first ones of the first rank's rollout.

    Args:
        every_n_steps: optimizer updates between two tables, at least.
        rows: prompts in a table.
        max_characters: of a text, of which the rest is left out.
    """

    def __init__(self, every_n_steps: int = 50, rows: int = 8, max_characters: int = 2000) -> None:
        super().__init__(every_n_steps)
        self.rows, self.max_characters = rows, max_characters

    def observe(self, trainer: L.Trainer, pl_module: Any, prompts: PromptBatch, experience: Experience) -> None:
        """Write the table."""
        if targets := writers(trainer):
            extra = getattr(getattr(pl_module, "rollout_log", None), "extra", {})
            table = self.table(pl_module.tokenizer, prompts, experience, extra)
            for writer in targets:
                writer.add_text("samples", table, trainer.global_step)

    def table(self, tokenizer: Any, prompts: PromptBatch, experience: Experience, extra: dict[str, list[Any]] | None = None) -> str:
        """The rollout's first prompts as a Markdown table. `extra`: more to show, one value a completion, prompt by prompt."""
        extra = extra or {}
        count = experience.completion_tokens.shape[1]
        gaps = pair_gaps(experience)
        ratings = experience.scores if experience.scores is not None else None if gaps is None else gaps.mean(-1)
        kls = experience.old_logps - experience.ref_logps
        lines = ["| prompt | best response | worst response |", "|---|---|---|"]
        for row, prompt in enumerate(prompts.prompts[: self.rows]):
            cells = [self._cell(_as_text(prompt))]
            for response in (0, 1) if ratings is None else _best_and_worst(ratings[row]):
                ids = experience.completion_tokens[row, response][experience.completion_mask[row, response]]
                text = str(tokenizer.decode(ids.cpu(), skip_special_tokens=True, clean_up_tokenization_spaces=False))
                figures = [] if ratings is None else [f"reward {float(ratings[row, response]):.3f}"]
                figures += [f"KL {float(kls[row, response]):.2f}"]
                figures += [f"{escaped(name)} {self._cell(str(values[row * count + response]))}" for name, values in extra.items()]
                # below the text: TensorBoard makes columns of numbers so narrow that it breaks them
                cells.append(f"{self._cell(text)}<br>**{', '.join(figures)}**")
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines)

    def _cell(self, text: str) -> str:
        left = len(text) - self.max_characters
        return escaped(text if left <= 0 else f"{text[: self.max_characters]}... ({left} more characters)")


def _best_and_worst(ratings: Tensor) -> tuple[int, int]:
    """Places of both; of equal ones the first and the last."""
    order = ratings.sort(descending=True, stable=True).indices
    return int(order[0]), int(order[-1])


def _as_text(prompt: Any) -> str:
    """A prompt as it is read: a text, or messages, each after its role."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message.get('role')}: {message.get('content')}" for message in prompt)
