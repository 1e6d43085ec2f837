"""What the TensorBoard dashboard shows of a whole run: charts in four groups, hyperparameters beside results, the learning rate."""

from __future__ import annotations

import inspect
import re
from typing import TYPE_CHECKING, Any

import lightning.pytorch as L
from lightning.pytorch.loggers import TensorBoardLogger
from torch.optim import Optimizer

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

LEARNING, SAFE, CONSISTENT, FAST = "1. Is it learning?", "2. Is it safe?", "3. Is it consistent?", "4. Is it fast?"
_FAST = {
    "tokens a second": ["throughput/tokens_per_second"],
    "seconds": [r"throughput/.+_seconds"],
    "memory at most, MiB": ["throughput/peak_memory_mib"],
    "learning rate": ["lr"],
}

# By kind of stage: group -> chart -> tags, as regular expressions. A chart of three tags that ends in "range" is a band: middle,
# low, high.
CHARTS: dict[str, dict[str, dict[str, list[str]]]] = {
    "prompts": {
        LEARNING: {
            "reward": ["objective/scores", "objective/rlhf_reward"],
            "reward on held-out prompts": ["val/scores"],
            "each reward source": [r"rewards/.+/mean"],
            "margin between the responses of a prompt": ["objective/scores_margin", "p3o/q_abs"],
        },
        SAFE: {
            "KL to the reference, nats": ["objective/kl_k1", "objective/kl_k3", "val/kl"],
            "price of KL": ["objective/kl_coef"],
            "entropy, nats": ["objective/entropy"],
            "pairs that teach nothing": ["p3o/duplicate_pair_rate", "p3o/tie_rate"],
            "response length, range": ["completions/mean_length", "completions/min_length", "completions/max_length"],
            "responses that ended": ["val/contain_eos_token", "val/ended"],
        },
        CONSISTENT: {
            "importance weight": ["val/ratio", "val/ratio_var"],
            "clipped": ["p3o/pair_clipfrac", "policy/clipfrac_avg"],
            "drift within a rollout, nats": ["p3o/gap_logratio", "policy/approxkl_avg"],
            "largest joint weight": ["p3o/joint_weight_max"],
            "updates left out": ["finite/skipped"],
        },
        FAST: _FAST,
    },
    "pairs": {
        LEARNING: {
            "loss, nats a pair": ["loss", "val/log_loss"],
            "accuracy on held-out pairs, range": ["val/accuracy", "val/accuracy_low", "val/accuracy_high"],
            "accuracy, and what the length rule reaches": ["accuracy", "val/accuracy", "val/length_rule_accuracy"],
            "margin": ["margin", "val/margin"],
        },
        SAFE: {"calibration error": ["val/ece"], "Brier score": ["val/brier"]},
        CONSISTENT: {"updates left out": ["finite/skipped"]},
        FAST: _FAST,
    },
    "preferences": {
        LEARNING: {
            "loss": ["loss", "val/loss"],
            "accuracy": ["rewards/accuracies", "val/rewards/accuracies"],
            "margin": ["rewards/margins", "val/rewards/margins"],
        },
        SAFE: {"both rewards: chosen should fall less": ["rewards/chosen", "rewards/rejected"]},
        CONSISTENT: {"updates left out": ["finite/skipped"]},
        FAST: _FAST,
    },
    "demonstrations": {
        LEARNING: {"loss, nats a token": ["loss", "val/loss"]},
        SAFE: {"training below held out: it learns by heart": ["loss", "val/loss"]},
        CONSISTENT: {"updates left out": ["finite/skipped"]},
        FAST: _FAST,
    },
}

# What runs are compared by; the HPARAMS tab shows the latest value of each.
RESULTS = {
    "prompts": ["objective/scores", "objective/kl", "objective/rlhf_reward", "val/scores", "val/kl"],
    "pairs": ["val/accuracy", "val/log_loss", "val/ece", "val/length_rule_accuracy"],
    "preferences": ["val/loss", "val/rewards/accuracies", "val/rewards/margins"],
    "demonstrations": ["loss", "val/loss"],
}


def kind_of(pl_module: L.LightningModule) -> str | None:
    """A key of CHARTS: what the stage consumes, and of what consumes pairs whether it is a policy; None of a stage of other people's."""
    view = getattr(pl_module, "view", None)
    kind = "preferences" if view == "pairs" and hasattr(type(pl_module), "reference") else view
    return kind if kind in CHARTS else None


def writers(trainer: L.Trainer) -> list[SummaryWriter]:
    """TensorBoard's writers of this run; none on other ranks than the first, nor with other loggers."""
    if not trainer.is_global_zero:
        return []
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


class Dashboard(L.Callback):
    """Lays out TensorBoard: the CUSTOM SCALARS tab in four groups, the HPARAMS tab with settings beside results, `lr`.

    How to read it: go through the groups in order. A run that learns while KL explodes, or that is safe because nothing moves, shows in
    the next group. In HPARAMS every run is a row, and its results are the latest values of their tags, so that runs that are under way
    or were stopped compare too. A reward source with weight 0, a gold reward say, is a result as well.
    """

    def __init__(self) -> None:
        super().__init__()
        self._written = False
        self._end: Any = None  # the record that closes the session

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget a former fit."""
        self._written = False

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        """Write layout and settings once training begins: a run that stops before leaves no folder."""
        kind = kind_of(pl_module)
        if self._written or kind is None:
            return
        self._written = True
        each = [f"rewards/{name}/mean" for name in reward_names(pl_module)]
        results = [*RESULTS[kind][:2], *each, *RESULTS[kind][2:]]  # the tab shows five of them, until it is asked for the others
        for writer in writers(trainer):
            writer.add_custom_scalars(layout(kind))
            experiment, start, self._end = session(settings(trainer, pl_module), results, changed(pl_module))
            for record in (experiment, start):
                writer._get_file_writer().add_summary(record)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """`lr`: of the first group of parameters, at this update."""
        pl_module.log("lr", float(optimizer.param_groups[0]["lr"]), batch_size=1)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Mark the session as ended."""
        for writer in writers(trainer) if self._written else []:
            writer._get_file_writer().add_summary(self._end)


def layout(kind: str) -> dict[str, dict[str, list[Any]]]:
    """The charts of a stage as `SummaryWriter.add_custom_scalars` takes them."""
    groups: dict[str, dict[str, list[Any]]] = {}
    for group, charts in CHARTS[kind].items():
        groups[group] = {}
        for title, tags in charts.items():
            # a band is drawn from tags, lines from regular expressions
            band = title.endswith(", range")
            groups[group][title] = ["Margin", tags] if band else ["Multiline", [f"^{tag}$" for tag in tags]]
    return groups


def reward_names(pl_module: Any) -> list[str]:
    """The reward sources of a policy, where there are several."""
    names = [source.name for source in getattr(getattr(pl_module, "rewards", None), "sources", [])]
    return names if len(names) > 1 else []


def settings(trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
    """What runs may differ in, flat: settings of model and data, and of the Trainer what changes the result."""
    data = getattr(trainer, "datamodule", None)
    sections = {"model": dict(pl_module.hparams), "data": dict(getattr(data, "hparams", None) or {})}
    sections["trainer"] = {
        "max_steps": trainer.max_steps,
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "gradient_clip_val": trainer.gradient_clip_val,
        "precision": str(trainer.precision),
        "processes": trainer.world_size,
    }
    named = ((f"{section}/{name}", value) for section, given in sections.items() for name, value in given.items() if name[0] != "_")
    return {name: _plain(value) for name, value in named}


def changed(pl_module: L.LightningModule) -> set[str]:
    """The settings of the model that are not at their defaults, by the names in `settings`."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(type(pl_module)).parameters.items()}
    given = {name: value for name, value in pl_module.hparams.items() if name[0] != "_"}
    return {f"model/{name}" for name, value in given.items() if value != defaults.get(name, inspect.Parameter.empty)}


def session(given: dict[str, Any], results: list[str], first: set[str]) -> tuple[Any, Any, Any]:
    """What the HPARAMS tab reads: which columns there are, the settings of this run, and the mark that it has ended.

    The tab shows the columns in the order of names, but those that it takes to differ between runs before: `first` are marked so.
    """
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
    from torch.utils.tensorboard.summary import hparams

    experiment, start, end = hparams(given, dict.fromkeys(results, 0.0))
    plugin = experiment.value[0].metadata.plugin_data
    columns = HParamsPluginData.FromString(plugin.content)
    for column in columns.experiment.hparam_infos:
        column.differs = column.name in first
    plugin.content = columns.SerializeToString()
    return experiment, start, end


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, bool | int | float | str) else re.sub(r"\s+", " ", str(value))
