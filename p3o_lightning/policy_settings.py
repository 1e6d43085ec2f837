"""What the settings of a PairwisePolicy may be."""

from __future__ import annotations

from typing import Any

from p3o_lightning.errors import InputError


def check_settings(given: dict[str, Any]) -> None:
    """Stop at the first setting out of range, naming it, its value and the fix."""
    for name, valid, wanted in (
        ("num_generations", given["num_generations"] >= 2, "at least 2 responses a prompt, since the loss compares them"),
        ("num_iterations", given["num_iterations"] >= 1, "at least 1 pass over a rollout"),
        ("micro_batch_size", given["micro_batch_size"] is None or given["micro_batch_size"] >= 1, "at least 1 prompt, or null"),
        ("clip_range", given["clip_range"] > 0, "a number above 0, e.g. 0.2"),
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
        ("objective", given["objective"] == "p3o", "p3o"),
        ("clipping", given["clipping"] in ("joint", "separate"), "joint or separate"),
        ("clip_level", given["clip_level"] in ("sequence", "token"), "sequence or token"),
        ("kl_source", given["kl_source"] in ("current", "rollout"), "current or rollout"),
        ("gap_scale", given["gap_scale"] in (None, "rms"), "rms or null"),
    ):
        if not valid:
            raise InputError(f"model.{name} is {given[name]!r}: choose {wanted}.")
