"""Two processes for a test: forked from the test's own, so that nothing is imported again, and joined by gloo."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities import rank_zero_only
from torch.distributed.fsdp import FullyShardedDataParallel


def on_two(folder: Path, function: Callable[..., Any], *arguments: Any, seconds: float = 120) -> list[Any]:
    """`function(*arguments)` in two processes at once, with `Trainer(devices=2)` inside; what each returned, by rank.

    What it returns must be tensors and plain values. A process that hangs is ended, and the test fails.
    """
    context = multiprocessing.get_context("fork")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    answers = [folder / f"rank-{rank}.pt" for rank in range(2)]
    for answer in answers:
        answer.unlink(missing_ok=True)
    running = [context.Process(target=_run, args=(rank, port, answers[rank], function, arguments)) for rank in range(2)]
    for process in running:
        process.start()
    for process in running:
        process.join(seconds)
    hung = [process for process in running if process.is_alive()]
    for process in hung:
        process.kill()
        process.join()
    assert not hung, "a process waits for the other for ever"
    assert all(answer.exists() for answer in answers), f"ended without an answer, exit codes {[process.exitcode for process in running]}"
    results = [torch.load(answer, weights_only=False) for answer in answers]
    for rank, result in enumerate(results):
        assert "error" not in result, f"rank {rank}:\n{result['error']}"
    return [result["answer"] for result in results]


def _run(rank: int, port: int, answer: Path, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "NODE_RANK": "0", "LOCAL_RANK": str(rank)}
    rank_zero_only.rank = rank
    torch.set_num_threads(1)
    try:
        result = {"answer": function(*arguments)}
    except BaseException:
        result = {"error": traceback.format_exc()}
    torch.save(result, answer)
    os._exit(0)  # the other process may be gone: no goodbye


class FSDP1OnCPU(FSDPStrategy):
    """Lightning's FSDPStrategy with the one thing that it does not do without a GPU: name the device."""

    def __init__(self, **options: Any) -> None:
        super().__init__(process_group_backend="gloo", **options)

    def _setup_model(self, model: torch.nn.Module) -> torch.nn.Module:
        return FullyShardedDataParallel(
            module=model,
            cpu_offload=self.cpu_offload,
            mixed_precision=self.mixed_precision_config,
            sharding_strategy=self.sharding_strategy,
            device_id=torch.device("cpu"),
            **self.kwargs,
        )
