"""Whether a reward model is as sure as it is right."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L
import torch

from p3o_lightning.callbacks import pictures
from p3o_lightning.callbacks.dashboard import writers
from p3o_lightning.callbacks.rollouts import just_made
from p3o_lightning.metrics import PairReport, wilson_interval


class Reliability(L.Callback):
    """`reliability` in the IMAGES tab after every validation of a reward model: how often it is right, over how sure it is.

    How to read it: on the diagonal, of the pairs that it is 80 % sure of it has 80 % right. Below: it is too sure, and a policy will find
    what it is wrongly sure of; train it less, or with `label_smoothing`. Above: its rewards are too small, which a lower `kl_coef` makes
    up for. The bars are 95 % intervals: judge no bin whose bar meets the diagonal. A dot's area is the bin's share of the pairs.

    It needs matplotlib: pip install matplotlib.
    """

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Draw it, before the module starts a new report. Collective: every rank brings its pairs."""
        report = getattr(pl_module, "report", None)
        if not isinstance(report, PairReport) or trainer.sanity_checking or not trainer.loggers or not pictures.can_draw():
            return
        with report.sync_context(should_sync=trainer.world_size > 1):
            if (targets := writers(trainer)) and float(report.pairs) > 0:
                pictures.show(targets, "reliability", self.draw(report), just_made(trainer))

    def draw(self, report: PairReport) -> Any:
        """The curve as a matplotlib figure."""
        figure, axes = pictures.blank("Reliability, held-out pairs", "confidence, max(p, 1 - p)", "share of pairs that are right")
        pairs = report.bin_pairs.double().cpu()
        kept = pairs > 0
        pairs, right = pairs[kept], report.bin_correct.double().cpu()[kept]
        sure, share = report.bin_confidence.double().cpu()[kept] / pairs, right / pairs
        low, high = wilson_interval(right, pairs)
        axes.plot([0.5, 1], [0.5, 1], color="0.6", linestyle="--", linewidth=1)
        bars = torch.stack([share - low, high - share]).clamp(min=0)
        axes.errorbar(sure.tolist(), share.tolist(), yerr=bars.tolist(), color="tab:blue", elinewidth=1, capsize=2)
        axes.scatter(sure.tolist(), share.tolist(), s=(20 + 200 * pairs / pairs.sum()).tolist(), color="tab:blue", zorder=3)
        axes.set(xlim=(0.49, 1.01), ylim=(-0.02, 1.02))
        return figure
