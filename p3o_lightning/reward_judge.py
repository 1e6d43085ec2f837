"""A scalar reward as a judge: the response that scores higher is the better one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from p3o_lightning.batches import PromptBatch
from p3o_lightning.data_formats import Text
from p3o_lightning.encoding import encode_prompt, encode_response
from p3o_lightning.judges import Judge
from p3o_lightning.responses import Responses as Pairs
from p3o_lightning.rewards import JudgeReward, RewardInput, reward_sources
from p3o_lightning.sequences import pad_left, pad_right
from p3o_lightning.tokenizers import byte_tokenizer


class RewardJudge(Judge):
    """Anything that scores, as a judge: P(first is better) = sigmoid(score of first - score of second).

    Texts are scored as complete responses, with EOS. Scores do not depend on the order, so it is asked once.

    Args:
        reward: a reward model (object, folder or checkpoint), an Ensemble, a function as in reward_funcs, or its dotted name.
        dtype: of models loaded from a path.
    """

    symmetric = True

    def __init__(self, reward: RewardInput, dtype: str = "float32") -> None:
        self._tokenizer = byte_tokenizer()  # stands for the policy's: texts are all there is
        self.source = reward_sources([reward], None, self._tokenizer, dtype)
        self.name = self.source.sources[0].name

    def __call__(self, prompts: list[Text], first: list[str], second: list[str], **columns: list[Any]) -> list[float]:
        """Every pair is scored once."""
        scores, _ = self.source(self._pairs(prompts, first, second, columns))
        gaps = scores.double()
        return (gaps[:, 0] - gaps[:, 1]).sigmoid().tolist()

    def _pairs(self, prompts: list[Text], first: list[str], second: list[str], columns: dict[str, list[Any]]) -> Pairs:
        tokens, mask = pad_left([encode_prompt(self._tokenizer, prompt) for prompt in prompts], 0)
        texts = [list(pair) for pair in zip(first, second, strict=True)]
        replies, reply_mask = pad_right([encode_response(self._tokenizer, text) for pair in texts for text in pair], 0)
        shape = (len(prompts), 2, -1)
        return Pairs(PromptBatch(tokens, mask, list(prompts), columns), replies.view(shape), reply_mask.view(shape), texts)


def judge_of(given: Judge | RewardInput, dtype: str = "float32") -> Judge:
    """The judge that is given or named: a Judge is itself; what scores becomes a RewardJudge, e.g. a folder or a function's dotted name."""
    if isinstance(given, Judge):
        given.check()
        return given
    if isinstance(given, str) and not Path(given).expanduser().exists() and "/" not in given:
        source = reward_sources([given], None, byte_tokenizer(), dtype).sources[0]
        if isinstance(source, JudgeReward):
            return source.judge
    return RewardJudge(given, dtype)


def move_to(judge: Judge, device: torch.device | str) -> None:
    """Put the reward models of a judge on a device."""
    for network in judge.source.networks if isinstance(judge, RewardJudge) else []:
        network.to(device)
