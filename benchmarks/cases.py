"""What is measured: the table of cases against TRL, and the sweeps of ours alone. Plain values; both environments read this file."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

SHAPES: dict[str, dict[str, Any]] = {  # Llamas; the parameters in the name are those of the policy
    "1m": {"vocab_size": 1024, "hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4, "num_attention_heads": 4},
    "5m": {"vocab_size": 4096, "hidden_size": 224, "intermediate_size": 600, "num_hidden_layers": 6, "num_attention_heads": 4},
    "15m": {"vocab_size": 8192, "hidden_size": 320, "intermediate_size": 864, "num_hidden_layers": 8, "num_attention_heads": 5},
    "55m": {"vocab_size": 16384, "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 12, "num_attention_heads": 8},
    "smollm2": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
}
MEAN_LENGTH = 32  # tokens of an uneven response, if nothing cut it off


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Args:
        kind: a policy trained by its own responses, or a reward model trained on pairs.
        size: key of SHAPES.
        lengths: fixed, or uneven: responses end after a geometric number of tokens, replies of pairs have a uniform number.
        dtype: what matrices are multiplied in; weights are trained in float32 either way.
        epochs: updates made on one rollout.
        lora: rank of adapters on all linear layers; 0 trains the weights.
        prompts: of one rollout; pairs of one update.
        responses: K, of each prompt.
        prompt_tokens: of every prompt.
        new_tokens: the limit of a response, or the longest reply of a pair, EOS included.
        updates: of a reward model, in one iteration: a pass over its data.
        lr: learning rate on both sides; so small that lengths stay what they are, while the work of an update is the same.
        logger: ours writes to TensorBoard at every update.
        micro_batch: prompts (with their responses), or pairs, of one forward and backward of ours.
        compiled: ours takes a turn with `torch_compile: true` too.
        resident: all sides stay in memory, and take turns iteration by iteration; else by twos, each started anew.
        micro_batches: rows (pairs) a forward that TRL tuned chooses from.
        gpu: all sides work on the first GPU. Seconds are then of the wall, and peak memory is that of its tensors.
    """

    kind: Literal["policy", "reward"] = "policy"
    size: str = "15m"
    lengths: Literal["fixed", "uneven"] = "fixed"
    dtype: Literal["float32", "bfloat16"] = "float32"
    epochs: int = 1
    lora: int = 0
    prompts: int = 16
    responses: int = 2
    prompt_tokens: int = 32
    new_tokens: int = 64
    updates: int = 1
    lr: float = 1e-9
    logger: bool = False
    micro_batch: int = 8
    compiled: bool = False
    resident: bool = True
    micro_batches: tuple[int, ...] = (8, 32)
    gpu: bool = False

    @property
    def rows(self) -> int:
        """Responses of a rollout."""
        return self.prompts * self.responses

    def to_json(self) -> dict[str, Any]:
        """As it is written beside results, lists for tuples."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


def _table() -> dict[str, Case]:
    """Names say what differs from the first case: size, lengths, dtype, then the rest."""
    pairs = Case(kind="reward", prompts=8, new_tokens=224, updates=4, micro_batch=4, compiled=True, micro_batches=(4, 8))
    smollm2 = Case(size="smollm2", micro_batch=4, resident=False)
    both = [("float32", "float32"), ("bf16", "bfloat16")]
    cases: dict[str, Case] = {}
    for size, epochs in (("15m", 1), ("1m", 1), ("1m", 4), ("15m", 4)):
        for lengths in ("fixed", "uneven"):
            for short, dtype in both:
                name = f"{size}-{lengths}-{short}" + (f"-{epochs}epochs" if epochs > 1 else "")
                cases[name] = Case(size=size, lengths=lengths, dtype=dtype, epochs=epochs, compiled=(size, epochs) == ("15m", 1))  # type: ignore[arg-type]
        if (size, epochs) == ("15m", 1):
            for lengths in ("fixed", "uneven"):
                for short, dtype in both:
                    cases[f"reward-15m-{lengths}-{short}"] = replace(pairs, lengths=lengths, dtype=dtype)  # type: ignore[arg-type]
    for short, dtype in both:
        cases[f"smollm2-fixed-{short}-lora"] = replace(smollm2, dtype=dtype, lora=16)  # type: ignore[arg-type]
    for lengths in ("fixed", "uneven"):
        for short, dtype in reversed(both):
            cases[f"smollm2-{lengths}-{short}"] = replace(smollm2, lengths=lengths, dtype=dtype)  # type: ignore[arg-type]
    for short, dtype in reversed(both):
        cases[f"smollm2-fixed-{short}-4epochs"] = replace(smollm2, dtype=dtype, epochs=4, micro_batches=(8,), resident=True)  # type: ignore[arg-type]
    for short, dtype in reversed(both):
        cases[f"smollm2-uneven-{short}-lora"] = replace(smollm2, lengths="uneven", dtype=dtype, lora=16, micro_batches=(8,), resident=True)  # type: ignore[arg-type]
    return cases


CASES = _table()

_ON_GPU = Case(
    size="smollm2", dtype="bfloat16", prompts=64, prompt_tokens=64, new_tokens=64, micro_batch=64, micro_batches=(128,), gpu=True
)
_PAIRS_ON_GPU = replace(_ON_GPU, kind="reward", new_tokens=192, updates=4, micro_batches=(64,))
GPU: dict[str, Case] = {
    "gpu-smollm2-fixed-bf16": _ON_GPU,
    "gpu-smollm2-uneven-bf16": replace(_ON_GPU, lengths="uneven"),
    "gpu-reward-smollm2-fixed-bf16": _PAIRS_ON_GPU,
    "gpu-reward-smollm2-uneven-bf16": replace(_PAIRS_ON_GPU, lengths="uneven"),
}

_SMALL = Case(prompts=8)
GROWTH: dict[str, dict[str, Case]] = {  # what grows -> name of each point -> the case
    "responses": {f"growth-k{k}": replace(_SMALL, responses=k) for k in (2, 4, 8, 16)},
    "length": {f"growth-length{n}": replace(_SMALL, prompts=4, new_tokens=n) for n in (64, 128, 256, 512, 1024)},
    "batch": {f"growth-batch{n}": replace(_SMALL, prompts=n) for n in (4, 8, 16, 32, 64)},
    "size": {f"growth-size-{size}": replace(_SMALL, size=size) for size in SHAPES},
}
OVERHEAD = {"overhead": Case(logger=True)}  # what loading and logging take of a step


def select(patterns: list[str], among: dict[str, Case]) -> dict[str, Case]:
    """The cases whose name one of the patterns is found in, in the table's order; all if there is none."""
    return {name: case for name, case in among.items() if not patterns or any(re.search(pattern, name) for pattern in patterns)}
