"""Reward sources: a reward model, a Python function with TRL's signature, an ensemble, a judge, or a weighted sum of several.

A score is one number a response; P3O reads only differences between the responses of one prompt, so a source's zero point
does not matter. A judge has no scores at all: it compares the responses of a prompt, and gives the differences themselves.
"""

from __future__ import annotations

import asyncio
import copy
import importlib
import inspect
import math
import re
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from p3o_lightning.batches import PromptBatch
from p3o_lightning.casting import cast_once
from p3o_lightning.data_formats import Row, Text, Unusable
from p3o_lightning.encoding import Encoder, encode_prompt, encode_response
from p3o_lightning.ensembles import Ensemble, EnsembleReward
from p3o_lightning.errors import InputError
from p3o_lightning.forwards import eval_mode, is_adapted
from p3o_lightning.judges import Judge, group_gaps
from p3o_lightning.models import highest_token_id, load_reward_backbone
from p3o_lightning.reward_log import RewardLog, TrainerState
from p3o_lightning.scoring import grouped_scores
from p3o_lightning.sequences import pad_right
from p3o_lightning.tokenizers import load_tokenizer, same_ids

RewardFunction = Callable[..., Any]
RewardInput = str | Path | Judge | Ensemble | RewardFunction | nn.Module


class Responses(NamedTuple):
    """What a reward source sees: prompts as in the data, and what was sampled for each."""

    prompts: PromptBatch
    tokens: Int[Tensor, "prompt response token"]
    mask: Bool[Tensor, "prompt response token"]
    texts: list[list[str]]  # without special tokens
    state: TrainerState = TrainerState()
    log: RewardLog | None = None  # None: what functions log goes nowhere


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


class ModelReward:
    """A scalar-head model. It reads the sampled tokens themselves if it shares the policy's tokenizer, else the text, encoded anew.

    Either way the sequence ends as its training text ended: with EOS where the response ended, without where it was cut off.
    """

    batch_rows = 32

    def __init__(
        self, network: PreTrainedModel | nn.Module, tokenizer: PreTrainedTokenizerBase, policy_tokenizer: PreTrainedTokenizerBase, name: str
    ):
        self.network: nn.Module = network.eval().requires_grad_(False)
        self.tokenizer, self.policy_tokenizer, self.name = tokenizer, policy_tokenizer, name
        self.same_tokens = same_tokenizer(tokenizer, policy_tokenizer)
        self.same_template = tokenizer.chat_template == policy_tokenizer.chat_template
        self._encoder = Encoder(tokenizer, "demonstrations", max_length=sys.maxsize)
        self._turn_end: list[int] | None = None
        self._warned = False

    @torch.no_grad()
    def __call__(self, responses: Responses) -> Float[Tensor, "prompt response"]:
        """Rewards in the model's logits, float32 at least."""
        prompts = responses.prompts.prompts
        same = self.same_tokens and (self.same_template or all(isinstance(prompt, str) for prompt in prompts))
        rows = self._token_rows(responses) if same else self._encoded_rows(responses)
        device, count = next(self.network.parameters()).device, responses.tokens.shape[1]
        longest = [max(map(len, rows[start : start + count])) for start in range(0, len(rows), count)]
        order = sorted(range(len(longest)), key=longest.__getitem__)  # neighbours of like length: little padding
        batch_rows = self.batch_rows // 4 if device.type == "cpu" else self.batch_rows  # what a core's cache holds
        size = max(1, batch_rows // count)  # prompts
        chunks = []
        with eval_mode(self.network), cast_once(self.network):
            for start in range(0, len(order), size):
                texts = [row for i in order[start : start + size] for row in rows[i * count : (i + 1) * count]]
                tokens, mask = pad_right(texts, self.tokenizer.pad_token_id)
                chunks.append(grouped_scores(self.network, tokens.to(device), mask.to(device), count).cpu().view(-1, count))
        scores = torch.cat(chunks)
        if not bool(scores.isfinite().all()):
            warnings.warn(  # an error here would stop one rank alone
                f"reward {self.name!r} gave {int((~scores.isfinite()).sum())} of {scores.numel()} responses a score that is NaN or "
                "infinite: nothing can be learned from them. Give another reward model, or a wider dtype (model.dtype float32).",
                stacklevel=2,
            )
        return scores[torch.tensor(order).argsort()]

    def _token_rows(self, responses: Responses) -> list[list[int]]:
        rows = []
        for i, (prompt, kept) in enumerate(zip(responses.prompts.tokens, responses.prompts.attention_mask, strict=True)):
            head = prompt[kept].tolist()
            rows += [head + tokens[real].tolist() for tokens, real in zip(responses.tokens[i], responses.mask[i], strict=True)]
        return rows

    def _encoded_rows(self, responses: Responses) -> list[list[int]]:
        """Prompt and response in the reward model's own tokens and chat template, encoded as its training data was."""
        rows, unreadable = [], 0
        eos = self.policy_tokenizer.eos_token_id
        for prompt, texts, tokens, masks in zip(responses.prompts.prompts, responses.texts, responses.tokens, responses.mask, strict=True):
            head, bodies = self._encoded(prompt, texts)
            for text, ids, mask, body in zip(texts, tokens, masks, bodies, strict=True):
                unreadable += not self._readable(text, body)
                ended = bool((ids[mask][-1:] == eos).any())
                rows.append([*head, *(body if ended else body[: -len(self._end_of_turn(prompt))])])
        if unreadable and not self._warned:
            self._warned = True
            rank_zero_warn(
                f"reward {self.name!r} has another tokenizer than the policy, which cannot reproduce {unreadable / len(rows):.0%} of the "
                "responses (unknown characters or words): it judges them without. Take a reward model whose tokenizer covers the policy's."
            )
        return rows

    def _encoded(self, prompt: Text, texts: list[str]) -> tuple[list[int], list[list[int]]]:
        """Ids of the prompt, and of each response with its end of turn."""
        # the policy may begin its responses with a space, which a chat template supplies itself
        replies: tuple[Text, ...] = (
            tuple(texts) if isinstance(prompt, str) else tuple([{"role": "assistant", "content": text.strip()}] for text in texts)
        )
        row = next(self._encoder([Row(prompt, replies, None, {})]))
        if isinstance(row, Unusable):  # a template that rewrites replies: only prompts can go through it
            return encode_prompt(self.tokenizer, prompt), [encode_response(self.tokenizer, text) for text in texts]
        return row.prompt.tolist(), [reply.tolist() for reply in row.replies]

    def _end_of_turn(self, prompt: Text) -> list[int]:
        """What follows a response in the training data: EOS, and before it what a chat template writes there."""
        if isinstance(prompt, str):
            return [self.tokenizer.eos_token_id]
        if self._turn_end is None:
            one, other = self._encoded(prompt, ["a", "b"])[1]
            common = next((i for i in range(1, len(one)) if one[-i:] != other[-i:]), len(one)) - 1
            self._turn_end = one[-common:]
        return self._turn_end

    def _readable(self, text: str, ids: list[int]) -> bool:
        """Whether the ids give the text back, but for spacing and case, which some tokenizers drop on purpose."""
        back = str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        return "".join(text.split()).casefold() in "".join(back.split()).casefold()


def same_tokenizer(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether both give the same ids to the same text and end it alike; a padding token of its own does not count."""
    if one is other:
        return True
    return (
        one.eos_token_id == other.eos_token_id
        and one.bos_token_id == other.bos_token_id
        and same_ids(one, other)
        and {token for token, _ in one.get_vocab().items() ^ other.get_vocab().items()} <= {one.pad_token, other.pad_token}
    )


class JudgeReward:
    """A judge as a reward source: it gives gaps between the responses of a prompt, and no scores."""

    def __init__(self, judge: Judge) -> None:
        judge.check()
        self.judge, self.name = judge, judge.name

    def gaps(self, responses: Responses) -> tuple[Float[Tensor, "prompt response response"], dict[str, Tensor]]:
        """Antisymmetric gaps in [-1, 1], and the judge's figures."""
        return group_gaps(self.judge, responses.prompts.prompts, responses.texts, **responses.prompts.columns)


Source = FunctionReward | ModelReward | EnsembleReward | JudgeReward


class RewardSum:
    """Several sources with weights: the score is the weighted sum of those that score, the gap that of those that judge."""

    def __init__(self, sources: Sequence[Source], weights: Sequence[float] | None) -> None:
        self.sources = list(sources)
        self.weights = [1.0] * len(self.sources) if weights is None else [float(weight) for weight in weights]
        if len(self.weights) != len(self.sources):
            raise InputError(
                f"model.reward_weights has {len(self.weights)} values for {len(self.sources)} reward_funcs: give one for each."
            )
        for weight in self.weights:
            if not math.isfinite(weight):
                raise InputError(f"model.reward_weights has {weight}: give finite numbers, e.g. 1.0.")

    @property
    def models(self) -> list[ModelReward]:
        """The reward models among the sources, members of ensembles included."""
        return [source for source in _with_members(self.sources) if isinstance(source, ModelReward)]

    @property
    def networks(self) -> list[nn.Module]:
        """Their frozen networks, to be moved to the device with the policy."""
        return [source.network for source in self.models]

    @property
    def judged(self) -> bool:
        """Whether a judge is among the sources, so that there are gaps and no scores to learn from."""
        return any(isinstance(source, JudgeReward) for source in self.sources)

    def __call__(self, responses: Responses) -> tuple[Float[Tensor, "prompt response"], dict[str, Tensor]]:
        """The weighted sum of the scores (0 where judges are the only sources), and each source's own by name."""
        total, each = torch.zeros(responses.tokens.shape[:2]), dict[str, Tensor]()
        started = {source.name: source.start(responses) for source in self.sources if isinstance(source, FunctionReward)}
        for weight, source in zip(self.weights, self.sources, strict=True):
            if isinstance(source, JudgeReward):
                continue
            if isinstance(source, EnsembleReward):
                each |= source.parts(responses)
            else:
                each[source.name] = started[source.name]() if source.name in started else source(responses)
            total = total + weight * each[source.name]
        return total, each

    def gaps(self, responses: Responses) -> tuple[Float[Tensor, "prompt response response"], dict[str, Tensor]]:
        """The weighted sum of the judges' gaps, and the judges' figures by tag, e.g. `judges/<name>/position_bias`."""
        count = responses.tokens.shape[1]
        total, figures = torch.zeros(len(responses.tokens), count, count), dict[str, Tensor]()
        for weight, source in zip(self.weights, self.sources, strict=True):
            if isinstance(source, JudgeReward):
                gaps, about = source.gaps(responses)
                total = total + weight * gaps
                figures |= {f"judges/{source.name}/{name}": value for name, value in about.items()}
        return total, figures

    def figures(self, each: dict[str, Tensor]) -> dict[str, Tensor]:
        """What ensembles say of their members' scores, by tag; `each` as __call__ returned it."""
        return {tag: value for source in self.sources if isinstance(source, EnsembleReward) for tag, value in source.figures(each).items()}


def _with_members(sources: Sequence[Any]) -> list[Any]:
    """The sources, and the members of those that are ensembles."""
    return [one for source in sources for one in (source, *_with_members(getattr(source, "members", ())))]


def reward_sources(
    reward_funcs: RewardInput | Sequence[RewardInput], weights: Sequence[float] | None, tokenizer: PreTrainedTokenizerBase, dtype: str
) -> RewardSum:
    """Load every source. `tokenizer` is the policy's; `dtype` that of models loaded from a path."""
    given = list(reward_funcs) if isinstance(reward_funcs, list | tuple) else [reward_funcs]
    if not given:
        raise InputError("model.reward_funcs is empty: give a reward model (folder or checkpoint), a Python function or a judge.")
    sources = [_source(item, tokenizer, dtype) for item in given]
    taken: set[str] = set()
    for source in _with_members(sources):  # names are tags of the dashboard, which fails over a bracket: make them plain, and distinct
        name, number = re.sub(r"[^\w.<>-]", "_", source.name), 1
        source.name = name
        while source.name in taken:
            number += 1
            source.name = f"{name}_{number}"
        taken.add(source.name)
    return RewardSum(sources, weights)


def _source(item: Any, tokenizer: PreTrainedTokenizerBase, dtype: str) -> Source:
    own: Any = getattr(item, "tokenizer", None)
    if isinstance(item, Judge):
        return JudgeReward(item)
    if isinstance(item, Ensemble):
        item.check()
        members = [_source(member, tokenizer, dtype) for member in item.members]
        if any(isinstance(member, JudgeReward | EnsembleReward) for member in members):
            raise InputError("ensemble.members has a judge or an ensemble: give sources that score a response, models or functions.")
        return EnsembleReward(members, item)
    if isinstance(item, nn.Module) and hasattr(item, "model") and own is not None:  # a RewardModel
        return _model_reward(item.model, own, tokenizer, type(item).__name__)
    if isinstance(item, PreTrainedModel) or (isinstance(item, nn.Module) and is_adapted(item)):
        return _model_reward(item, _tokenizer_of(item, tokenizer), tokenizer, type(item).__name__)
    if callable(item):
        return FunctionReward(item)
    path = Path(str(item)).expanduser()
    if (str(item) and path.exists()) or path.suffix in (".ckpt", ".gguf") or "/" in str(item):
        own = load_tokenizer(str(item))
        return ModelReward(load_reward_backbone(str(item), own, dtype, trained=True), own, tokenizer, _name_of(path))
    named = _imported(str(item))
    return _source(named, tokenizer, dtype) if isinstance(named, Judge | Ensemble) else FunctionReward(named)


def _model_reward(network: Any, own: PreTrainedTokenizerBase, policy_tokenizer: PreTrainedTokenizerBase, name: str) -> ModelReward:
    """A copy of the user's model, which stays as it is."""
    network = copy.deepcopy(network)
    if is_adapted(network):
        network = network.merge_and_unload()
    return ModelReward(load_reward_backbone(network, own, "auto", trained=True), own, policy_tokenizer, name)


def _tokenizer_of(model: Any, policy_tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer beside the model's files; the policy's for a model that was made in memory and fits it."""
    if model.config.name_or_path:
        return load_tokenizer(model.config.name_or_path)
    if highest_token_id(policy_tokenizer) >= model.get_input_embeddings().num_embeddings:
        raise InputError(
            f"model.reward_funcs has a {type(model).__name__} without a tokenizer, and the policy's does not fit it: "
            "give RewardModel(model, tokenizer=...)."
        )
    return policy_tokenizer


def _name_of(path: Path) -> str:
    """The run's folder for its checkpoint or export, the folder's own name otherwise."""
    path = path.absolute()
    if path.suffix == ".ckpt" and path.parent.name == "checkpoints":
        path = path.parent.parent
    elif path.name == "export":
        path = path.parent
    return path.stem if path.suffix in (".ckpt", ".gguf") else path.name


def _imported(name: str) -> RewardFunction | Judge | Ensemble:
    """The function, judge or ensemble that a dotted name such as `my_rewards.politeness` stands for."""
    module, _, attribute = name.rpartition(".")
    fix = "give a folder, a checkpoint, a hub name with a '/', or a dotted name such as my_rewards.politeness of a function"
    if not module or not all(part.isidentifier() for part in name.split(".")):
        raise InputError(f"model.reward_funcs is {name!r}, which is neither an existing path nor a dotted name: {fix}.")
    try:
        function = getattr(importlib.import_module(module), attribute, None)
    except ImportError as error:
        raise InputError(f"model.reward_funcs is {name!r}, which could not be imported ({error}): {fix}.") from error
    if function is None:
        raise InputError(f"model.reward_funcs is {name!r}, but {module} has no {attribute}: {fix}.")
    if not (callable(function) or isinstance(function, Ensemble)) or inspect.isclass(function):
        raise InputError(f"model.reward_funcs is {name!r}, which is a {type(function).__name__}: {fix}.")
    return function


def share_of_letter_e(completions: list[Any], **_: Any) -> list[float]:
    """A toy reward with a known best answer, for debug runs: the share of a completion's characters that are "e", in [0, 1]."""
    texts = [text if isinstance(text, str) else text[-1]["content"] for text in completions]
    return [text.count("e") / max(len(text), 1) for text in texts]
