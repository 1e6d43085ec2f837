"""What the run of a parsed config will do, and how much memory it will take, before it is started.

Models are built on torch's meta device, so that no weight and no data are read.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig

from p3o_lightning import memory
from p3o_lightning.commands.machine import memory_here
from p3o_lightning.data import PreferenceDataModule
from p3o_lightning.direct import DirectPreferencePolicy
from p3o_lightning.ensembles import Ensemble
from p3o_lightning.errors import InputError
from p3o_lightning.forwards import is_adapted, unwrapped
from p3o_lightning.model_reward import ModelReward
from p3o_lightning.models import (
    DTYPES,
    attach_adapter,
    config_of,
    existing,
    folder_or_hub_name,
    is_classifier,
    load_policy,
    load_reward_backbone,
    one_line,
    read_description,
)
from p3o_lightning.policy import PairwisePolicy, check_settings
from p3o_lightning.reward_model import RewardModel
from p3o_lightning.sharding import layers_of, splits
from p3o_lightning.supervised import SupervisedPolicy
from p3o_lightning.tokenizers import distinct_pad_token, load_tokenizer, tokenizer_source


class Plan:
    """The estimate for a parsed config, with what had to be assumed.

    Args:
        settings: the parsed values of `p3o fit`.
    """

    def __init__(self, settings: Any) -> None:
        self.notes: list[str] = []
        self.stage = _class_of(settings.model.class_path)
        self.given = _plain(settings.model.get("init_args"))
        self.trainer = settings.trainer
        self.local, self.processes = _processes(settings.trainer)
        self.split, precision = _splits(settings.trainer.strategy), str(settings.trainer.precision or "")
        self.autocast, self.rounded = precision.endswith("-mixed"), _rounded(precision)
        self.batch_size, self.longest, self.prompt = self._data(settings.data)
        if issubclass(self.stage, PairwisePolicy):
            self.model, self.work, self.estimate = self._policy()
        elif issubclass(self.stage, SupervisedPolicy):
            self.model, self.work = self._model(load_policy), self._work(self.batch_size, 1, 0, self.longest)
            self.estimate = memory.supervised(self.model, self.work)
        elif issubclass(self.stage, RewardModel):
            self.model, self.work = self._model(load_reward_backbone), self._work(self.batch_size, 2, self.longest, 0)
            self.estimate = memory.reward(self.model, self.work)
        elif issubclass(self.stage, DirectPreferencePolicy):
            self.model, self.work = self._model(load_policy), self._work(self.batch_size, 2, 0, self.longest)
            self.estimate = memory.direct(self.model, self.work, reference=self._reference(self.model))
        else:
            raise InputError(
                f"model.class_path is {self.stage.__name__}, of which there is no estimate: plan a SupervisedPolicy, a RewardModel, a "
                "PairwisePolicy or a DirectPreferencePolicy."
            )

    # ---- the stages

    def _policy(self) -> tuple[memory.Model, memory.Work, memory.Estimate]:
        check_settings(self.given)
        micro_batch = self.given["micro_batch_size"] or self.batch_size
        if self.batch_size % micro_batch:
            raise InputError(f"model.micro_batch_size is {micro_batch}, but data.batch_size is {self.batch_size}: choose a divisor of it.")
        model = self._model(load_policy)
        reference, served, critic = self._reference(model), self.given["generation"] == "vllm", self.given["objective"] == "ppo"
        work = self._work(
            micro_batch, self.given["num_generations"], self.prompt, self.given["max_completion_length"], token_values=2 + served + critic
        )
        sources = self.given["reward_funcs"]
        sources = [] if sources is None else sources if isinstance(sources, list | tuple) else [sources]
        sources = [member for source in sources for member in _members(source)]
        rewards = [network for source in sources if (network := self._reward(source, model)) is not None]
        if critic:
            model = memory.with_critic(model, self.rounded or 4)
        rows = ModelReward.batch_rows if work.cpu else max(1, ModelReward.batch_tokens // work.tokens)
        estimate = memory.policy(model, work, reference=reference, rewards=rewards, reward_rows=rows, served=served)
        return model, work, estimate

    def _reference(self, model: memory.Model) -> memory.Model | None:
        """The reference's sizes; None where it is the policy with its adapter off."""
        if self.given["reference"] is not None:
            return self._model(load_policy, self.given["reference"], adapter=None)
        return None if model.rank else model

    def _work(self, micro_batch: int, responses: int, prompt: int, completion: int, token_values: int = 2) -> memory.Work:
        return memory.Work(
            prompts=self.batch_size,
            micro_batch=micro_batch,
            responses=responses,
            prompt_tokens=prompt,
            completion_tokens=completion,
            processes=self.processes,
            split=self.split and self.processes > 1,
            autocast=self.autocast,
            moments=self._moments(),
            fused=self._fused(),
            token_values=token_values,
            cpu=self._on_cpu(),
        )

    def _on_cpu(self) -> bool:
        """Whether the run is on a CPU, as Lightning would choose here."""
        accelerator = self.trainer.accelerator
        return accelerator == "cpu" or (accelerator == "auto" and not (torch.cuda.is_available() or torch.backends.mps.is_available()))

    def _moments(self) -> int:
        """Values that the optimizer keeps for each weight; where it is not known, as many as AdamW."""
        optimizer = self.given.get("optimizer")
        if optimizer is None:
            return 2
        name, options = str(optimizer.get("class_path", "")).rpartition(".")[2], optimizer.get("init_args") or {}
        if name == "SGD":
            return 1 if options.get("momentum") else 0
        if name not in ("Adam", "AdamW"):
            self.notes.append(f"model.optimizer {name} is counted as AdamW, which keeps two values a trained weight")
        return 2

    def _fused(self) -> bool:
        """Whether the optimizer's step is one pass over the weights: the default one's is, where PyTorch has it."""
        optimizer = self.given.get("optimizer")
        if optimizer is None:
            return self._on_cpu() or torch.cuda.is_available()
        return bool((optimizer.get("init_args") or {}).get("fused"))

    # ---- models, without their weights

    def _model(self, load: Callable[..., Any], source: Any = None, adapter: Any = ...) -> memory.Model:
        """The sizes of the stage's model, or of another with its settings."""
        source = self.given["model"] if source is None else source
        given = self.given.get("tokenizer")
        config = _config(source)
        tokenizer = load_tokenizer(tokenizer_source(source) if given is None else given)
        if load is load_reward_backbone:
            tokenizer = distinct_pad_token(tokenizer)
        with torch.device("meta"):
            model = load(config, tokenizer, _dtype(self.given["dtype"], config))
            adapter = self.given["peft_config"] if adapter is ... else adapter
            model = model if adapter is None else attach_adapter(model, adapter)
        return self._sizes(model, self.rounded)

    def _reward(self, source: Any, policy: memory.Model) -> memory.Model | None:
        """A reward model's sizes; None for a function."""
        if callable(source):
            return None
        if not isinstance(source, str | Path):
            self.notes.append("model.reward_funcs has a class with arguments of its own, which is not counted")
            return None
        path = Path(str(source)).expanduser()
        if not (path.exists() or path.suffix in (".ckpt", ".gguf") or "/" in str(source)):
            return None  # the dotted name of a function
        if not path.exists():
            self.notes.append(f"model.reward_funcs {str(source)!r} is not there yet: counted as large as the policy")
            return policy
        config, tokenizer = _config(source), load_tokenizer(str(source))
        with torch.device("meta"):
            return self._sizes(load_reward_backbone(config, tokenizer, _dtype(self.given["dtype"], config)), None)

    def _sizes(self, model: Any, rounded: int | None) -> memory.Model:
        """What the arithmetic needs to know of a model. `rounded`: bytes of every weight under a lower precision of the Trainer's."""
        base = unwrapped(model)
        config = base.config.get_text_config(decoder=True)
        layers = layers_of(base)

        def size(parameters: Any) -> int:
            return sum(parameter.numel() * (rounded or parameter.element_size()) for parameter in parameters)

        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        heads = getattr(config, "num_attention_heads", None) or 1
        head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
        intermediate = getattr(config, "intermediate_size", None) or getattr(config, "ffn_dim", None) or 4 * config.hidden_size
        if config.model_type not in GATED:
            self.notes.append(f"activations are those of a Llama block; those of {config.model_type} may differ")
        linear = [layer.weight for layer in model.modules() if type(layer) is nn.Linear]
        adapters = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
        return memory.Model(
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            trained=sum(parameter.numel() for parameter in trained),
            weights=size(model.parameters()),
            trained_weights=size(trained),
            layers=len(layers),
            block=max((size(layer.parameters()) for layer in layers), default=0),
            hidden=config.hidden_size,
            intermediate=intermediate,
            attention=heads * head_size,
            heads=heads,
            key_value=(getattr(config, "num_key_value_heads", None) or heads) * head_size,
            vocabulary=0 if is_classifier(base) else base.get_input_embeddings().num_embeddings,
            linear=0 if rounded else sum(weight.numel() for weight in linear if weight.dtype == torch.float32),
            weight_bytes=rounded or next(base.get_input_embeddings().parameters()).element_size(),
            rank=model.peft_config[model.active_adapter].r if is_adapted(model) else 0,
            adapter_bytes=rounded or (adapters[0].element_size() if adapters else 4),
            eager=base.config._attn_implementation == "eager",
        )

    # ---- data and trainer

    def _data(self, settings: Any) -> tuple[int, int, int]:
        """Rows of a batch, tokens of a row, tokens of a prompt: at most."""
        owner, given = _class_of(settings.class_path), _plain(settings.get("init_args"))
        if issubclass(owner, PreferenceDataModule):
            data: Any = owner(**given)  # checks them, and reads nothing
            return data.batch_size, data.max_length, data.max_prompt_length or data.max_length
        batch_size, longest = given.get("batch_size"), given.get("max_length")
        if not (isinstance(batch_size, int) and isinstance(longest, int)):
            self.notes.append(f"data.{owner.__name__} does not say batch_size and max_length: counted as 8 rows of 512 tokens")
            batch_size, longest = 8, 512
        return batch_size, longest, longest

    def course(self) -> str:
        """Rows, updates and rollouts, as far as they are known without the data."""
        steps, epochs = self.trainer.max_steps, self.trainer.max_epochs
        accumulate, each = self.trainer.accumulate_grad_batches, self.batch_size * self.processes
        if not issubclass(self.stage, PairwisePolicy):
            rows = each * accumulate
            what = "pairs" if issubclass(self.stage, RewardModel | DirectPreferencePolicy) else "rows"
            known = f"{steps:,} updates x {rows:,} {what} = {steps * rows:,} {what}" if steps > 0 else ""
            return known or f"{what} / {rows:,} updates an epoch, {1000 if epochs is None else epochs} epochs"
        passes, micro_batches = self.given["num_iterations"], self.batch_size // self.work.micro_batch
        updates = passes * micro_batches / accumulate
        rollout = f"a rollout: {each:,} prompts x {self.work.responses} responses, {updates:g} updates"
        if steps <= 0:
            return f"{rollout}; prompts / {each:,} rollouts an epoch, {1000 if epochs is None else epochs} epochs"
        rollouts = -(-steps // updates)
        return f"{rollout}; {steps:,} updates = {rollouts:,.0f} rollouts = {rollouts * each * self.work.responses:,.0f} responses"

    # ---- what there is, and what to do

    def in_a_line(self) -> str:
        """The peak and its phase, and whether it fits."""
        phases = self.estimate.phases
        phase, free = max(phases, key=lambda name: phases[name]), self.available()[0]
        fits = f" of {amount(free)}" + ("" if self.estimate.peak <= free else f", which is not enough: {self.advice()}") if free else ""
        return f"memory: about {amount(self.estimate.peak)}{fits}, most of it in {phase}"

    def available(self) -> tuple[int, str]:
        """Bytes that one process may use on this machine, and in words."""
        if self.trainer.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
            about = torch.cuda.get_device_properties(0)
            return about.total_memory, f"a GPU here has {amount(about.total_memory)} ({about.name})"
        total = memory_here()
        if total is None:
            return 0, "how much memory this machine has is not known"
        here = f"{amount(total[1])} free for {self.local} process{'es' if self.local > 1 else ''}"
        return total[1] // self.local, f"this machine has {amount(total[0])}, {here}, and no GPU that this config would use"

    def advice(self) -> str:
        """What saves most, one thing."""
        estimate, phases = self.estimate, self.estimate.phases
        phase = max(phases, key=lambda name: phases[name])
        largest = max((part for part in estimate.parts if phase in part.phases), key=lambda part: part.size)
        policy = issubclass(self.stage, PairwisePolicy)
        if phase == "sampling" and largest.name in ("key-value cache", "drawing") and self.batch_size > 1:
            return "lower data.batch_size: all prompts of a rollout are sampled at once"
        if largest.name in ("activations", "logits", "scoring") and self.work.micro_batch > 1:
            return f"lower {'model.micro_batch_size' if policy else 'data.batch_size, with trainer.accumulate_grad_batches'}"
        if largest.name in ("activations", "logits", "scoring"):
            return "lower data.max_length" + (" or model.max_completion_length" if policy else "")
        if not self.model.rank:
            return "train adapters: model.peft_config {r: 16, lora_alpha: 32}"
        if self.model.weight_bytes > 2:
            return "set model.dtype to bfloat16"
        if not self.split:
            return "split it over several processes: --config configs/fsdp2.yaml"
        if largest.name == "gathered policy":
            return "take a smaller model: while it samples, every process holds the whole policy, however many there are"
        return "split it over more processes: trainer.devices, trainer.num_nodes"


GATED = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "smollm3", "phi3", "olmo2")  # a gated MLP, RMS norms


def amount(size: int) -> str:
    """Bytes, in the largest unit of which there is one."""
    unit, name = next(((unit, name) for unit, name in ((2**30, "GiB"), (2**20, "MiB")) if size >= unit), (2**10, "KiB"))
    return f"{size / unit:,.1f} {name}" if size else "0"


def _members(source: Any) -> list[Any]:
    """The members of an ensemble in a config; any other reward source alone."""
    named = source.get("class_path", "") if isinstance(source, dict) else ""
    return list(source.get("init_args", {}).get("members", [])) if named.rpartition(".")[2] == Ensemble.__name__ else [source]


def _class_of(class_path: str) -> Any:
    module, _, name = class_path.rpartition(".")
    return getattr(import_module(module), name)


def _plain(arguments: Any) -> dict[str, Any]:
    """A parsed section as a mapping."""
    if arguments is None:
        return {}
    return dict(arguments.as_dict() if hasattr(arguments, "as_dict") else arguments)


def _processes(trainer: Any) -> tuple[int, int]:
    """On this machine, and in all. `auto` is every GPU here, or one process on a CPU, as Lightning has it."""
    devices = trainer.devices
    if devices in ("auto", -1, "-1"):
        gpus = torch.cuda.device_count() if trainer.accelerator in ("auto", "gpu", "cuda") else 0
        local = max(gpus, 1)
    elif isinstance(devices, list):
        local = len(devices)
    elif isinstance(devices, str) and not devices.strip().isdigit():
        local = len([item for item in devices.split(",") if item.strip()])
    else:
        local = int(devices)
    if local < 1 or trainer.num_nodes < 1:
        raise InputError(f"trainer.devices is {devices!r} and trainer.num_nodes {trainer.num_nodes}: choose at least 1 of both.")
    return local, local * trainer.num_nodes


def _splits(strategy: Any) -> bool:
    """Whether the strategy, by name or by class, splits the model."""
    if isinstance(strategy, str):
        return splits(strategy)
    return bool(getattr(strategy, "class_path", None)) and _class_of(strategy.class_path).__name__ in (
        "FSDP2Strategy",
        "FSDPStrategy",
        "ModelParallelStrategy",
    )


def _rounded(precision: str) -> int | None:
    """Bytes of every weight where the Trainer's precision changes them."""
    return {"bf16-true": 2, "16-true": 2, "64-true": 8, "64": 8}.get(precision)


def _config(source: Any) -> PreTrainedConfig | dict[str, Any]:
    """The transformers config of a model source."""
    if not isinstance(source, str | Path):
        return source
    path, fix = (
        Path(source).expanduser(),
        "Run the stage that makes it, or lay a config over this one whose model.model is of the same shape.",
    )
    if path.suffix == ".ckpt":
        return config_of(read_description(path if path.is_dir() else existing(path)))
    try:
        if path.suffix == ".gguf":
            return AutoConfig.from_pretrained(str(existing(path).parent), gguf_file=path.name)
        name = folder_or_hub_name(source, ("config.json",), "model", fix)
        return AutoConfig.from_pretrained(name, trust_remote_code=False, local_files_only=True)
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"model is {str(source)!r}, no folder here and not in the hub's local cache: {fix}") from error
    except Exception as error:  # a config.json may say anything
        raise InputError(f"model is {str(source)!r}, whose config cannot be read: {one_line(error)}.") from error


def _dtype(name: str, config: Any) -> str:
    """The weights' dtype; `auto` is the config's own."""
    if name != "auto":
        return name
    stored = getattr(config, "dtype", None)
    return next((key for key, kind in DTYPES.items() if kind == stored), "float32")
