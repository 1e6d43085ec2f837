"""Workers: a job that fails or dies takes no other along, and none is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from p3o_lightning.commands.worker_pool import run_jobs
from p3o_lightning.errors import InputError


def odd_jobs(job: tuple[str, str]) -> None:
    """In a worker: fail, die, or leave a mark."""
    kind, path = job
    if kind == "fail":
        raise ValueError("two\nlines")
    if kind == "refuse":
        raise InputError("model.x is 1")
    if kind == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    Path(path).write_text(str(os.getpid()))
    if kind == "meet":  # the other job of the folder, which has to run at the same time for that
        while len(list(Path(path).parent.iterdir())) < 2:
            time.sleep(0.01)
    if kind == "stay":
        time.sleep(120)


def test_a_job_that_fails_or_dies_takes_no_other_along(tmp_path):
    jobs = [("mark", str(tmp_path / "a")), ("fail", ""), ("die", ""), ("refuse", ""), ("mark", str(tmp_path / "b"))]
    ended = dict(run_jobs(odd_jobs, jobs, 1))
    assert ended[jobs[0]] is None and ended[jobs[4]] is None and (tmp_path / "b").exists()
    assert ended[jobs[1]] == "ValueError: two lines"
    assert "-9" in str(ended[jobs[2]])
    assert ended[jobs[3]] == "model.x is 1"
    assert int((tmp_path / "a").read_text()) != os.getpid()


def test_two_workers_work_at_the_same_time(tmp_path):
    ended = dict(run_jobs(odd_jobs, [("meet", str(tmp_path / name)) for name in "ab"], 2))
    assert list(ended.values()) == [None, None]
    assert len({(tmp_path / name).read_text() for name in "ab"}) == 2, "in processes of their own"


def test_a_consumer_that_stops_early_leaves_no_worker(tmp_path):
    running = run_jobs(odd_jobs, [("mark", str(tmp_path / name)) for name in "abc"], 1)
    assert next(running)[1] is None
    running.close()
    assert not (tmp_path / "c").exists()
    worker = int((tmp_path / "a").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)


@pytest.mark.parametrize("ignored", [False, True], ids=["in front", "in the background of a script, where Ctrl-C is ignored"])
def test_a_worker_ends_with_a_parent_that_is_killed(tmp_path, ignored):
    mark = tmp_path / "a"
    code = f"from tests.test_worker_pool import odd_jobs, run_jobs\nlist(run_jobs(odd_jobs, [('stay', {str(mark)!r})], 1))"
    code = f"import signal\nsignal.signal(signal.SIGINT, signal.{'SIG_IGN' if ignored else 'default_int_handler'})\n" + code
    (tmp_path / "pool.py").write_text("if __name__ == '__main__':\n    " + code.replace("\n", "\n    "))
    root = Path(__file__).parent.parent
    paths = os.pathsep.join([str(root), str(root / "tests"), os.environ.get("PYTHONPATH", "")])
    parent = subprocess.Popen([sys.executable, str(tmp_path / "pool.py")], env={**os.environ, "PYTHONPATH": paths})
    while not (mark.exists() and mark.read_text()):
        assert parent.poll() is None
        time.sleep(0.1)
    worker = int(mark.read_text())
    os.kill(worker, 0)
    parent.kill()
    parent.wait()
    for _ in range(300):  # it ends at once; what is waited for is a busy machine
        time.sleep(0.1)
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
    os.kill(worker, signal.SIGKILL)
    raise AssertionError("the worker went on alone")
