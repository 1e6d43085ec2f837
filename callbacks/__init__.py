"""Observers to attach to a Trainer, in YAML by short name or in user code. Training is the same without them.

`ReferenceSync` is the exception: it moves the reference.
"""

from lightning.pytorch import Callback

from p3o_lightning.callbacks.alarms import CollapseAlarm, KLBudget
from p3o_lightning.callbacks.best import BestAtKL
from p3o_lightning.callbacks.checkpoint import LastCheckpoint
from p3o_lightning.callbacks.dashboard import Dashboard
from p3o_lightning.callbacks.export import Export
from p3o_lightning.callbacks.finite import FiniteGuard
from p3o_lightning.callbacks.frontier import FrontierPath
from p3o_lightning.callbacks.gaps import RewardGap
from p3o_lightning.callbacks.predictions import PredictionWriter
from p3o_lightning.callbacks.reference import ReferenceSync
from p3o_lightning.callbacks.reliability import Reliability
from p3o_lightning.callbacks.rollouts import RolloutObserver
from p3o_lightning.callbacks.samples import SampleTable
from p3o_lightning.callbacks.throughput import Throughput


def observers() -> list[Callback]:
    """What `p3o fit` attaches to every run, beside the callbacks that have a section of their own. Each does nothing for other stages."""
    return [Dashboard(), SampleTable(), RewardGap(), FrontierPath(), Reliability(), Throughput()]


__all__ = [
    "BestAtKL",
    "CollapseAlarm",
    "Dashboard",
    "Export",
    "FiniteGuard",
    "FrontierPath",
    "KLBudget",
    "LastCheckpoint",
    "PredictionWriter",
    "ReferenceSync",
    "Reliability",
    "RewardGap",
    "RolloutObserver",
    "SampleTable",
    "Throughput",
    "observers",
]
