"""A reference that follows the policy, rather than staying where the run began."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L
from lightning.pytorch.strategies import FSDPStrategy

from p3o_lightning.errors import InputError


class ReferenceSync(L.Callback):
    """Every few updates the reference becomes alpha x policy + (1 - alpha) x reference: TRL's `sync_ref_model` (TR-DPO, arXiv 2404.09656).

    It changes training: the KL that is paid for is that to where the policy was a while ago, so that it may go further than a fixed
    reference lets it. How to read the dashboard then: `objective/kl` falls at every move, and says no longer how far the policy is from
    where it began; nor does the KL-reward path compare with that of a run whose reference stays.

    The moved reference travels in checkpoints, which grow by its size; a resumed run repeats the uninterrupted one to the bit. A rollout
    that is being trained on keeps the KL that it was made with. Not with LoRA, whose reference is the model under the adapter.

    Args:
        ref_model_mixup_alpha: share of the policy in the new reference, in (0, 1]; 1 replaces it. TRL's name and default.
        ref_model_sync_steps: optimizer updates between two moves. TRL's name and default.
    """

    def __init__(self, ref_model_mixup_alpha: float = 0.6, ref_model_sync_steps: int = 512) -> None:
        super().__init__()
        if not 0 < ref_model_mixup_alpha <= 1:
            raise InputError(f"ReferenceSync.ref_model_mixup_alpha is {ref_model_mixup_alpha}: choose a share in (0, 1], e.g. 0.6.")
        if ref_model_sync_steps < 1:
            raise InputError(f"ReferenceSync.ref_model_sync_steps is {ref_model_sync_steps}: choose at least 1 update.")
        self.ref_model_mixup_alpha, self.ref_model_sync_steps = ref_model_mixup_alpha, ref_model_sync_steps
        self.seen_step = 0  # updates at the end of the latest batch

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Refuse what cannot be mixed; count from the step that the run starts or resumes at."""
        self.seen_step = trainer.global_step
        if not hasattr(pl_module, "move_reference"):
            raise InputError(f"ReferenceSync: a {type(pl_module).__name__} has no reference to move: attach it to a PairwisePolicy.")
        if pl_module.adapter_is_policy:
            raise InputError("ReferenceSync: with LoRA the reference is the model under the adapter, which stays: train all weights.")
        if isinstance(trainer.strategy, FSDPStrategy):
            raise InputError("ReferenceSync: FSDPStrategy splits policy and reference in different ways: set trainer.strategy to fsdp2.")
        ours, theirs = ({name: value.shape for name, value in model.named_parameters()} for model in (pl_module.model, pl_module.reference))
        if ours != theirs:
            raise InputError(
                "ReferenceSync: model.reference is of another shape than the policy, so they cannot be mixed: give one like it."
            )

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Move it, where an update has just ended and a move is due. LastCheckpoint comes after all others: it saves what has moved."""
        step, before = trainer.global_step, self.seen_step
        self.seen_step = step
        if step != before and step % self.ref_model_sync_steps == 0:
            pl_module.move_reference(self.ref_model_mixup_alpha)
