"""The frozen policy that a policy's KL is measured from, and how it is held to be the one that the run started with."""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from p3o_lightning.casting import buffers_kept
from p3o_lightning.errors import InputError
from p3o_lightning.forwards import is_adapted, turn_dropout_off
from p3o_lightning.models import CHECKPOINT_KEY, ModelSource, load_policy, read_checkpoint
from p3o_lightning.sharding import blend, load_whole, place_frozen, whole_state_dict
from p3o_lightning.stage import Stage

_WEIGHTS = "p3o_reference_weights"  # where a checkpoint has those of a reference that has moved


class ReferencedPolicy(Stage):
    """A policy with a reference: a frozen copy of it as it starts (with LoRA: itself with its adapter switched off), or a model of its own.

    The reference is no submodule: it is not trained, and not saved unless it was moved; a checkpoint has its hash. A subclass calls
    `keep_reference` in its constructor.
    """

    def keep_reference(self, source: ModelSource | None, dtype: str) -> None:
        """Remember what the reference is to be made of; None is the policy as it starts."""
        self._reference_source = (source,)  # in a tuple, so that a model given as an object is no submodule: not saved, not moved
        self._reference_dtype = dtype
        self._reference: list[nn.Module] = []  # in a list, so that it is no submodule: neither saved nor optimised
        self._reference_hash: str | None = None  # of the reference as it was made
        self._reference_hash_saved: str | None = None  # of the one that the loaded checkpoint was trained against
        self._reference_moved = False  # since it was made: checkpoints then have its weights
        self._reference_weights: dict[str, Tensor] | None = None  # of one that had moved, to be put into it when it is made

    @property
    def own_reference(self) -> bool:
        """Whether the reference was given, rather than being the policy as it starts."""
        return self._reference_source[0] is not None

    @property
    def adapter_is_policy(self) -> bool:
        """Whether the reference is the policy with its adapter switched off."""
        return is_adapted(self.model) and not self.own_reference

    @property
    def reference(self) -> nn.Module:
        """The frozen reference; made when first asked for, which `setup` does before anything is trained or restored."""
        if self.adapter_is_policy:
            return self.model
        if not self._reference:
            given = self._reference_source[0]
            source = self.model if given is None else given
            model = copy.deepcopy(source) if isinstance(source, nn.Module) else load_policy(source, self.tokenizer, self._reference_dtype)
            turn_dropout_off(model)
            if self._reference_weights is None:
                self._reference_hash = fingerprint(model)  # now: a lower precision of the Trainer's would change it later
                self._check_reference()
            else:
                model.load_state_dict(self._reference_weights)
                self._reference_weights = None
            self._reference.append(model.eval().requires_grad_(False).to(self.device))
        return self._reference[0]

    def _check_reference(self) -> None:
        """Another reference than the checkpoint's would silently change the objective."""
        if None not in (self._reference_hash, self._reference_hash_saved) and self._reference_hash != self._reference_hash_saved:
            raise InputError(
                "model.reference differs from the one that the checkpoint was trained against: give the same model (and seed_everything, "
                "if it is made from scratch), or model.reference, the policy that the run started from."
            )

    def move_reference(self, share: float) -> None:
        """Make the reference share x policy + (1 - share) x reference, weight by weight; its weights then travel in checkpoints."""
        blend(self.reference, self.model, share)
        self._reference_moved = True

    # ---- Lightning's hooks

    def setup(self, stage: str) -> None:
        """Freeze the reference while the policy is whole, and before the checkpoint's weights replace it."""
        if stage != "predict" and not self.adapter_is_policy:
            with buffers_kept(self.reference):
                self.trainer.precision_plugin.convert_module(self.reference)  # as Lightning does with the policy

    @property
    def frozen_models(self) -> list[nn.Module]:
        """The reference, once it is made; with LoRA there is none."""
        return [*self._reference]

    def configure_model(self) -> None:
        """As in Stage; the frozen models go to the device, or are split too."""
        super().configure_model()
        for model in self.frozen_models:
            place_frozen(self.trainer.strategy, model)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """As in Stage, and which reference it was; of one that has moved, its weights."""
        super().on_save_checkpoint(checkpoint)
        if self._reference_moved:
            checkpoint[_WEIGHTS] = whole_state_dict(self._reference[0]) if self._reference else self._reference_weights
        checkpoint["p3o_reference"] = self._reference_hash or self._reference_hash_saved

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """As in Stage; hold the reference to the checkpoint's, now or when it is made."""
        super().on_load_checkpoint(checkpoint)
        self._reference_hash_saved, moved = checkpoint["p3o_reference"], checkpoint.get(_WEIGHTS)
        if moved is None and self._reference_moved:
            raise InputError("ckpt_path is of before the reference was moved, but this module's has been: fit a new module from it.")
        if moved is None:
            self._check_reference()
            return
        self._reference_moved, self._reference_hash = True, None  # the weights themselves are there: where they came from does not matter
        if self._reference:
            load_whole(self._reference[0], moved)
        else:
            self._reference_weights = moved

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls, checkpoint_path: str | Path, map_location: torch.device | str | None = None, **arguments: Any
    ) -> Self:
        """As in Stage. The reference is the model that the run started from, where the checkpoint names it; with LoRA it is inside.

        Where the run started from an object or from scratch, pass `reference` to train or evaluate on; prediction and export need none.
        """
        checkpoint = read_checkpoint(Path(checkpoint_path))
        saved = checkpoint["hyper_parameters"]
        if checkpoint[CHECKPOINT_KEY]["peft"] is None:
            arguments.setdefault("reference", saved.get("reference") or saved.get("model"))
        return super().load_from_checkpoint(checkpoint_path, map_location, **arguments)


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of every weight, in order: equal for equal models."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
