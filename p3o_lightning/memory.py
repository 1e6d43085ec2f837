"""How much memory a run takes, by arithmetic: each part in bytes a process, and the peak of each phase.

Symbols: P parameters, T trained ones, L layers, h hidden, i intermediate, a heads x head size, V vocabulary;
         w bytes a weight, v bytes a trained weight, c bytes a value that a linear layer gives (w, or 2 under autocast);
         rows = prompts x responses, p prompt tokens, n completion tokens, t = p + n, N processes.
Units:   bytes, on one process. Host means the memory of the CPU, which on a CPU run is the same.

Activations are those of a Llama block without gradient checkpointing, listed by what autograd keeps (tests/test_memory.py counts it), with
a copy of the prompt for each response: more than there are where the prompt is read once for its responses (packing.py).
Not counted: the CUDA context and NCCL (1 to 2 GiB a GPU), what a recorded decoding step computes on the way, fragmentation, data loaders,
Python itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from p3o_lightning.casting import STEPS

# Float32 copies of the logits at the peak of a backward, the saved one included; measured on a CPU with torch.profiler.
COPIES = {"policy": 4, "direct": 4, "supervised": 3}  # of gather and logsumexp; of both again; of cross_entropy


@dataclass(frozen=True)
class Model:
    """Sizes of one model.

    Args:
        parameters: P, adapters included; tied weights once.
        trained: T.
        weights: bytes of all parameters.
        trained_weights: bytes of those that train.
        layers: L, the repeated blocks.
        block: bytes of the weights of one of them.
        hidden: h.
        intermediate: i, of the gated MLP.
        attention: a, heads x head size.
        heads: of the queries.
        key_value: key-value heads x head size.
        vocabulary: V; 0 for a model with a scalar head.
        linear: float32 weights of linear layers, adapters' too, and a tied head: what casting.py copies to sample and score.
        weight_bytes: w.
        rank: of LoRA adapters on all linear layers; 0 trains the weights themselves.
        adapter_bytes: v, of the adapters.
        critic: PPO's head of h + 1 values is counted among what trains.
        eager: attention that keeps its weights, t of them a head and token; else PyTorch's fused one, which does not.
    """

    parameters: int
    trained: int
    weights: int
    trained_weights: int
    layers: int
    block: int
    hidden: int
    intermediate: int
    attention: int
    heads: int
    key_value: int
    vocabulary: int
    linear: int = 0
    weight_bytes: int = 4
    rank: int = 0
    adapter_bytes: int = 4
    critic: bool = False
    eager: bool = False


@dataclass(frozen=True)
class Work:
    """What one process does.

    Args:
        prompts: of one rollout; rows of a batch in supervised fine-tuning, pairs for a reward model.
        micro_batch: prompts in one forward and backward.
        responses: K, a prompt; 2 for pairs, 1 for demonstrations.
        prompt_tokens: p, at most.
        completion_tokens: n, at most.
        processes: N.
        split: weights, gradients and optimizer state are shared out (fsdp2); else every process holds all (ddp).
        autocast: linear layers run in half precision over float32 weights (trainer.precision 16-mixed, bf16-mixed).
        moments: values that the optimizer keeps for each trained weight; AdamW keeps 2.
        fused: the optimizer's step is one pass over the weights, as the default one's is; others make a copy of them in between.
        token_values: float32 values that the experience holds for each completion token: log-probabilities under policy and reference,
            of PPO the critic's value, and of a vLLM server's responses the log-probability under it.
        cpu: the run is on a CPU.
    """

    prompts: int
    micro_batch: int
    responses: int
    prompt_tokens: int
    completion_tokens: int
    processes: int = 1
    split: bool = False
    autocast: bool = False
    moments: int = 2
    fused: bool = True
    token_values: int = 2
    cpu: bool = False

    @property
    def rows(self) -> int:
        """Sequences of one forward and backward."""
        return self.micro_batch * self.responses

    @property
    def tokens(self) -> int:
        """t, of one sequence."""
        return self.prompt_tokens + self.completion_tokens


def llama(
    *,
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    key_value_heads: int,
    vocabulary: int,
    tied: bool = False,
    weight_bytes: int = 4,
    rank: int = 0,
    scalar: bool = False,
) -> Model:
    """The sizes of a Llama by its shape.

    A block has h (a + 2 kv) + a h + 3 h i + 2 h weights; beside the blocks stand V h embeddings, a head of as many unless it is tied, and
    h of the last norm. LoRA of rank r adds r (in + out) to each of the seven linear layers of a block, in float32. `scalar` puts a head of
    h weights in the place of the vocabulary's.
    """
    size = hidden // heads
    key_value = key_value_heads * size
    linear = [(hidden, hidden), (hidden, key_value), (hidden, key_value), (hidden, hidden)]
    linear += [(hidden, intermediate), (hidden, intermediate), (intermediate, hidden)]
    multiplied = sum(one * other for one, other in linear)
    plain = multiplied + 2 * hidden
    adapter = rank * sum(one + other for one, other in linear)
    head = hidden if scalar else 0 if tied else vocabulary * hidden
    base = layers * plain + vocabulary * hidden + head + hidden
    weights = base * weight_bytes + layers * adapter * 4
    return Model(
        parameters=base + layers * adapter,
        trained=layers * adapter if rank else base,
        weights=weights,
        trained_weights=layers * adapter * 4 if rank else weights,
        layers=layers,
        block=plain * weight_bytes + adapter * 4,
        hidden=hidden,
        intermediate=intermediate,
        attention=hidden,
        heads=heads,
        key_value=key_value,
        vocabulary=0 if scalar else vocabulary,
        linear=layers * adapter + (layers * multiplied + (hidden if scalar else vocabulary * hidden) if weight_bytes == 4 else 0),
        weight_bytes=weight_bytes,
        rank=rank,
    )


def with_critic(model: Model, weight_bytes: int = 4) -> Model:
    """The model with PPO's critic beside it, which trains: a head of h weights and a bias."""
    head = model.hidden + 1
    return replace(
        model,
        parameters=model.parameters + head,
        trained=model.trained + head,
        weights=model.weights + head * weight_bytes,
        trained_weights=model.trained_weights + head * weight_bytes,
        critic=True,
    )


# ---- parts


def computed_in(model: Model, work: Work) -> int:
    """c: bytes of a value that a linear layer gives."""
    return 2 if work.autocast else model.weight_bytes


def cache_bytes(model: Model, work: Work, rows: int, tokens: int) -> int:
    """Keys and values of what was read: 2 L (key-value heads x head size) c, a row and token."""
    return 2 * model.layers * model.key_value * computed_in(model, work) * rows * tokens


def block_bytes(model: Model, work: Work) -> int:
    """What autograd keeps of one block, a token of a sequence of t.

    Two norms keep 4 h each, their input in float32, and 4 of its inverse deviation. Attention keeps queries, keys, values (repeated to all
    heads) and its output, 4 c a; the fused one 4 a head and c t of the mask, the eager one t weights a head, in float32 and in c. The MLP
    keeps its gate before and after the nonlinearity, and what it multiplies, 3 c i. What else is kept are the inputs of what trains:

    all weights  2 h of the norms' gains, 2 h of the projections behind them, i of the last one, each in c (gains: in 4 under autocast,
                 which also copies the input of each of the five projections)
    adapters     the input of each of the seven in the adapters' dtype: 2 h + i where that is also the model's, since the input is then
                 shared, else 5 h + a + i; and 7 ranks
    """
    c, h, i, a, heads, t = computed_in(model, work), model.hidden, model.intermediate, model.attention, model.heads, work.tokens
    attention = 4 * c * a + (heads * t * (4 + (c if c < 4 else 0)) if model.eager else 4 * heads + c * t)
    kept = 2 * (4 * h + 4) + attention + 3 * c * i
    if not model.rank:
        return kept + (2 * 4 * h + 5 * c * h + c * i if work.autocast else 4 * c * h + c * i)
    v = c if work.autocast else model.adapter_bytes
    copied = work.autocast or model.adapter_bytes != model.weight_bytes
    return kept + (v * (5 * h + a + i) if copied else v * (2 * h + i)) + 7 * model.rank * v


def activation_bytes(model: Model, work: Work) -> int:
    """What autograd keeps of one micro-batch: rows x t x L x block, the last norm and the head's input, and one float32 logit a token
    of the vocabulary on completion positions (those that `logsumexp` and `gather` read).
    """
    c, h = computed_in(model, work), model.hidden
    end = 4 * h + 4 + (0 if model.rank else (4 if work.autocast else c) * h)
    head = work.rows * (work.completion_tokens + 1) * c * h if model.vocabulary and not model.rank else 0
    return work.rows * work.tokens * (model.layers * block_bytes(model, work) + end) + head + logit_bytes(model, work)


def logit_bytes(model: Model, work: Work) -> int:
    """The logits of the completions in float32: 4 rows n V."""
    return 4 * work.rows * work.completion_tokens * model.vocabulary


def forward_bytes(model: Model, work: Work, rows: int, tokens: int, scored: int) -> int:
    """The peak of a forward without gradients: a block's MLP, c (4 i + 2 h) a token (adapters: their inputs too), or the logits of `scored`
    positions a row as given, in float32 and divided by the temperature, whichever is larger.
    """
    c, h, i = computed_in(model, work), model.hidden, model.intermediate
    block = c * (4 * i + 2 * h)
    if model.rank:
        block += model.adapter_bytes * i * (1 if model.adapter_bytes == model.weight_bytes else 3)
    if model.eager:
        block = max(block, 2 * 4 * model.heads * tokens)
    return max(rows * tokens * block, rows * scored * model.vocabulary * (8 + (c if c < 4 else 0)))


def drawing_bytes(model: Model, work: Work, rows: int) -> int:
    """Drawing one token a row: logits in c, over the temperature, their weights, and these as whole blocks, in float32: rows V (c + 12)."""
    return rows * model.vocabulary * (computed_in(model, work) + 12)


def copied_bytes(model: Model, work: Work) -> int:
    """The linear layers' weights once more, while responses are sampled: in half precision under autocast; in float32 laid out for it, on a
    CPU where there are so many tokens to come that it pays, with adapters added to them. Some processors fill a layer's rows up to a
    multiple of 64, which is not counted.
    """
    if work.autocast:
        return 2 * model.linear
    adapters = model.trained if model.rank and model.weight_bytes == 4 else 0
    return 4 * (model.linear - adapters) if work.cpu and work.completion_tokens >= STEPS else 0


def value_bytes(model: Model, work: Work) -> int:
    """What the critic reads, the hidden states of the completions in float32: 4 rows n h."""
    return 4 * work.rows * work.completion_tokens * model.hidden if model.critic else 0


def experience_bytes(work: Work) -> int:
    """One rollout on the host: prompts (9 p + K (17 n + 4)).

    Ids are int64, masks bytes, and float32 two log-probabilities a token and a score a response; what else there is of a token adds 4 n.
    """
    token = 9 + 4 * work.token_values
    return work.prompts * (9 * work.prompt_tokens + work.responses * (token * work.completion_tokens + 4))


def checkpoint_bytes(model: Model, work: Work) -> int:
    """On disk: all weights, adapters or not, the optimizer's state, and the pending experience of every process."""
    return model.weights + work.moments * model.trained_weights + work.processes * experience_bytes(work)


# ---- a run

Phase = Literal["sampling", "scoring", "backward", "step"]
PHASES: tuple[Phase, ...] = ("sampling", "scoring", "backward", "step")


@dataclass(frozen=True)
class Part:
    """What takes memory, the formula in words, bytes, and in which phases."""

    name: str
    formula: str
    size: int
    phases: tuple[Phase, ...] = PHASES


@dataclass(frozen=True)
class Estimate:
    """The parts of a run on one process, and what it leaves on the host and on disk."""

    parts: list[Part]
    host: int
    checkpoint: int
    phases: dict[Phase, int] = field(init=False)

    def __post_init__(self) -> None:
        used = [phase for phase in PHASES if any(part.phases == (phase,) for part in self.parts)]
        object.__setattr__(self, "phases", {phase: sum(part.size for part in self.parts if phase in part.phases) for phase in used})

    @property
    def peak(self) -> int:
        """Of the phase that needs most: the phases follow each other."""
        return max(self.phases.values())

    def size(self, name: str) -> int:
        """Of one part; 0 where the run has none of it."""
        return sum(part.size for part in self.parts if part.name == name)


def training_parts(model: Model, work: Work, copies: int = 0) -> list[Part]:
    """What every stage has: weights, gradients, optimizer, and what a backward keeps. Under fsdp2 shares of 1/N of the first three.

    Gradients are counted in full beside all activations, which is exact where they accumulate, and else a little too much; Lightning keeps
    them from one update to the next backward, while the next batch is sampled and scored. `copies` of the logits are alive at the peak.
    """
    split = work.processes if work.split else 1
    share = "" if split == 1 else f" / {split} processes"
    parts = [
        Part("policy", f"parameters x bytes{share}", model.weights // split),
        Part("optimizer", f"{work.moments} x trained weights{share}", work.moments * model.trained_weights // split),
        Part("gradients", f"trained weights{share}", model.trained_weights // split),
        Part(
            "activations", "rows x tokens x what each layer keeps", activation_bytes(model, work) - logit_bytes(model, work), ("backward",)
        ),
    ]
    if not work.fused:
        parts.append(Part("update", "a copy of the trained weights, in the optimizer's step", model.trained_weights // split, ("step",)))
    if model.vocabulary:
        formula = f"{copies} x rows x completion tokens x vocabulary, float32"
        parts.append(Part("logits", formula, copies * logit_bytes(model, work), ("backward",)))
    if model.critic:
        parts.append(
            Part("values", "rows x completion tokens x hidden, float32 (critic)", value_bytes(model, work), ("scoring", "backward"))
        )
    if work.autocast:
        parts.append(Part("half-precision copies", "2 x parameters (autocast)", 2 * model.parameters, ("backward",)))
    if work.processes > 1 and not work.split:
        parts.append(Part("buckets", "trained weights (DDP)", model.trained_weights))
    if work.split:
        rest = model.weights - model.layers * model.block
        parts.append(Part("gathered layers", "embeddings and head, two layers, their gradients", 2 * rest + 3 * model.block, ("backward",)))
    return parts


def supervised(model: Model, work: Work) -> Estimate:
    """Supervised fine-tuning. Logits are made at every position, prompt included: `work.completion_tokens` is the whole row."""
    return Estimate(training_parts(model, work, COPIES["supervised"]), 0, checkpoint_bytes(model, replace(work, prompts=0)))


def reward(model: Model, work: Work) -> Estimate:
    """A reward model: two rows a pair, a scalar head."""
    return Estimate(training_parts(model, work), 0, checkpoint_bytes(model, replace(work, prompts=0)))


def direct(model: Model, work: Work, *, reference: Model | None) -> Estimate:
    """DPO: two rows a pair, read whole by the reference and then by the policy, with logits at every position. `reference` as in `policy`.

    All of a row is counted as its response, `work.completion_tokens`: only a response's logits are copied in float32.
    """
    parts = [*training_parts(model, work, COPIES["direct"]), reference_part(reference, work)]
    reader = reference or model
    logits = work.rows * work.tokens * reader.vocabulary * (computed_in(reader, work) + 8)
    scored = max(forward_bytes(reader, work, work.rows, work.tokens, 0), logits)
    parts.append(Part("scoring", "logits of a batch and two float32 copies, or one layer of it", scored, ("scoring",)))
    return Estimate(parts, 0, checkpoint_bytes(model, replace(work, prompts=0)))


def reference_part(reference: Model | None, work: Work) -> Part:
    """Its weights; None: the policy with its adapter switched off, which takes nothing."""
    if reference is None:
        return Part("reference", "the policy without its adapter: nothing", 0)
    split = work.processes if work.split else 1
    return Part("reference", f"parameters x bytes{'' if split == 1 else f' / {split} processes'}", reference.weights // split)


def policy(model: Model, work: Work, *, reference: Model | None, rewards: list[Model], reward_rows: int, served: bool = False) -> Estimate:
    """P3O or a relative. `reference` None: the policy with its adapter switched off; `reward_rows` are scored at once.

    Under fsdp2 a process holds the whole policy while it samples and scores, so that `generate` needs no collective. `served`: a vLLM
    server samples; of adapters it is given a merged copy, and of what is split one that is gathered on the first process's host.
    """
    split = work.processes if work.split else 1
    share = "" if split == 1 else f" / {split} processes"
    rows = work.prompts * work.responses
    parts = [*training_parts(model, work, COPIES["policy"]), reference_part(reference, work)]
    if rewards:
        parts.append(Part("reward", f"parameters x bytes{share}", sum(item.weights for item in rewards) // split))
    if work.split:
        gathered: tuple[Phase, ...] = ("scoring",) if served else ("sampling", "scoring")
        parts.append(Part("gathered policy", "parameters x bytes, whole on every process", model.weights, gathered))
    if served and (model.rank or work.split):
        parts.append(Part("weights for the server", "parameters x bytes, on the first process", model.weights, ("sampling",)))
    if not served:
        parts += sampling_parts(model, work)
    each = [(model, work.rows, work.completion_tokens), *((item, min(reward_rows, rows), 0) for item in rewards)]
    if reference is not None:
        each.append((reference, work.rows, work.completion_tokens))
    scored = max(forward_bytes(item, work, count, work.tokens, positions) for item, count, positions in each)
    parts.append(Part("scoring", "logits of a micro-batch, or one layer of it", scored, ("scoring",)))
    if work.autocast:
        largest = max(item.linear for item, *_ in each)
        parts.append(Part("cast weights", "2 x linear weights of one model (autocast)", 2 * largest, ("scoring",)))
    return Estimate(parts, experience_bytes(work), checkpoint_bytes(model, work))


def sampling_parts(model: Model, work: Work) -> list[Part]:
    """What drawing the responses takes in the policy's own process."""
    rows, read = work.prompts * work.responses, work.tokens - 1  # the last token drawn is not read
    cache = "2 x layers x key-value size x bytes x rows x tokens"
    drawn = max(drawing_bytes(model, work, rows), forward_bytes(model, work, work.prompts, work.prompt_tokens, 1))
    parts = [
        Part("key-value cache", cache, cache_bytes(model, work, rows, read), ("sampling",)),
        Part("drawing", "logits of a token a row, or a layer of the prompts", drawn, ("sampling",)),
    ]
    if copied := copied_bytes(model, work):
        formula = "2 x linear weights (autocast)" if work.autocast else "4 x linear weights, laid out (float32 on a CPU)"
        parts.append(Part("copied weights", formula, copied, ("sampling",)))
    return parts
