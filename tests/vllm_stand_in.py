"""A server that speaks vLLM's protocol as far as the client goes, and samples from a real transformers model, a token at a time.

It is written from what vLLM 0.32 answered (vllm_answers.json), not from the client: it draws with torch.multinomial, reads the
whole text again for every token, and computes log-probabilities where vLLM does (before temperature, unless told otherwise).
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from transformers import AutoModelForCausalLM


class StandIn:
    """What the server holds and does. `answers` maps a path to a function of (stand-in, body) that answers in its place.

    Args:
        dtype: of the weights that it computes with, whatever those it is given are in.
        temperature: factor on the temperature that it is asked for: a server that samples otherwise than it says.
        logprobs_mode: as vLLM's --logprobs-mode.
        max_model_len: as vLLM's --max-model-len.
        dev: whether VLLM_SERVER_DEV_MODE is set.
    """

    def __init__(
        self,
        dtype: torch.dtype = torch.float32,
        temperature: float = 1.0,
        logprobs_mode: str = "processed_logprobs",
        max_model_len: int = 64,
        dev: bool = True,
    ) -> None:
        self.dtype, self.temperature, self.logprobs_mode = dtype, temperature, logprobs_mode
        self.max_model_len, self.dev = max_model_len, dev
        self.model: Any = None
        self.version, self.paused = "default", False
        self.lock = threading.Lock()
        self.asked: list[tuple[str, dict[str, Any]]] = []  # every path with its body, in order
        self.held: list[dict[str, torch.Tensor]] = []  # the weights that it was given, in order
        self.answers: dict[str, Callable[[StandIn, dict[str, Any]], tuple[int, Any]]] = {}

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        with self.lock:
            self.asked.append((path, body))
            if path in self.answers:
                return self.answers[path](self, body)
            if path == "/v1/models":
                return 200, {"object": "list", "data": [{"id": "tiny", "parent": None, "max_model_len": self.max_model_len}]}
            if path == "/v1/completions":
                return self.complete(body)
            if self.dev and (own := getattr(self, path.removeprefix("/"), None)):
                return own(body)
            return 404, {"detail": "Not Found"}

    # ---- what VLLM_SERVER_DEV_MODE opens

    def server_info(self, body: dict[str, Any]) -> tuple[int, Any]:
        return 200, {"vllm_config": {"model_config": {"logprobs_mode": self.logprobs_mode}}}

    def pause(self, body: dict[str, Any]) -> tuple[int, Any]:
        self.paused = True
        return 200, {"status": "paused"}

    def resume(self, body: dict[str, Any]) -> tuple[int, Any]:
        self.paused = False
        return 200, {"status": "resumed"}

    def collective_rpc(self, body: dict[str, Any]) -> tuple[int, Any]:
        assert body["method"] == "reload_weights" and self.paused
        path = Path(body["kwargs"]["weights_path"])
        if not (path / "model.safetensors").exists():
            said = f"Worker failed with error 'Repo id must be in the form ...: {path}'"
            return 500, {"error": {"message": said, "type": "InternalServerError", "code": 500}}
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=self.dtype).eval()
        self.held.append({name: value.clone() for name, value in self.model.state_dict().items()})
        return 200, {"results": [None]}

    def update_weight_version(self, body: dict[str, Any]) -> tuple[int, Any]:
        self.version = body["new_version"]
        return 200, {"success": True, "new_version": self.version}

    def weight_info(self, body: dict[str, Any]) -> tuple[int, Any]:
        return 200, {"weight_version": self.version}

    # ---- sampling

    def complete(self, body: dict[str, Any]) -> tuple[int, Any]:
        assert not self.paused and body["model"] == "tiny" and body["logprobs"] == 0 and body["return_token_ids"]
        room = min(body["max_tokens"], self.max_model_len - len(body["prompt"]))  # vLLM cuts in silence too
        choices = []
        for number in range(body["n"]):
            generator = torch.Generator().manual_seed(body["seed"] + number)
            tokens, logps = self.draw(body["prompt"], room, body["temperature"], body["stop_token_ids"], generator)
            ended = tokens[-1] in body["stop_token_ids"]
            choices.append(
                {
                    "index": number,
                    "text": "",
                    "logprobs": {"text_offset": [], "token_logprobs": logps, "tokens": [], "top_logprobs": []},
                    "finish_reason": "stop" if ended else "length",
                    "stop_reason": tokens[-1] if ended else None,
                    "token_ids": tokens,
                }
            )
        return 200, {"object": "text_completion", "model": "tiny", "choices": choices[::-1]}  # their order is not promised

    @torch.no_grad()
    def draw(self, prompt: list[int], room: int, temperature: float, stops: list[int], generator: torch.Generator) -> tuple[Any, Any]:
        tokens: list[int] = []
        logps: list[float] = []
        while len(tokens) < room and not (tokens and tokens[-1] in stops):
            logits = self.model(torch.tensor([[*prompt, *tokens]])).logits[0, -1].float()
            drawn_from = (logits / (temperature * self.temperature)).log_softmax(-1)
            tokens.append(int(torch.multinomial(drawn_from.exp(), 1, generator=generator)))
            told = drawn_from if self.logprobs_mode == "processed_logprobs" else logits.log_softmax(-1)
            logps.append(float(told[tokens[-1]]))
        return tokens, logps


@contextmanager
def serving(stand_in: StandIn) -> Iterator[str]:
    """The address at which it answers."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.reply({})

        def do_POST(self) -> None:
            self.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def reply(self, body: dict[str, Any]) -> None:
            code, answer = stand_in.answer(urlsplit(self.path).path, body)
            if code == 0:  # the connection breaks
                self.close_connection = True
                return
            text = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 64

        def handle_error(self, request: Any, client_address: Any) -> None:
            pass  # a client that went away, or an assertion, which the client sees as a broken connection

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
