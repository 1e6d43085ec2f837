"""A Python function as a reward source, called as TRL calls it, and held to what it has to answer."""

from __future__ import annotations

import asyncio
import inspect
import math
import threading
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from p3o_lightning.errors import InputError
from p3o_lightning.responses import Responses
from p3o_lightning.reward_log import RewardLog

RewardFunction = Callable[..., Any]


class FunctionReward:
    """A Python function `f(prompts, completions, completion_ids, **columns) -> list[float | None]`, as in TRL; it may be async.

    It is also given TRL's `trainer_state`, `log_metric` and `log_extra` (see p3o_lightning.reward_log), by name or in `**columns`.

    `completions` are strings, or for conversational prompts lists of one assistant message. None says that the function does
    not apply; the prompt's responses then all get 0 from it, since a gap between a scored and an unscored response means nothing.
    """

    def __init__(self, function: RewardFunction) -> None:
        self.function = function
        named = getattr(function, "func", function)  # of a functools.partial
        self.name = getattr(named, "__name__", type(named).__name__)

    def __call__(self, responses: Responses) -> Float[Tensor, "prompt response"]:
        """One score a response, in the function's own units."""
        return self.start(responses)()

    def start(self, responses: Responses) -> Callable[[], Float[Tensor, "prompt response"]]:
        """Call the function; what comes back waits for its scores. So async functions wait for their servers at the same time."""
        prompts, count = responses.prompts.prompts, responses.tokens.shape[1]
        repeated = [prompt for prompt in prompts for _ in range(count)]
        texts: list[Any] = [text for group in responses.texts for text in group]
        completions = [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(repeated, texts, strict=True)
        ]
        tokens, masks = responses.tokens.flatten(0, 1).cpu(), responses.mask.flatten(0, 1).cpu()
        ids = [row[kept].tolist() for row, kept in zip(tokens, masks, strict=True)]
        columns = {name: [value for value in values for _ in range(count)] for name, values in responses.prompts.columns.items()}
        log = RewardLog(len(ids)) if responses.log is None else responses.log
        trls = {"trainer_state": responses.state, "log_metric": log.log_metric, "log_extra": log.log_extra}
        arguments = {**columns, **self._taken(trls), "prompts": repeated, "completions": completions, "completion_ids": ids}
        self._check_signature(arguments)
        answer = self.function(**arguments)
        if inspect.isawaitable(answer):
            waiting = asyncio.run_coroutine_threadsafe(_wait(answer), _event_loop())
            return lambda: self._checked(waiting.result(), len(prompts), count)
        return lambda: self._checked(answer, len(prompts), count)

    def _taken(self, offered: dict[str, Any]) -> dict[str, Any]:
        """Of what is offered, what the function takes: our own functions need not."""
        try:
            parameters = inspect.signature(self.function).parameters
        except ValueError:  # written in C
            return {}
        every = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        return {name: value for name, value in offered.items() if every or name in parameters}

    def _check_signature(self, arguments: dict[str, Any]) -> None:
        try:
            signature = inspect.signature(self.function)
        except ValueError:  # written in C
            return
        try:
            signature.bind(**arguments)
        except TypeError as error:
            raise InputError(
                f"model.reward_funcs: {self.name}{signature} cannot be called ({error}): "
                f"define it as def {self.name}(prompts, completions, completion_ids, **columns)."
            ) from error

    def _checked(self, answer: Any, prompts: int, count: int) -> Tensor:
        field = f"model.reward_funcs: {self.name}"
        values = answer.tolist() if hasattr(answer, "tolist") else answer
        if not isinstance(values, Sequence) or isinstance(values, str):
            raise InputError(f"{field} returned {type(answer).__name__} {_short(answer)}: return a list of {prompts * count} numbers.")
        if len(values) != prompts * count:
            raise InputError(f"{field} returned {len(values)} scores for {prompts * count} completions: return one for each, in order.")
        for index, value in enumerate(values):
            if value is not None and not _is_number(value):
                raise InputError(f"{field} returned {_short(value)} at position {index}: return a float, or None where it does not apply.")
            if value is not None and not math.isfinite(float(value)):
                raise InputError(f"{field} returned {float(value)} at position {index}: return a finite number, or None.")
        scores = torch.tensor([math.nan if value is None else float(value) for value in values]).view(prompts, count)
        return torch.where(scores.isnan().any(1, keepdim=True), 0.0, scores)


def _is_number(value: Any) -> bool:
    """Whether it is one number, of whatever library: not a text that spells one, a truth value, or a tensor of several."""
    return not isinstance(value, bool | str) and hasattr(value, "__float__") and math.prod(getattr(value, "shape", ())) == 1


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:60]}..."


async def _wait(answer: Any) -> Any:
    return await answer


@cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """One for all calls, in a thread of its own: clients may keep their connections, and a notebook's own loop is not in the way."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="p3o-rewards", daemon=True).start()
    return loop
