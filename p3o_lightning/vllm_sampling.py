"""Sampling on another machine: a policy whose responses a vLLM server draws, which is given the policy's weights before every rollout.

The server is another distribution than the policy that is trained: other kernels, mostly another dtype. Its log-probabilities travel in
the experience, and the loss weighs by them (sampler_correction.py).
"""

from __future__ import annotations

import copy
import shutil
import tempfile
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed
from jaxtyping import Bool, Float, Int
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import FSDPStrategy
from safetensors import SafetensorError
from torch import Tensor

from p3o_lightning.batches import PromptBatch
from p3o_lightning.errors import InputError, Stopped
from p3o_lightning.forwards import is_adapted, unwrapped
from p3o_lightning.seeds import mix
from p3o_lightning.sequences import pad_right
from p3o_lightning.vllm_server import Response, Served, VLLMServer

if TYPE_CHECKING:
    from p3o_lightning.rollouts import SamplingPolicy

_AT_ONCE = 128  # prompts under way; the server queues and batches them as it likes
_WHOLE_SEED = (1 << 53) - 1  # integers that JSON carries everywhere, and the server adds the response's number to it

Answer = TypeVar("Answer")


class VLLMSampler:
    """Draws a policy's responses on a server.

    Args:
        server: the server.
        folder: where weights are handed over, seen by both under the same path; None is `vllm_weights` in the run's folder.
    """

    def __init__(self, server: VLLMServer, folder: str | None) -> None:
        self.server, self.folder = server, folder
        self.served: Served | None = None
        self.version = ""  # what the weights that the server holds are called; known to the process that handed them over
        self.held: tuple[int, bool] | None = None  # which weights they are, as `_weights_of` tells them apart

    def begin(self, policy: SamplingPolicy) -> None:
        """A run begins, and its weights may be restored: nothing is taken for granted of what the server holds."""
        self.served, self.version, self.held = None, "", None
        if isinstance(policy.trainer.strategy, FSDPStrategy):  # whose weights cannot be gathered inside a validation step
            raise InputError("trainer.strategy is FSDPStrategy, which model.generation: vllm does not serve: use fsdp2.")

    def sample_with_logps(
        self, policy: SamplingPolicy, prompts: PromptBatch, seed: int
    ) -> tuple[Int[Tensor, "prompt response token"], Bool[Tensor, "prompt response token"], Float[Tensor, "prompt response token"]]:
        """K responses for each prompt, their mask, and the nats of every token under what the server drew it from; 0 outside the mask.

        The seed of a prompt's responses is a function of (seed, its place among the prompts of all processes): a rerun sends the same
        requests. Collective: every process calls it, and an error of one is an error of all.
        """
        longest = int(prompts.attention_mask.sum(1).max())
        served = _agreed(policy, lambda: self._check(policy, longest))
        wanted = _weights_of(policy)
        if wanted is None or wanted != self.held:
            whole = policy.whole_model()
            _agreed(policy, lambda: self._hand_over(policy, whole) if policy.global_rank == 0 else None)
            self.held = wanted
        responses = _agreed(policy, lambda: self._ask(policy, served, prompts, seed))
        _agreed(policy, lambda: self._check_version() if policy.global_rank == 0 else None)
        return self._as_tensors(policy, responses, prompts.tokens.device)

    def _check(self, policy: SamplingPolicy, longest: int) -> Served:
        """What is served, which must suit the run; asked for once."""
        sampling = policy.sampling
        if self.served is None:
            served = self.server.served()
            if sampling.temperature != 1 and served.logprobs_mode not in (None, "processed_logprobs"):
                raise self.server.error(
                    f"whose log-probabilities are {served.logprobs_mode}, so those before temperature, but model.temperature is "
                    f"{sampling.temperature}: start it with --logprobs-mode processed_logprobs."
                )
            self.served = served
        limit = self.served.max_model_len
        if limit is not None and longest + sampling.max_completion_length > limit:
            raise InputError(
                f"model.max_completion_length is {sampling.max_completion_length} and a prompt has {longest} tokens, but model.vllm_server "
                f"takes {limit} in all: start it with a greater --max-model-len, lower the one, or set data.max_prompt_length."
            )
        return self.served

    def _hand_over(self, policy: SamplingPolicy, whole: Any) -> None:
        """Write the weights aside, adapters merged, let the server read them, and clear them away."""
        model = copy.deepcopy(whole).merge_and_unload() if is_adapted(whole) else whole
        trainer = policy._trainer
        root = self.folder or (Path(trainer.default_root_dir) / "vllm_weights" if trainer else tempfile.mkdtemp(prefix="vllm_weights-"))
        folder = Path(root).expanduser().absolute() / f"step-{policy.global_step}"
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
        try:
            folder.mkdir(parents=True)
            model.save_pretrained(folder)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise InputError(
                f"model.vllm_weights is {str(root)!r}, where the weights cannot be written ({error}): make room there, or give another."
            ) from error
        self.version = f"{uuid.uuid4().hex[:8]}-{policy.global_step}"
        try:
            self.server.load_weights(folder, self.version)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _check_version(self) -> None:
        """The responses are the policy's: nobody changed the weights meanwhile."""
        held = self.server.weights_version()
        if held not in (None, self.version):
            raise self.server.error(
                f"which holds the weights {held!r} where it was given {self.version!r}: it was started again, or another run uses it. "
                "Resume with --ckpt_path last, one server for each run."
            )

    def _ask(self, policy: SamplingPolicy, served: Served, prompts: PromptBatch, seed: int) -> list[list[Response]]:
        rank, processes = policy.share
        eos = policy.tokenizer.eos_token_id
        rows = [row[kept].tolist() for row, kept in zip(prompts.tokens.cpu(), prompts.attention_mask.cpu().bool(), strict=True)]

        def ask(place: int) -> list[Response]:
            own = mix(seed, place * processes + rank) & _WHOLE_SEED
            return self.server.respond(served.model, rows[place], policy.sampling, eos, own)

        pool = ThreadPoolExecutor(min(_AT_ONCE, len(rows)))
        try:
            responses = list(pool.map(ask, range(len(rows))))
        finally:
            pool.shutdown(cancel_futures=True)
        words = unwrapped(policy.model).get_input_embeddings().num_embeddings
        strange = {token for row in responses for response in row for token in response.tokens if not 0 <= token < words}
        if strange:
            raise self.server.error(f"which drew token {min(strange)}, but the policy has {words}: it serves another model.")
        return responses

    @staticmethod
    def _as_tensors(policy: SamplingPolicy, responses: list[list[Response]], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        flat = [response for row in responses for response in row]
        tokens, mask = pad_right([response.tokens for response in flat], policy.tokenizer.pad_token_id)
        logps = torch.zeros(tokens.shape, dtype=torch.float32)
        logps[mask] = torch.tensor([nats for response in flat for nats in response.logps], dtype=torch.float32)
        shape = (len(responses), policy.sampling.num_generations, -1)
        return tuple(values.view(shape).to(device) for values in (tokens, mask, logps))  # type: ignore[return-value]


def _weights_of(policy: SamplingPolicy) -> tuple[int, bool] | None:
    """What tells one state of a run's weights from another: the updates made, and whether averaged ones stand in for them in validation.

    None outside a run, where they may change at any time.
    """
    trainer = policy._trainer
    if trainer is None:
        return None
    averages = any(isinstance(callback, WeightAveraging) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    return policy.global_step, averages and not trainer.training


def _agreed(policy: SamplingPolicy, action: Callable[[], Answer]) -> Answer:
    """What the action gives; where it fails on one process it fails on all, so that none waits for another for ever.

    In training nothing of the next update has begun, so that the run is worth saving as it is: it goes on when the server is back.
    """
    answer, error = None, None
    try:
        answer = action()
    except InputError as refused:
        error = refused
    errors = [None if error is None else str(error)]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        errors = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(errors, None if error is None else str(error))
    told = next((message for message in errors if message is not None), None)
    if told is not None:
        raise Stopped(told, save=policy._trainer is not None and policy.trainer.training and policy.global_step > 0) from error
    return answer  # type: ignore[return-value]
