"""Jobs over worker processes: each imports the libraries once and takes job after job; a job that dies takes no other along."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from p3o_lightning.errors import InputError

Job = TypeVar("Job")
GRACE_SECONDS = 20.0  # for a run to save its checkpoint after Ctrl-C


def run_jobs(work: Callable[[Job], Any], jobs: Sequence[Job], workers: int) -> Iterator[tuple[Job, str | None]]:
    """Yield each job as it ends, with None, or one line on why it failed.

    Workers are fresh interpreters with one torch thread each. Where the consumer stops early, after Ctrl-C say, the jobs that run are
    told to end, and waited for.

    Args:
        work: a function of a module; called with a job in a worker.
        jobs: picklable.
        workers: processes.
    """
    os.environ["OMP_NUM_THREADS"] = "1"  # read when a worker imports torch
    left, idle = list(reversed(jobs)), list[_Worker]()
    running: dict[_Worker, Job] = {}
    try:
        while left or running:
            while left and len(running) < workers:
                worker = idle.pop() if idle else _Worker(work)
                running[worker] = left.pop()
                worker.pipe.send(running[worker])
            ready = wait([worker.pipe for worker in running])
            for worker in [worker for worker in running if worker.pipe in ready]:
                job, answer = running.pop(worker), worker.answer()
                if worker.process.is_alive() and not answer.died:
                    idle.append(worker)
                yield job, answer.error
    finally:
        for worker in [*idle, *running]:
            worker.stop(busy=worker in running)


class _Answer:
    def __init__(self, error: str | None, died: bool = False) -> None:
        self.error, self.died = error, died


class _Worker:
    """One process, and the pipe to it."""

    def __init__(self, work: Callable[[Any], Any]) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads, half of them
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, work), daemon=True)
        self.process.start()
        theirs.close()  # so that the pipe ends when the process does

    def answer(self) -> _Answer:
        try:
            return _Answer(self.pipe.recv())
        except (EOFError, ConnectionError):
            self.process.join()
            return _Answer(f"its process ended with exit status {self.process.exitcode}, before the run did", died=True)

    def stop(self, busy: bool) -> None:
        if busy and self.process.is_alive() and self.process.pid is not None:
            os.kill(self.process.pid, signal.SIGINT)
        self.pipe.close()
        self.process.join(GRACE_SECONDS if busy else 2.0)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _serve(pipe: Connection, work: Callable[[Any], Any]) -> None:
    """In the worker: jobs until the pipe ends."""
    import torch

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # `p3o frontier ... &` in a script ignores it, and would never be told to end
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    while True:
        try:
            job = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            return
        try:
            work(job)
            error = None
        except InputError as failure:
            error = " ".join(str(failure).split())
        except (KeyboardInterrupt, SystemExit) as stop:
            error = f"interrupted ({type(stop).__name__} {stop})".replace(" )", ")")
        except BaseException as failure:
            error = f"{type(failure).__name__}: {' '.join(str(failure).split())[:300]}"
        try:
            pipe.send(error)
        except OSError:  # no one waits for it any more
            return


def _end_with_the_parent() -> None:
    """In the worker: where the parent is killed it stops no one, and the job would go on alone; so end it as Ctrl-C does."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGINT)
