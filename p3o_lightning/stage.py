"""What the three stages have in common: a transformers model with its tokenizer, an optimizer, and how both are saved."""

from __future__ import annotations

import copy
import inspect
import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
import torch.distributed
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim import Optimizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import Self

from p3o_lightning.casting import buffers_kept
from p3o_lightning.compiling import check_compiler, compile_layers
from p3o_lightning.errors import InputError
from p3o_lightning.forwards import is_adapted, unwrapped
from p3o_lightning.hub import prepare_repository, push_folder
from p3o_lightning.model_card import HEAD, model_card
from p3o_lightning.models import (
    CHECKPOINT_KEY,
    ModelSource,
    attach_adapter,
    config_of,
    describe,
    from_description,
    read_checkpoint,
)
from p3o_lightning.processor import bfloat16_is_emulated
from p3o_lightning.scoring import rows_apart
from p3o_lightning.sharding import is_split, prepare_split, splits, whole_state_dict, whole_weights
from p3o_lightning.text import visible
from p3o_lightning.tokenizers import load_tokenizer, reads_alike, tokenizer_source


class Stage(L.LightningModule):
    """One stage of the pipeline around one trained model, `self.model`, with its `self.tokenizer`.

    `view` names what the stage consumes; the data module asks for it. Plain arguments are saved as hyperparameters;
    objects (models, functions) are not, so that checkpoints load with `weights_only=True`.
    """

    view: str

    def __init__(
        self,
        model: ModelSource,
        load: Callable[[ModelSource, PreTrainedTokenizerBase, str], PreTrainedModel],
        *,
        tokenizer: str | PreTrainedTokenizerBase | None,
        peft_config: dict[str, Any] | Any | None,
        dtype: str,
        torch_compile: bool,
        lr: float,
        optimizer: OptimizerCallable | None,
        lr_scheduler: LRSchedulerCallable | None,
        arguments: dict[str, Any],
    ) -> None:
        super().__init__()
        if not lr > 0:
            raise InputError(f"model.lr is {lr}: choose a learning rate above 0, e.g. 1e-5.")
        self.tokenizer = self.prepare_tokenizer(load_tokenizer(tokenizer_source(model) if tokenizer is None else tokenizer))
        self.model: Any = load(model, self.tokenizer, dtype)
        if peft_config is not None:
            self.model = attach_adapter(self.model, peft_config)
        self.model.train()  # from_pretrained returns eval mode, which Lightning would keep
        self.lr, self.optimizer, self.lr_scheduler = lr, optimizer, lr_scheduler
        self.torch_compile = torch_compile
        self._described: dict[str, Any] | None = None  # what every checkpoint says of model and tokenizer
        self.save_hyperparameters({name: value for name, value in arguments.items() if _is_plain(value)})

    def prepare_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
        """Adapt the tokenizer before the model is loaded; the reward model needs a padding token of its own."""
        return tokenizer

    @property
    def frozen_models(self) -> list[nn.Module]:
        """The models beside the trained one."""
        return []

    def on_fit_start(self) -> None:
        """Compile the layers of all models, if it is asked for; say so where the precision is a slow one."""
        if self.device.type == "cpu" and self._product_dtype() == torch.bfloat16 and bfloat16_is_emulated():
            rank_zero_warn(
                f"trainer.precision is {self.trainer.precision}, weights are {self.model.dtype}, and this CPU has no units for bfloat16: "
                "matrix products take some ten times as long as in float32. Set trainer.precision to 32-true and model.dtype to float32."
            )
        if not self.torch_compile:
            return
        if splits(self.trainer.strategy):
            raise InputError("model.torch_compile is true, but the strategy splits the model over processes: leave one of the two out.")
        if self.device.type == "cpu":
            check_compiler()
        for model in (self.model, *self.frozen_models):
            compile_layers(model)

    def _product_dtype(self) -> torch.dtype:
        """In which the run multiplies matrices."""
        one = torch.ones(1, 1, dtype=self.model.dtype)
        with self.trainer.precision_plugin.forward_context():
            return torch.mm(one, one).dtype

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """As in torch, which Lightning calls for `precision: bf16-true`; see `buffers_kept`."""
        with buffers_kept(self):
            return super().to(*args, **kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """As in torch, which moves by it; the frozen models follow to the device."""
        super()._apply(fn, recurse)
        for model in self.frozen_models:
            model.to(self.device)
        return self

    # ---- several processes

    def configure_model(self) -> None:
        """Split the model over the processes where the strategy does (fsdp2, FSDPStrategy)."""
        prepare_split(self.trainer.strategy, self.model)

    @property
    def _root(self) -> nn.Module | None:
        """What the strategy trains: this module, or a wrapper around it."""
        return None if self._trainer is None else self.trainer.strategy.model

    def whole_weights(self) -> AbstractContextManager[None]:
        """Inside, every process holds the whole model, so that loops of unequal length on them need not wait for each other."""
        return whole_weights(self.model, self._root)

    def rows_apart(self) -> AbstractContextManager[None]:
        """Inside, every text has a row of its own in the model's forward, so that what its modules give can be told apart by row."""
        return rows_apart()

    def over_processes(self, figures: dict[str, Tensor]) -> dict[str, Tensor]:
        """Scalar figures of all processes, on the module's device, in one exchange: least of a min, greatest of a max, mean of others."""
        figures = {name: value.to(self.device) for name, value in figures.items()}  # rewards come from the CPU
        if self._trainer is None or self.trainer.world_size == 1:
            return figures
        values = torch.stack([value.detach().float() for value in figures.values()])
        everyone = [torch.empty_like(values) for _ in range(self.trainer.world_size)]
        torch.distributed.all_gather(everyone, values)
        columns = torch.stack(everyone, 1)
        return {name: _OVER.get(_kind(name), torch.mean)(column) for name, column in zip(figures, columns, strict=True)}

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Lightning's, but for FSDP1, whose gradients' norm only its own wrapper can compute."""
        if isinstance(self._root, FullyShardedDataParallel) and gradient_clip_val and gradient_clip_algorithm in (None, "norm"):
            self._root.clip_grad_norm_(gradient_clip_val)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    # ---- optimisation

    def configure_optimizers(self) -> Any:
        """AdamW with betas (0.9, 0.95) and no weight decay unless `optimizer` says otherwise; the schedule steps once an update."""
        trainable = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = _adamw(trainable, self.lr) if self.optimizer is None else self.optimizer(trainable)
        if self.lr_scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.lr_scheduler(optimizer), "interval": "step"}}

    # ---- checkpoints and export

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Describe the model and its tokenizer, so that the checkpoint alone is a model source."""
        checkpoint[CHECKPOINT_KEY] = self._description()

    def _description(self) -> dict[str, Any]:
        if self._described is None:  # it does not change, and a large tokenizer takes a while to write
            self._described = {"stage": type(self).__name__, **describe(self.model, self.tokenizer)}
        return self._described

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to resume from another stage's checkpoint."""
        stage = checkpoint.get(CHECKPOINT_KEY, {}).get("stage")
        if stage != type(self).__name__:
            raise InputError(
                f"ckpt_path is a checkpoint of {stage or 'other code'}, but {type(self).__name__} is to be resumed: give one of its own. "
                "To start from the model in it, give it as model.model."
            )

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls, checkpoint_path: str | Path, map_location: torch.device | str | None = None, **arguments: Any
    ) -> Self:
        """The stage as it was saved. Model and tokenizer come from the checkpoint alone.

        Args:
            checkpoint_path: a checkpoint of this class.
            map_location: the device that it is moved to; None leaves it on the CPU, wherever it was trained.
            **arguments: constructor arguments that replace the saved ones.
        """
        checkpoint = read_checkpoint(Path(checkpoint_path))
        about = checkpoint[CHECKPOINT_KEY]
        if about["stage"] != cls.__name__:
            raise InputError(
                f"{str(checkpoint_path)!r} holds a {about['stage']}, not a {cls.__name__}: use {about['stage']}.load_from_checkpoint."
            )
        itself = {"model": config_of(checkpoint), "peft_config": about["peft"], "tokenizer": str(checkpoint_path)}
        stage = cls(**{**checkpoint["hyper_parameters"], **itself, **arguments})
        stage.load_state_dict(checkpoint["state_dict"])
        stage.on_load_checkpoint(checkpoint)
        return stage if map_location is None else stage.to(map_location)

    def export(self, folder: str | Path, *, adapter: bool = False) -> Path:
        """Write a plain transformers folder: safetensors, tokenizer, chat template, generation config and a model card.

        LoRA adapters are merged, in a copy; with `adapter` they are also written alone, as PEFT keeps them, into adapter/ within the
        folder. The folder appears whole or not at all: it is written aside and renamed. It replaces an earlier export; a folder with
        anything else in it is left alone, with an InputError. A model that is split over processes is gathered, so every process
        calls it, and rank 0 writes.
        """
        folder = self.check_export_folder(folder)
        if adapter:
            self.check_adapter()
        whole = self.whole_model()
        if self.global_rank != 0:
            return folder
        model = copy.deepcopy(whole).merge_and_unload() if is_adapted(whole) else whole
        aside = folder.with_name(folder.name + ".partial")
        shutil.rmtree(aside, ignore_errors=True)
        try:
            aside.mkdir(parents=True)
            model.save_pretrained(aside)
            if model.can_generate():
                self._generation_config().save_pretrained(aside)
            self.tokenizer.save_pretrained(aside)
            if adapter:  # embeddings are never looked for on the hub, as PEFT would
                whole.save_pretrained(aside / "adapter", save_embedding_layers=False)
                (aside / "adapter" / "README.md").unlink(missing_ok=True)  # PEFT's is a form to fill in
            alike = reads_alike(aside, self.tokenizer)
            (aside / "README.md").write_text(self.model_card("AutoTokenizer" if alike else _GENERAL), encoding="utf-8")
        except BaseException as error:
            shutil.rmtree(aside, ignore_errors=True)
            if isinstance(error, OSError | SafetensorError):
                raise InputError(
                    f"export.dirpath is {str(folder)!r}, where the model cannot be written ({error}): make room there."
                ) from error
            raise
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(aside, folder)
        if not alike:
            rank_zero_warn(
                f"AutoTokenizer reads text otherwise than this run did: beside a {model.config.model_type} model it takes a class of its "
                f"own, whatever the export says. Load the tokenizer of {visible(str(folder))} with transformers.{_GENERAL}."
            )
        return folder

    def whole_model(self) -> Any:
        """The model, adapters and all. Of one that is split, a copy on the CPU of rank 0; the others get what they have."""
        if not is_split(self.model, self._root):
            return self.model
        assert self._root is not None
        weights = whole_state_dict(self._root)
        if self.global_rank != 0:
            return self.model
        return from_description({CHECKPOINT_KEY: self._description(), "state_dict": weights}, merge=False)

    def check_adapter(self) -> None:
        """Refuse to write an adapter where there is none."""
        if not is_adapted(self.model):
            raise InputError("export.adapter is true, but the model has no adapter: set model.peft_config, or leave export.adapter out.")

    prepare_repository = staticmethod(prepare_repository)

    def push_to_hub(self, folder: str | Path, name: str, *, private: bool = True) -> str:
        """Send an exported folder to the Hugging Face hub; the address of the commit. The token is taken from the environment.

        Args:
            folder: what `export` wrote.
            name: of the repository, user/model.
            private: of a repository that is new; one that is there stays as it is.
        """
        prepare_repository(name, private)
        return push_folder(Path(folder), name, f"{type(self).__name__} by p3o_lightning")

    @staticmethod
    def check_export_folder(folder: str | Path) -> Path:
        """The folder, if an export may take its place: it does not exist, is empty, or is an earlier export."""
        folder = Path(folder).expanduser().absolute()
        card = folder / "README.md"
        if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
            return folder
        if card.is_file() and card.read_text(encoding="utf-8", errors="replace").startswith(HEAD):
            return folder
        raise InputError(f"export.dirpath is {str(folder)!r}, which is no earlier export: choose a new folder, so that nothing is lost.")

    def _generation_config(self) -> Any:
        """The model's own, with the tokenizer's EOS among its ends and its padding id: `generate` then stops where training did."""
        config, eos = copy.deepcopy(unwrapped(self.model).generation_config), self.tokenizer.eos_token_id
        ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        if eos not in ends:
            config.eos_token_id = eos
        config.pad_token_id = self.tokenizer.pad_token_id
        return config

    def model_card(self, tokenizer_class: str = "AutoTokenizer") -> str:
        """The README.md of the export: what it is, how to load it, what was measured, how it was made."""
        trainer, rewards = self._trainer, not unwrapped(self.model).can_generate()
        data = getattr(trainer and trainer.datamodule, "report", None)  # type: ignore[attr-defined]
        return model_card(
            title=f"{type(self).__name__} trained with p3o_lightning",
            summary=_summary(type(self)),
            classes=("AutoModelForSequenceClassification" if rewards else "AutoModelForCausalLM", tokenizer_class),
            task="text-classification" if rewards else "text-generation",
            updates=trainer.global_step if trainer is not None else 0,
            settings=dict(self.hparams),
            figures=trainer.callback_metrics if trainer is not None else None,
            data=None if data is None else str(data),
        )


def _adamw(parameters: list[nn.Parameter], lr: float) -> torch.optim.AdamW:
    """In one pass over the weights (fused) where PyTorch has it, which takes a quarter of the time of a dozen passes."""
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in parameters)
    optimizer = torch.optim.AdamW(parameters, lr, betas=(0.9, 0.95), weight_decay=0.0, fused=fused)
    # A fused step offers to unscale float16 gradients, and Lightning then refuses to clip them, in bfloat16 too: they are unscaled before.
    optimizer._step_supports_amp_scaling = False
    return optimizer


_OVER: dict[str, Callable[[Tensor], Tensor]] = {"min": torch.amin, "max": torch.amax}


def _kind(name: str) -> str:
    """min, max, or something else: `completions/min_length`, `p3o/joint_weight_max`."""
    words = name.rpartition("/")[2].split("_")
    return next((word for word in words if word in _OVER), "mean")


_GENERAL = "PreTrainedTokenizerFast"


def _summary(owner: type) -> str:
    """The first line of the docstring of a class, or of the class that it extends."""
    return (inspect.getdoc(owner) or "").split("\n")[0]


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, str | int | float | bool)
