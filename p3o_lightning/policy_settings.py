"""What the settings of a PairwisePolicy may be."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from p3o_lightning.baselines import OBJECTIVES as RELATIVES
from p3o_lightning.batches import Experience
from p3o_lightning.errors import InputError
from p3o_lightning.sampler_correction import CORRECTIONS

_NOT_SETTINGS = ("token_logps", "experience", "values", "kl_coef", "clip_range")  # given by PairwisePolicy
_OF_P3O = {
    "clipping": "joint",
    "clip_level": "sequence",
    "clip_reference_length": None,
    "weight_cap": 10.0,
    "cross_weight": True,
    "kl_source": "current",
    "gap_scale": None,
}  # at rest
_READ_SCORES = ("reinforce", "ppo")  # not their differences within a prompt


def check_settings(given: dict[str, Any]) -> None:
    """Stop at the first setting out of range, naming it, its value and the fix."""
    for name, valid, wanted in (
        ("num_generations", given["num_generations"] >= 2, "at least 2 responses a prompt, since the loss compares them"),
        ("num_iterations", given["num_iterations"] >= 1, "at least 1 pass over a rollout"),
        ("micro_batch_size", given["micro_batch_size"] is None or given["micro_batch_size"] >= 1, "at least 1 prompt, or null"),
        ("clip_range", given["clip_range"] is None or given["clip_range"] > 0, "a number above 0, e.g. 0.2"),
        (
            "clip_reference_length",
            given["clip_reference_length"] is None or given["clip_reference_length"] >= 1,
            "a usual response length of at least 1 token, or null",
        ),
        (
            "missing_eos_penalty",
            given["missing_eos_penalty"] is None or given["missing_eos_penalty"] >= 0,
            "0 or more reward units to subtract, or null",
        ),
        ("weight_cap", given["weight_cap"] >= 1, "a number of at least 1, e.g. 10"),
        ("kl_coef", given["kl_coef"] >= 0, "0 or more reward units per nat, e.g. 0.05"),
        ("kl_target", given["kl_target"] is None or given["kl_target"] > 0, "a number of nats above 0, or null for a fixed kl_coef"),
        ("kl_coef", given["kl_target"] is None or given["kl_coef"] > 0, "a price above 0 for kl_target to steer, e.g. 0.05"),
        ("kl_horizon", given["kl_horizon"] >= 1, "a number of responses of at least 1"),
        ("objective", given["objective"] == "p3o" or given["objective"] in RELATIVES, f"one of p3o, {', '.join(RELATIVES)}"),
        ("clipping", given["clipping"] in ("joint", "separate"), "joint or separate"),
        ("clip_level", given["clip_level"] in ("sequence", "token"), "sequence or token"),
        # p3o_token_loss has the joint form alone: a separate one would be left out in silence
        ("clip_level", given["clip_level"] == "sequence" or given["clipping"] == "joint", "sequence with clipping: separate"),
        # a response's length says nothing about how far one of its tokens may go
        (
            "clip_reference_length",
            given["clip_reference_length"] is None or given["clip_level"] == "sequence",
            "null with clip_level: token",
        ),
        ("cross_weight", given["cross_weight"] or given["clipping"] == "separate", "true with clipping: joint, which has no other form"),
        ("kl_source", given["kl_source"] in ("current", "rollout"), "current or rollout"),
        ("gap_scale", given["gap_scale"] in (None, "rms"), "rms or null"),
        ("generation", given["generation"] in ("local", "vllm"), "local or vllm"),
        ("vllm_timeout", given["vllm_timeout"] > 0, "a number of seconds above 0, e.g. 600"),
        ("sampler_correction", given["sampler_correction"] in (None, *CORRECTIONS), "truncate, mask or null"),
        ("sampler_cap", given["sampler_cap"] >= 1, "a number of at least 1, e.g. 3"),
        # cut, the server's probabilities are of other events than the policy's, and no weight makes up for what it never draws
        ("top_p", given["generation"] == "local" or given["top_p"] == 1, "1 with generation: vllm"),
        ("top_k", given["generation"] == "local" or given["top_k"] == 0, "0 with generation: vllm"),
    ):
        if not valid:
            raise InputError(f"model.{name} is {given[name]!r}: choose {wanted}.")
    _check_objective(given)


def check_feedback(objective: str, judged: bool) -> None:
    """Stop where a judge, which gives differences alone, is to feed an objective that reads a reward as it is."""
    if judged and objective in _READ_SCORES:
        raise InputError(
            f"model.objective is {objective!r}, which reads a score of each response, but model.reward_funcs has a judge, which only "
            f"compares: choose p3o, or another objective than {' and '.join(_READ_SCORES)}; or give a reward model or function."
        )


def clip_range_of(given: dict[str, Any]) -> float | None:
    """As given, or what the objective's own source has; None of one that clips nothing."""
    if given["clip_range"] is not None:
        return given["clip_range"]
    if given["objective"] == "p3o":
        return 0.2
    parameter = inspect.signature(RELATIVES[given["objective"]]).parameters.get("clip_range")
    return None if parameter is None else parameter.default


def settings_of_relative(given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the objective's function that do not change from batch to batch; of p3o, none."""
    objective, settings = given["objective"], dict(given["objective_settings"] or {})
    if objective == "dr_grpo":
        settings.setdefault("divisor", given["max_completion_length"])
    if given["clip_range"] is not None and objective != "p3o":
        settings["clip_range"] = given["clip_range"]
    return settings


def _check_objective(given: dict[str, Any]) -> None:
    """What only P3O reads is at rest in a relative; what a relative is given of its own, it takes, and by value."""
    objective, settings = given["objective"], given["objective_settings"] or {}
    taken = [] if objective == "p3o" else list(inspect.signature(RELATIVES[objective]).parameters)
    own = [name for name in taken if name not in _NOT_SETTINGS]
    for name in settings:
        if name not in own:
            fix = f"it takes {', '.join(own)}" if own else "it takes none, remove it"
            raise InputError(f"model.objective_settings has {name!r}, which objective {objective} does not take: {fix}.")
    if objective == "p3o":
        return
    for name, rest in _OF_P3O.items():
        if given[name] != rest:
            raise InputError(f"model.{name} is {given[name]!r}, which objective {objective} does not read: remove it, or choose p3o.")
    if given["generation"] == "vllm" and given["sampler_correction"] is not None:
        raise InputError(
            f"model.sampler_correction is {given['sampler_correction']!r}, but objective {objective} does not weigh by what drew the "
            "responses: set it to null, which takes the server for the policy, or choose p3o."
        )
    if given["clip_range"] is not None and "clip_range" not in taken:
        raise InputError(f"model.clip_range is {given['clip_range']!r}, but objective {objective} clips nothing: remove it.")
    _try_out(given)


def _try_out(given: dict[str, Any]) -> None:
    """Compute the loss of two made-up responses: the function itself says which values it refuses."""
    one = torch.zeros(1, 2, 1)
    made_up = Experience(
        prompt_tokens=torch.zeros(1, 1, dtype=torch.long),
        prompt_mask=torch.ones(1, 1, dtype=torch.bool),
        completion_tokens=torch.zeros(1, 2, 1, dtype=torch.long),
        completion_mask=torch.ones(1, 2, 1, dtype=torch.bool),
        old_token_logps=one,
        ref_token_logps=one,
        scores=torch.zeros(1, 2),
        values=one,
    )
    values = {"values": one} if given["objective"] == "ppo" else {}
    try:
        RELATIVES[given["objective"]](one, made_up, kl_coef=given["kl_coef"], **settings_of_relative(given), **values)
    except InputError as error:
        at = "" if str(error).startswith(("kl_coef", "clip_range ")) else "objective_settings."
        raise InputError(f"model.{at}{error}") from error
    except TypeError as error:  # a string for a number
        raise InputError(f"model.objective_settings is {given['objective_settings']!r}, which does not compute: {error}.") from error
