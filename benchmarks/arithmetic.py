"""What an iteration has to cost: multiplications and additions counted from the shape of a Llama, and memory by the package's own formulas.

Counted are matrix products, 2 a weight and token, and attention, 4 h a token and token it reads. A prompt is read once for its responses;
the head is read on the positions that predict a response; a backward costs twice its forward.
"""

from __future__ import annotations

from typing import Any

from cases import SHAPES, Case
from equal import length_law


def gigaflop(case: Case) -> dict[str, float]:
    """Of a policy's iteration: generation, scoring (reference and reward), update; 10^9 operations."""
    shape = SHAPES[case.size]
    hidden, layers, heads = shape["hidden_size"], shape["num_hidden_layers"], shape["num_attention_heads"]
    key_value = hidden * shape.get("num_key_value_heads", heads) // heads
    weights = layers * (2 * hidden * hidden + 2 * hidden * key_value + 3 * hidden * shape["intermediate_size"])
    head = shape["vocab_size"] * hidden
    prompt = case.prompt_tokens
    length = case.new_tokens if case.lengths == "fixed" else length_law(case.new_tokens)[0]

    def read(responses: float) -> float:
        """Prompts once, and so many tokens of every response."""
        tokens = case.prompts * prompt + case.rows * responses
        pairs = case.prompts * prompt * prompt / 2 + case.rows * responses * (prompt + responses / 2)
        return 2 * weights * tokens + 4 * hidden * layers * pairs

    generation = read(length - 1) + 2 * head * case.rows * length
    reference = read(length) + 2 * head * case.rows * length
    update = 3 * reference * case.epochs
    return {"generation": generation / 1e9, "scoring": (reference + read(length)) / 1e9, "update": update / 1e9}


def _sizes(size: str) -> dict[str, Any]:
    """A shape in the names of `p3o_lightning.memory.llama`."""
    shape = SHAPES[size]
    return {
        "hidden": shape["hidden_size"],
        "intermediate": shape["intermediate_size"],
        "layers": shape["num_hidden_layers"],
        "heads": shape["num_attention_heads"],
        "key_value_heads": shape.get("num_key_value_heads", shape["num_attention_heads"]),
        "vocabulary": shape["vocab_size"],
        "tied": shape.get("tie_word_embeddings", False),
    }


def parameters(size: str) -> int:
    """Of the policy."""
    from p3o_lightning.memory import llama

    return llama(**_sizes(size)).parameters


def memory_mib(case: Case, micro_batch: int) -> float:
    """Peak of models, optimizer and activations, as `p3o doctor --plan` counts it; Python and libraries not included."""
    from p3o_lightning.memory import Work, llama, policy
    from p3o_lightning.model_reward import ModelReward

    sizes = _sizes(case.size)
    model, scorer = llama(**sizes), llama(**sizes, scalar=True)
    half = case.dtype == "bfloat16"
    work = Work(case.prompts, micro_batch, case.responses, case.prompt_tokens, case.new_tokens, autocast=half, cpu=not case.gpu)
    return policy(model, work, reference=model, rewards=[scorer], reward_rows=ModelReward.batch_rows).peak / 2**20
