"""Reward sources: a reward model, a Python function with TRL's signature, an ensemble, a judge, or a weighted sum of several.

A score is one number a response; P3O reads only differences between the responses of one prompt, so a source's zero point
does not matter. A judge has no scores at all: it compares the responses of a prompt, and gives the differences themselves.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from p3o_lightning.ensembles import Ensemble, EnsembleReward
from p3o_lightning.errors import InputError
from p3o_lightning.forwards import is_adapted
from p3o_lightning.function_reward import FunctionReward, RewardFunction
from p3o_lightning.judges import Judge, group_gaps
from p3o_lightning.model_reward import ModelReward
from p3o_lightning.models import highest_token_id, load_reward_backbone
from p3o_lightning.responses import Responses
from p3o_lightning.tokenizers import load_tokenizer

RewardInput = str | Path | Judge | Ensemble | RewardFunction | nn.Module


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
