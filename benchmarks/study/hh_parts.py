"""`python benchmarks/study/hh_parts.py FILE FOLDER`: hh-rlhf in three parts without a common prompt: reward, gold and held_out.jsonl.

Two reward models learn from one part each: the policy is trained on the first, and the second, which it never meets, tells what of the gain
was the first model's own. Both, and the policy, are measured on the third.
"""

from __future__ import annotations

import gzip
import json
import random
import sys
from collections import defaultdict
from pathlib import Path

SHARES = {"reward": 0.4, "gold": 0.4, "held_out": 0.2}


def prompt_of(row: dict[str, str]) -> str:
    """The conversation up to the reply in which the two texts part."""
    alike = next((at for at, (one, other) in enumerate(zip(row["chosen"], row["rejected"], strict=False)) if one != other), None)
    return row["chosen"][:alike].rpartition("\n\nAssistant:")[0]


def parts(lines: list[str], seed: int = 0) -> dict[str, list[str]]:
    """The lines of each part; those of one prompt stay together."""
    by_prompt = defaultdict(list)
    for line in lines:
        by_prompt[prompt_of(json.loads(line))].append(line)
    prompts = sorted(by_prompt)
    random.Random(seed).shuffle(prompts)
    found, begin = {}, 0.0
    for name, share in SHARES.items():
        chosen = prompts[round(begin * len(prompts)) : round((begin + share) * len(prompts))]
        found[name] = [line for prompt in chosen for line in by_prompt[prompt]]
        begin += share
    return found


def main(file: str, folder: str) -> None:
    with gzip.open(file, "rt", encoding="utf-8") as source:
        lines = source.read().splitlines()
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, part in parts(lines).items():
        (Path(folder) / f"{name}.jsonl").write_text("\n".join(part) + "\n", encoding="utf-8")
        print(f"{folder}/{name}.jsonl: {len(part)} comparisons")


if __name__ == "__main__":
    main(*sys.argv[1:])
