"""On resume the command line beats the checkpoint: what was changed is used and said, or refused with the reason."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L
from torch.optim import Optimizer

from p3o_lightning.errors import InputError


class CommandLineWins(L.Callback):
    """On resume, the optimizer's settings are those of the config: its saved state would bring back the checkpoint's, without a word."""

    def __init__(self, configured: list[Optimizer]) -> None:
        self.configured = configured  # made of the config, never stepped

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """After everything is restored. Where nothing was changed, nothing changes."""
        for optimizer, wanted in zip(trainer.optimizers, self.configured, strict=False):
            for group, given in zip(optimizer.param_groups, wanted.param_groups, strict=False):
                group.update({name: value for name, value in given.items() if name not in ("params", "lr", "initial_lr")})
                before, now = group.get("initial_lr", group["lr"]), given.get("initial_lr", given["lr"])
                if before != now:
                    group["lr"] = group["lr"] * now / before if before else now  # a schedule stays where it was
                    if "initial_lr" in group:
                        group["initial_lr"] = now
        for config in trainer.lr_scheduler_configs:
            if hasattr(config.scheduler, "base_lrs"):
                config.scheduler.base_lrs = [group["initial_lr"] for group in config.scheduler.optimizer.param_groups]


def changed_settings(checkpoint: dict[str, Any], settings: Any) -> dict[str, tuple[Any, Any]]:
    """Settings of model and data that differ from the checkpoint's: key -> (before, now)."""
    plain = (int, float, str, bool, type(None))
    changed = {}
    for section, saved in (("model", "hyper_parameters"), ("data", "datamodule_hyper_parameters")):
        now = (settings.get(section) or {}).get("init_args") or {}
        for name, before in (checkpoint.get(saved) or {}).items():
            if name in now and isinstance(before, plain) and isinstance(now[name], plain) and before != now[name]:
                changed[f"{section}.{name}"] = before, now[name]
    return changed


def check_changes(checkpoint: dict[str, Any], changed: dict[str, tuple[Any, Any]], settings: Any) -> None:
    """Refuse what a resumed run could not use."""
    given = settings.ckpt_path
    if settings.model.get("init_args", {}).get("kl_target") is not None and "model.kl_coef" in changed and "model.kl_target" not in changed:
        before, now = changed["model.kl_coef"]
        raise InputError(
            f"model.kl_coef is {now}, but with model.kl_target the price of KL goes on from where {given!r} left it: leave it at {before}, "
            "or set model.kl_target to null."
        )
    if all(share is None for share in checkpoint.get("p3o_experience", {}).get("pending") or []):
        return
    for key in ("data.batch_size", "model.micro_batch_size", "model.num_iterations"):
        if key in changed:  # inside a rollout, what cuts it into updates must stay; at its end it may change
            before, now = changed[key]
            raise InputError(
                f"{key} is {now}, but {given!r} stopped inside a rollout that was begun with {before}: resume with {before}, or "
                "start afresh from its weights by --model.model."
            )


def optimizers_of(configured: Any) -> list[Optimizer]:
    """Those that `configure_optimizers` made, in the forms that our stages use; a subclass may return others, which are left alone."""
    if isinstance(configured, dict):
        configured = configured.get("optimizer")
    return [configured] if isinstance(configured, Optimizer) else []
