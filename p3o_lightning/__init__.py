"""Reinforcement learning from human feedback by relative feedback: P3O (arXiv 2310.00212) on PyTorch Lightning.

The public names are imported when first asked for, so that `p3o --help` does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "DirectPreferencePolicy": "direct",
    "InputError": "errors",
    "PairwisePolicy": "policy",
    "PreferenceDataModule": "data",
    "RewardModel": "reward_model",
    "SupervisedPolicy": "supervised",
}
__all__ = [
    "DirectPreferencePolicy",
    "InputError",
    "PairwisePolicy",
    "PreferenceDataModule",
    "RewardModel",
    "SupervisedPolicy",
    "__version__",
]

if TYPE_CHECKING:
    from p3o_lightning.data import PreferenceDataModule
    from p3o_lightning.direct import DirectPreferencePolicy
    from p3o_lightning.errors import InputError
    from p3o_lightning.policy import PairwisePolicy
    from p3o_lightning.reward_model import RewardModel
    from p3o_lightning.supervised import SupervisedPolicy


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"p3o_lightning.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'p3o_lightning' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
