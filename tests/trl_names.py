"""Prints the names that docs/from-trl.md has to explain, as JSON: run with the environment that `make bench-quick` makes.

.venv-trl/bin/python tests/trl_names.py > tests/trl_names.json
"""

import dataclasses
import inspect
import json
import re
import sys
from pathlib import Path

import transformers
import trl


def main() -> None:
    """Fields of the configs, arguments of the trainers, tags of the metrics."""
    base = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
    configs = (trl.RLOOConfig, trl.GRPOConfig, trl.RewardConfig, trl.SFTConfig, trl.DPOConfig)
    trainers = (trl.RLOOTrainer, trl.GRPOTrainer, trl.RewardTrainer, trl.SFTTrainer, trl.DPOTrainer)
    fields = {config.__name__: sorted({field.name for field in dataclasses.fields(config)} - base) for config in configs}
    metrics = {}
    for trainer in trainers:
        source = Path(inspect.getfile(trainer)).read_text()
        metrics[trainer.__name__] = sorted(set(re.findall(r'_metrics\[mode\]\[f?"([^"]+)"\]', source)))
    names = {
        "trl": trl.__version__,
        "transformers": transformers.__version__,
        "TrainingArguments": sorted(base),
        "configs": fields,
        "trainers": {trainer.__name__: list(inspect.signature(trainer.__init__).parameters)[1:] for trainer in trainers},
        "ModelConfig": sorted(field.name for field in dataclasses.fields(trl.ModelConfig)),
        "ScriptArguments": sorted(field.name for field in dataclasses.fields(trl.ScriptArguments)),
        "metrics": metrics,
    }
    json.dump(names, sys.stdout, indent=1)
    print()


main()
