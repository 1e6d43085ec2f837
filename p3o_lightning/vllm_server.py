"""A client of one vLLM server: what it serves, responses with their log-probabilities, other weights. Plain HTTP, no vLLM needed here.

Responses come from the OpenAI-compatible `/v1/completions`, which takes token ids and gives token ids back (`return_token_ids`), so that
nothing is tokenised twice. Weights travel by a folder that both sides see: the server is paused, its workers read the folder
(`collective_rpc` of `reload_weights`), and it goes on; no collective between GPUs, no shared process group. These addresses, and those that
name the weights held, are the ones that vLLM has for reinforcement learning; it opens them where VLLM_SERVER_DEV_MODE=1 is set.

Every failure is an InputError that begins with the setting and the address, since it is the server that a person looks at next.
"""

from __future__ import annotations

import json
import math
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from functools import cache as once
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple

from p3o_lightning.errors import InputError
from p3o_lightning.generation import Sampling

START = "VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs --generation-config vllm"

_TRIES, _PAUSE = 3, 1.0  # for a connection that breaks, and seconds between
_TOLD = 300  # characters of the server's own words in an error


@once
def _opener() -> urllib.request.OpenerDirector:
    """Kept here: from Python 3.12 on it holds what cannot be copied, and a policy is copied with its server, to average weights say."""
    return urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Served(NamedTuple):
    """What a server says of itself."""

    model: str
    max_model_len: int | None  # tokens of prompt and response together
    logprobs_mode: str | None  # None: it does not say


class Response(NamedTuple):
    """One response: token ids, the sampled end included, and the nats of each under what it was drawn from."""

    tokens: list[int]
    logps: list[float]


class VLLMServer:
    """One server.

    Args:
        address: such as http://127.0.0.1:8000. The environment's proxies are not used; VLLM_API_KEY is, where the server asks for a key.
        timeout: seconds that one answer may take: all tokens of a prompt's responses, or reading the weights.
    """

    def __init__(self, address: str, timeout: float) -> None:
        parts = urllib.parse.urlsplit(address)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(f"model.vllm_server is {address!r}: give an address such as http://127.0.0.1:8000.")
        self.address, self.timeout = address.rstrip("/").removesuffix("/v1"), timeout

    def served(self) -> Served:
        """The model, its length limit, and what it means by log-probabilities."""
        answer = self._call("/v1/models")
        models = [item for item in _list(answer, "data") if isinstance(item, dict) and not item.get("parent")]  # adapters have a parent
        if not models or not isinstance(models[0].get("id"), str):
            raise self.error(f"whose /v1/models names no model: is it vLLM? Start it with {START}.")
        about = self._call("/server_info?config_format=json", missing={})
        config = about.get("vllm_config") if isinstance(about, dict) else None
        config = config.get("model_config") if isinstance(config, dict) else None
        mode = config.get("logprobs_mode") if isinstance(config, dict) else None
        return Served(models[0]["id"], models[0].get("max_model_len"), mode)

    def load_weights(self, folder: Path, version: str) -> None:
        """Let it hold the weights of a transformers folder, which it must see under the same path, and call them `version`."""
        self._call("/pause?mode=wait", {}, missing=None)  # also forgets keys and values that the former weights computed
        answer = self._call(
            "/collective_rpc",
            {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}, "timeout": self.timeout},
            missing=None,
            hint=f"it could not take the weights in {str(folder)!r}. It must see that folder under the same path (model.vllm_weights: one "
            "that both share) and serve the architecture of model.model; look into its log, and start it again",
        )
        if answer is None:
            raise self.error(f"which takes no weights (no /collective_rpc): start it with {START}.")
        self._call("/update_weight_version", {"new_version": version}, missing=None)
        self._call("/resume", {}, missing=None)

    def weights_version(self) -> str | None:
        """What the weights that it holds were called, or None where it does not say."""
        answer = self._call("/weight_info", missing={})
        return answer.get("weight_version") if isinstance(answer, dict) else None

    def respond(self, model: str, prompt: list[int], sampling: Sampling, eos_token_id: int, seed: int) -> list[Response]:
        """K responses to one prompt, drawn from the model's own distribution at the temperature, in a fixed order.

        A response ends with `eos_token_id`, whatever else the model's generation config calls an end, or has all tokens that it may have.
        """
        request = {
            "model": model,
            "prompt": prompt,
            "n": sampling.num_generations,
            "max_tokens": sampling.max_completion_length,
            "temperature": sampling.temperature,
            "seed": seed,
            "logprobs": 0,  # of the sampled token alone
            "return_token_ids": True,
            "ignore_eos": True,
            "stop_token_ids": [eos_token_id],
            # neutral, lest the model's generation config bends the distribution
            "top_p": 1.0,
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
        }
        choices = _list(self._call("/v1/completions", request), "choices")
        if len(choices) != sampling.num_generations:
            raise self.error(f"which gave {len(choices)} responses where model.num_generations is {sampling.num_generations}.")
        in_order = sorted(choices, key=lambda choice: choice.get("index", 0))
        return [self._response(choice, sampling, eos_token_id) for choice in in_order]

    def _response(self, choice: dict[str, Any], sampling: Sampling, eos_token_id: int) -> Response:
        tokens, logps = choice.get("token_ids"), (choice.get("logprobs") or {}).get("token_logprobs")
        if not tokens:
            raise self.error("which gave no token ids (return_token_ids): it needs vLLM 0.10.2 or later, tested with 0.32.")
        if not logps or len(logps) != len(tokens) or not all(isinstance(nats, int | float) and math.isfinite(nats) for nats in logps):
            raise self.error(f"which gave no finite log-probability for each token ({_short(logps)} for {len(tokens)} tokens).")
        if tokens[-1] != eos_token_id and len(tokens) != sampling.max_completion_length:
            raise self.error(
                f"which ended a response at {len(tokens)} of model.max_completion_length {sampling.max_completion_length} tokens with "
                f"token {tokens[-1]}, not with EOS ({eos_token_id}); finish_reason is {choice.get('finish_reason')!r}. Start it with "
                "--generation-config vllm and a --max-model-len for prompt and response."
            )
        return Response(tokens, [float(nats) for nats in logps])

    # ---- HTTP

    def error(self, what: str) -> InputError:
        """What to raise about this server."""
        return InputError(f"model.vllm_server is {self.address!r}, {what}")

    def _call(self, path: str, body: dict[str, Any] | None = None, *, missing: Any = ..., hint: str = "") -> Any:
        """The JSON that it answers, {} if none. `missing` is given back where it has no such address (404); else that is an error."""
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("VLLM_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data=data, headers=headers)
        for tried in range(1, _TRIES + 1):
            try:
                with _opener().open(request, timeout=self.timeout) as answer:
                    text = answer.read()
                return json.loads(text) if text.strip() else {}
            except urllib.error.HTTPError as error:
                if error.code == 404 and missing is not ... and path != "/v1/completions":
                    return missing
                said = _message(error.read())
                raise self.error(f"which answered {path.split('?')[0]} with {error.code}: {hint + ': ' if hint else ''}{said}") from error
            except TimeoutError as error:
                raise self._late(path) from error
            except (urllib.error.URLError, HTTPException, OSError) as error:
                reason = getattr(error, "reason", error)
                if isinstance(reason, TimeoutError):
                    raise self._late(path) from error
                if tried == _TRIES or isinstance(reason, ConnectionRefusedError):  # nothing listens: it will not before a person acts
                    raise self.error(
                        f"where nothing answers {path.split('?')[0]} ({_short(reason) or type(reason).__name__}): start it with {START}, "
                        "or correct the address."
                    ) from error
                time.sleep(_PAUSE)
            except ValueError as error:
                raise self.error(f"which answered {path.split('?')[0]} with what is not JSON: is it vLLM?") from error
        raise AssertionError("unreachable")

    def _late(self, path: str) -> InputError:
        return self.error(
            f"which did not answer {path.split('?')[0]} in model.vllm_timeout, {self.timeout:g} seconds: raise that, or look into its log."
        )


def _list(answer: Any, name: str) -> list[Any]:
    value = answer.get(name) if isinstance(answer, dict) else None
    return value if isinstance(value, list) else []


def _message(body: bytes) -> str:
    """The server's own words: vLLM puts them in error.message, FastAPI in detail."""
    try:
        answer = json.loads(body)
        error = answer.get("error", answer)
        return _short(error.get("message") or answer.get("detail") or answer)
    except (ValueError, AttributeError):
        return _short(body.decode(errors="replace"))


def _short(words: Any) -> str:
    text = " ".join(str(words).split())
    return text if len(text) <= _TOLD else text[:_TOLD] + "..."
