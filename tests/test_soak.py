"""Long runs: memory stays flat and every file is closed again. Run by hand, `make test-soak`; the figures stand in docs/reliability.md."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time

import pytest

UPDATES, WARM_UP, SAMPLED_EVERY = 2000, 200, 25
GROWTH = 0.03  # of the resident memory, after the warm-up

WATCH = f'''
import json
import lightning.pytorch as L
import psutil


class Watch(L.Callback):
    """Notes the process's resident memory and open files."""

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step % {SAMPLED_EVERY} == 0:
            process = psutil.Process()
            row = {{"step": trainer.global_step, "rss": process.memory_info().rss, "files": process.num_fds()}}
            with open("watched.jsonl", "a") as file:
                file.write(json.dumps(row) + "\\n")
'''


@pytest.mark.soak
@pytest.mark.parametrize(
    ("stage", "more"),
    [
        ("policy", ["--trainer.val_check_interval", "26", "--model.kl_target", "0.05"]),
        ("reward", ["--checkpoint.every_n_steps", "4", "--trainer.log_every_n_steps", "1"]),
        ("sft", ["--checkpoint.every_n_steps", "4", "--trainer.log_every_n_steps", "1"]),
    ],
)
def test_memory_is_flat_and_files_are_closed(tmp_path, stage, more):
    (tmp_path / "watch.py").write_text(WATCH)
    given = [
        "fit",
        "--config",
        f"configs/debug/{stage}.yaml",
        "--trainer.max_steps",
        str(UPDATES),
        "--trainer.callbacks+=watch.Watch",
        *more,
    ]
    print("\np3o", *given)
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "p3o_lightning.cli", *given], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "watched.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == UPDATES
    early = [row for row in rows if WARM_UP <= row["step"] <= 2 * WARM_UP]
    late = [row for row in rows if row["step"] > 0.9 * UPDATES]
    before, after = (statistics.median(row["rss"] for row in part) for part in (early, late))
    files = [{row["files"] for row in part} for part in (early, late)]
    print(
        f"{stage}: {before / 2**20:.1f} MiB at updates {WARM_UP} to {2 * WARM_UP}, {after / 2**20:.1f} MiB at the end "
        f"({100 * (after / before - 1):+.2f} %); open files {sorted(files[0])} and {sorted(files[1])}; {time.monotonic() - began:.0f} s"
    )
    print("  MiB:", *(f"{row['step']}: {row['rss'] / 2**20:.1f}" for row in rows if row["step"] % 200 == 0), sep="  ")
    assert after / before - 1 < GROWTH
    assert max(files[1]) <= max(files[0])
