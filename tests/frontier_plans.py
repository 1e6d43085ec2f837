"""A plan of `p3o frontier` that takes seconds, for the tests of its parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

SMALL: dict[str, Any] = {
    "config": "configs/debug/policy.yaml",
    "rollouts": 2,
    "settings": {"trainer.logger": False, "data.val_fraction": 0.2, "trainer.limit_val_batches": 0},
    "evaluate": {"times": 2, "prompts": 4, "responses": 2, "gold": "p3o_lightning.rewards.share_of_letter_e"},
    "variants": {"P3O": {}, "RLOO": {"settings": {"model.objective": "rloo"}}},
    "grid": {"model.kl_coef": [0.001, 0.1]},
    "seeds": [0, 1],
}


def plan_file(folder: Path, name: str = "plan.yaml", **changes: Any) -> Path:
    path = folder / name
    path.write_text(yaml.safe_dump({**SMALL, **changes}, sort_keys=False))
    return path
