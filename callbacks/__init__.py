"""Observers to attach to a Trainer, in YAML by short name or in user code. Training is the same without them."""

from p3o_lightning.callbacks.alarms import CollapseAlarm, KLBudget
from p3o_lightning.callbacks.checkpoint import LastCheckpoint
from p3o_lightning.callbacks.export import Export
from p3o_lightning.callbacks.finite import FiniteGuard
from p3o_lightning.callbacks.predictions import PredictionWriter

__all__ = ["CollapseAlarm", "Export", "FiniteGuard", "KLBudget", "LastCheckpoint", "PredictionWriter"]
