"""The arithmetic of memory against what torch holds: sizes to the byte, what autograd keeps within 6 %, the table of the document."""

from __future__ import annotations

import contextlib
import itertools
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import LLAMA, PROMPTS, collate, policy, prompts, trainer
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

from p3o_lightning import PairwisePolicy, generation, memory
from p3o_lightning.batches import PairBatch
from p3o_lightning.callbacks import LastCheckpoint
from p3o_lightning.casting import STEPS, laid_out
from p3o_lightning.critic import Critic
from p3o_lightning.direct import pair_logps
from p3o_lightning.forwards import completion_logps
from p3o_lightning.generation import Sampling, sample_completions
from p3o_lightning.models import attach_adapter
from p3o_lightning.scoring import grouped_logps_and_hidden, rows_apart
from p3o_lightning.stage import Stage

SHAPES = {
    "small": {"hidden": 60, "intermediate": 200, "layers": 2, "heads": 6, "key_value_heads": 2, "vocabulary": 509},
    "wide": {"hidden": 128, "intermediate": 224, "layers": 5, "heads": 4, "key_value_heads": 4, "vocabulary": 1500},
}
WORKS = {"small": memory.Work(4, 3, 2, 7, 11), "wide": memory.Work(4, 4, 3, 30, 9)}  # prompts, micro-batch, K, prompt, completion


def build(shape, *, dtype=torch.float32, rank=0, tied=False, scalar=False, attention="sdpa", device="cpu"):
    sizes = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=sizes["hidden"],
        intermediate_size=sizes["intermediate"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["heads"],
        num_key_value_heads=sizes["key_value_heads"],
        vocab_size=sizes["vocabulary"],
        tie_word_embeddings=tied,
        num_labels=1,
    )
    torch.manual_seed(0)
    with torch.device(device):
        head = AutoModelForSequenceClassification if scalar else AutoModelForCausalLM
        model = head.from_config(config, attn_implementation=attention)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        return attach_adapter(model, {"r": rank}).train() if rank else model.train()


def sizes_of(shape, *, dtype=torch.float32, attention="sdpa", **options):
    return replace(memory.llama(**SHAPES[shape], weight_bytes=dtype.itemsize, **options), eager=attention == "eager")


def batch(work, vocabulary, prompts):
    mask = torch.ones(prompts, work.prompt_tokens, dtype=torch.bool)
    mask[0, :2] = False  # else attention needs no mask
    shape = prompts, work.responses, work.completion_tokens
    tokens = torch.randint(vocabulary, mask.shape), mask, torch.randint(vocabulary, shape), torch.ones(shape, dtype=torch.bool)
    return tokens


def nbytes(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


# ---- exact


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "options", [{}, {"tied": True}, {"rank": 3}, {"rank": 3, "dtype": torch.bfloat16}, {"scalar": True, "dtype": torch.bfloat16}]
)
def test_the_sizes_of_a_llama_are_those_of_its_shape(shape, options):
    model, sizes = build(shape, device="meta", **options), sizes_of(shape, **options)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    block = next(module for module in model.modules() if type(module).__name__ == "LlamaDecoderLayer")
    assert sizes.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert sizes.trained == sum(parameter.numel() for parameter in trained)
    assert sizes.weights == nbytes(model.parameters())
    assert sizes.trained_weights == nbytes(trained)
    assert sizes.block == nbytes(block.parameters())
    linear = [item.weight for item in model.modules() if type(item) is torch.nn.Linear]
    assert sizes.linear == sum(weight.numel() for weight in linear if weight.dtype == torch.float32)


@pytest.mark.parametrize("options", [{}, {"dtype": torch.bfloat16}, {"dtype": torch.bfloat16, "rank": 4}])
def test_weights_gradients_and_optimizer_are_exact_after_an_update(options):
    model, work = build("small", **options), WORKS["small"]
    stage = type("Bare", (), {"model": model, "lr": 1e-3, "optimizer": None, "lr_scheduler": None, "parameters": model.parameters})()
    optimizer = Stage.configure_optimizers(stage)
    completion_logps(model, *batch(work, 509, 3)).sum().backward()
    optimizer.step()
    estimate = memory.policy(sizes_of("small", **options), work, reference=None, rewards=[], reward_rows=1)
    assert estimate.size("policy") == nbytes(model.parameters())
    assert estimate.size("gradients") == nbytes(item.grad for item in model.parameters() if item.grad is not None)
    state = optimizer.state.values()
    assert estimate.size("optimizer") == nbytes(item for values in state for name, item in values.items() if name != "step")


def test_gradients_stay_while_the_next_rollout_is_made(tmp_path):
    """They are freed by the next backward alone, so that they are there beside the cache."""
    held = []

    class Weighed(PairwisePolicy):
        def rollout_step(self, prompts):
            held.append(nbytes(item.grad for item in self.model.parameters() if item.grad is not None))
            return super().rollout_step(prompts)

    stage = policy(Weighed)
    trainer(tmp_path, max_steps=2).fit(stage, stage.wrap_train_dataloader(prompts()))
    estimate = memory.policy(sizes_of("small"), WORKS["small"], reference=None, rewards=[], reward_rows=1)
    (gradients,) = [part for part in estimate.parts if part.name == "gradients"]
    assert held == [0, nbytes(stage.model.parameters())] and gradients.phases == memory.PHASES


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "autocast"])
def test_the_cache_is_exact(kind, monkeypatch):
    kept, new = [], generation.new_cache
    monkeypatch.setattr(generation, "new_cache", lambda *given: kept.append(new(*given)) or kept[0])
    dtype, work = torch.bfloat16 if kind == "bfloat16" else torch.float32, replace(WORKS["small"], autocast=kind == "autocast")
    model = build("small", dtype=dtype).eval()
    tokens, mask, *_ = batch(work, 509, work.prompts)
    sampling = Sampling(work.responses, work.completion_tokens)
    with torch.autocast("cpu", torch.bfloat16, enabled=work.autocast):
        sample_completions(model, tokens, mask, sampling, eos_token_id=10_000, pad_token_id=0, seed=0)  # no response ends
    held = nbytes(item for layer in kept[0].layers for item in layer._buffers)
    estimate = memory.policy(sizes_of("small", dtype=dtype), work, reference=None, rewards=[], reward_rows=1)
    assert estimate.size("key-value cache") == held > 0


@pytest.mark.parametrize("objective", ["p3o", "ppo"])
def test_the_experience_is_exact(objective):
    stage = policy(objective=objective)
    made = stage.rollout_step(collate(PROMPTS[:4]))
    work = memory.Work(4, 4, 2, made.prompt_tokens.shape[1], made.completion_tokens.shape[2], token_values=2 + (objective == "ppo"))
    assert memory.experience_bytes(work) == nbytes(item for item in made if item is not None)


@pytest.mark.parametrize("rank", [0, 2])
def test_the_checkpoint_is_as_large_as_its_file(rank, tmp_path):
    """Beside them it holds a tokenizer, settings, and torch's index of some hundred bytes a tensor."""
    shape = {"hidden": 96, "intermediate": 256, "layers": 3, "heads": 2, "key_value_heads": 1, "vocabulary": 10}
    config = {**LLAMA, "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3}
    stage = policy(model=config, peft_config={"r": rank} if rank else None)
    trainer(tmp_path, max_steps=1, callbacks=[LastCheckpoint()]).fit(stage, stage.wrap_train_dataloader(prompts()))
    expected = memory.checkpoint_bytes(memory.llama(**shape, rank=rank), memory.Work(4, 4, 2, 9, 5))
    assert 0 < (tmp_path / "checkpoints/last.ckpt").stat().st_size - expected < 100_000


# ---- what a backward needs


def completions(model, work, vocabulary):
    return completion_logps(model, *batch(work, vocabulary, work.micro_batch))


def pairs(model, work, vocabulary):
    """As DPO reads them: two rows a pair, the prompt of one token."""
    shape = work.micro_batch, 2, work.tokens
    real = torch.ones(shape, dtype=torch.bool)
    lengths = torch.full(shape[:2], work.completion_tokens)
    lengths[0, 0] -= 1
    real[0, 0, -1] = False  # else attention needs no mask
    return pair_logps(model, PairBatch(torch.randint(vocabulary, shape), real, lengths, None))


def with_values(model, work, vocabulary):
    """As PPO reads completions, a padded row for each."""
    with rows_apart():
        logps, hidden = grouped_logps_and_hidden(model, *batch(work, vocabulary, work.micro_batch))
    return logps + Critic(model)(hidden, torch.ones(logps.shape, dtype=torch.bool))


def saved_bytes(model, work, vocabulary, autocast, read=completions):
    """Storage that autograd keeps, each counted once; the model's own weights and buffers are not."""
    own = {item.untyped_storage().data_ptr() for item in [*model.parameters(), *model.buffers()]}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    half = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
    with half, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logps = read(model, work, vocabulary)
    assert logps.requires_grad  # the graph is alive: no address was used twice
    return sum(kept.values())


KINDS = ["float32", "bfloat16", "float32 adapter", "bfloat16 adapter", "autocast", "autocast adapter"]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_activations_are_what_autograd_keeps(kind, shape, attention):
    dtype = torch.bfloat16 if kind.startswith("bfloat16") else torch.float32
    options = {"dtype": dtype, "rank": 4 if "adapter" in kind else 0, "attention": attention, "tied": True}
    work = replace(WORKS[shape], autocast="autocast" in kind)
    sizes = sizes_of(shape, **options)
    copies = 2 * sizes.parameters if work.autocast else 0
    tolerance = 0.06 if sizes.rank else 0.012  # the first block of a model with adapters keeps less
    expected = memory.activation_bytes(sizes, work) + copies
    assert expected == pytest.approx(saved_bytes(build(shape, **options), work, sizes.vocabulary, work.autocast), rel=tolerance)


@pytest.mark.parametrize("read", [pairs, with_values])
@pytest.mark.parametrize("kind", KINDS)
def test_the_activations_of_pairs_and_of_a_critic_are_what_autograd_keeps(kind, read):
    dtype = torch.bfloat16 if kind.startswith("bfloat16") else torch.float32
    options = {"dtype": dtype, "rank": 4 if "adapter" in kind else 0, "tied": True}
    work = replace(memory.Work(4, 3, 2, 1, 35) if read is pairs else WORKS["wide"], autocast="autocast" in kind)
    sizes = sizes_of("wide", **options)
    expected = memory.activation_bytes(sizes, work) + (2 * sizes.parameters if work.autocast else 0)
    if read is with_values:
        assert memory.value_bytes(sizes, work) == 0
        expected += memory.value_bytes(memory.with_critic(sizes), work)
    tolerance = 0.06 if sizes.rank else 0.012
    assert expected == pytest.approx(saved_bytes(build("wide", **options), work, sizes.vocabulary, work.autocast, read), rel=tolerance)


def peak(function):
    """The most bytes allocated at once while it runs, and what it returned."""
    changes, answer = allocations(function)
    return max(itertools.accumulate(changes, initial=0)), answer


def allocations(function):
    """Bytes taken (or given back) one after the other while it runs, and what it returned."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        answer = function()
    changes = sorted((event.start_ns(), event.nbytes()) for event in run.profiler.kineto_results.events() if event.name() == "[memory]")
    return [size for _, size in changes], answer


def test_the_backward_of_logits_needs_as_many_copies_as_counted():
    """A vocabulary so large that nothing else counts."""
    work, vocabulary = memory.Work(2, 2, 2, 4, 6), 40_000
    config = LlamaConfig(hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1, vocab_size=vocabulary)
    model = AutoModelForCausalLM.from_config(config)
    unit = 4 * work.rows * work.completion_tokens * vocabulary
    logps = completion_logps(model, *batch(work, vocabulary, 2)).sum()
    assert 1 + peak(logps.backward)[0] / unit == pytest.approx(memory.COPIES["policy"], rel=0.1)  # the saved one, and what is made
    preferred = pairs(model, replace(work, prompt_tokens=1, completion_tokens=10), vocabulary).sum()
    unit = 4 * work.rows * 10 * vocabulary
    assert 1 + peak(preferred.backward)[0] / unit == pytest.approx(memory.COPIES["direct"], rel=0.1)
    tokens = torch.randint(vocabulary, (work.rows, work.completion_tokens))
    unit = 4 * work.rows * work.completion_tokens * vocabulary
    loss = torch.nn.functional.cross_entropy(model(tokens).logits.flatten(0, 1), tokens.flatten(), reduction="sum")
    assert 1 + peak(loss.backward)[0] / unit == pytest.approx(memory.COPIES["supervised"], rel=0.1)


def test_a_reference_reads_pairs_in_as_much_as_counted():
    """As above, in both precisions: the logits of all positions, and those of the responses twice."""
    work, vocabulary = memory.Work(2, 2, 2, 1, 29), 20_000
    shape = {"hidden": 4, "intermediate": 4, "layers": 1, "heads": 1, "key_value_heads": 1, "vocabulary": vocabulary}
    config = LlamaConfig(hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1, vocab_size=vocabulary)
    for dtype in (torch.float32, torch.bfloat16):
        reference = AutoModelForCausalLM.from_config(config).to(dtype)
        sizes = memory.llama(**shape, weight_bytes=dtype.itemsize)
        with torch.no_grad():
            found = peak(lambda model=reference: pairs(model, work, vocabulary))[0]
        assert memory.direct(sizes, work, reference=sizes).size("scoring") == pytest.approx(found, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_drawing_takes_what_is_counted(dtype):
    """At a temperature, and with a vocabulary that is no whole number of blocks."""
    shape = {"hidden": 4, "intermediate": 4, "layers": 1, "heads": 1, "key_value_heads": 1, "vocabulary": 20_001}
    sizes = memory.llama(**shape, weight_bytes=dtype.itemsize)
    logits = torch.randn(4, 20_001).to(dtype)
    found = logits.nbytes + peak(lambda: generation.draw_with_logps(logits, torch.rand(4), Sampling(temperature=0.7)))[0]
    assert memory.drawing_bytes(sizes, memory.Work(2, 2, 2, 1, 5), 4) == pytest.approx(found, rel=0.05)


# ---- copies for sampling


@pytest.mark.parametrize("tokens", [STEPS, STEPS - 1])
@pytest.mark.parametrize("kind", ["float32", "autocast", "bfloat16", "float32 adapter", "bfloat16 adapter"])
def test_weights_copied_to_sample_are_as_large_as_counted(kind, tokens):
    options = {"dtype": torch.bfloat16 if kind.startswith("bfloat16") else torch.float32, "rank": 4 if "adapter" in kind else 0}
    model, sizes = build("wide", tied=True, **options), sizes_of("wide", tied=True, **options)
    work = replace(WORKS["wide"], completion_tokens=tokens, autocast=kind == "autocast", cpu=True)
    half = torch.autocast("cpu", torch.bfloat16) if work.autocast else contextlib.nullcontext()
    with contextlib.ExitStack() as inside:
        held = allocations(lambda: [inside.enter_context(each) for each in (torch.no_grad(), half, laid_out(model, tokens))])[0]
    counted, layers = memory.copied_bytes(sizes, work), [layer.weight for layer in model.modules() if type(layer) is torch.nn.Linear]
    filled = sum(-(-len(weight) // 64) * 64 * weight.shape[1] for weight in layers) / sum(weight.numel() for weight in layers)
    assert 0.995 * counted <= sum(held) <= 1.005 * filled * counted, "some processors fill a layer's rows up to 64"
    copies = work.autocast or (tokens == STEPS and kind != "bfloat16")
    assert (counted > 0) == copies
    estimate = memory.policy(sizes, work, reference=None, rewards=[], reward_rows=1)
    assert [part.phases for part in estimate.parts if part.name == "copied weights"] == [("sampling",)] * copies
    assert estimate.size("cast weights") == (2 * sizes.linear if work.autocast else 0)


# ---- a run


def planned(size, rank=0, served=False, **options):
    model = memory.llama(**size, weight_bytes=2, rank=rank)
    head = memory.llama(**size, weight_bytes=2, scalar=True)
    work = memory.Work(prompts=16, micro_batch=2, responses=2, prompt_tokens=512, completion_tokens=256, **options)
    return memory.policy(model, work, reference=None if rank else model, rewards=[head], reward_rows=32, served=served)


LLAMAS = {
    "135M": {"hidden": 576, "intermediate": 1536, "layers": 30, "heads": 9, "key_value_heads": 3, "vocabulary": 49152, "tied": True},
    "1B": {"hidden": 2048, "intermediate": 8192, "layers": 16, "heads": 32, "key_value_heads": 8, "vocabulary": 128256, "tied": True},
    "7B": {"hidden": 4096, "intermediate": 11008, "layers": 32, "heads": 32, "key_value_heads": 32, "vocabulary": 32000},
    "70B": {"hidden": 8192, "intermediate": 28672, "layers": 80, "heads": 64, "key_value_heads": 8, "vocabulary": 32000},
}


def test_published_parameter_counts():
    counts = {name: memory.llama(**size).parameters for name, size in LLAMAS.items()}
    assert counts == {"135M": 134_515_008, "1B": 1_235_814_400, "7B": 6_738_415_616, "70B": 68_976_648_192}


def test_the_peak_is_of_one_phase_and_not_the_sum():
    estimate = planned(LLAMAS["135M"])
    assert set(estimate.phases) == {"sampling", "scoring", "backward"}
    loop = planned(LLAMAS["135M"], fused=False)  # a step that makes a copy of the weights is a phase of its own
    assert set(loop.phases) == set(memory.PHASES) and loop.size("update") == loop.size("gradients") and not estimate.size("update")
    assert estimate.peak == estimate.phases["backward"] < sum(part.size for part in estimate.parts)
    assert "key-value cache" not in {part.name for part in estimate.parts if "backward" in part.phases}


def test_splitting_shares_out_what_is_kept_and_gathers_the_policy_to_sample():
    alone, ddp, split = planned(LLAMAS["1B"]), planned(LLAMAS["1B"], processes=8), planned(LLAMAS["1B"], processes=8, split=True)
    for name in ("policy", "optimizer", "gradients", "reference", "reward"):
        assert ddp.size(name) == alone.size(name) == pytest.approx(8 * split.size(name), rel=1e-6)
    assert split.size("gathered policy") == alone.size("policy") and ddp.size("gathered policy") == 0
    assert ddp.size("buckets") == alone.size("gradients") and split.size("buckets") == alone.size("buckets") == 0
    assert split.size("activations") == alone.size("activations")  # a batch is counted on each process


def test_a_server_samples_in_memory_of_its_own():
    """It is given the weights as they lie there; of adapters, a merged copy."""
    local, served = planned(LLAMAS["1B"]), planned(LLAMAS["1B"], served=True)
    for name in ("key-value cache", "drawing"):
        assert served.size(name) == 0 < local.size(name)
    assert "sampling" not in served.phases and served.phases["backward"] == local.phases["backward"]
    adapter = planned(LLAMAS["1B"], rank=16, served=True)
    assert adapter.size("weights for the server") == adapter.size("policy") and adapter.size("key-value cache") == 0


def test_a_critic_is_counted_where_it_trains():
    model = memory.llama(**LLAMAS["1B"])
    both, head = memory.with_critic(model), 2049
    assert both.parameters - model.parameters == both.trained - model.trained == head
    assert both.weights - model.weights == both.trained_weights - model.trained_weights == 4 * head


def test_an_adapter_needs_no_reference_and_little_state():
    whole, adapter = planned(LLAMAS["7B"]), planned(LLAMAS["7B"], rank=16)
    assert adapter.size("reference") == 0 < whole.size("reference")
    assert adapter.size("optimizer") < whole.size("optimizer") / 50
    assert adapter.checkpoint > whole.size("policy")  # it holds the base too


# ---- the document


def gib(size):
    return f"{size / 2**30:.2f}" if size < 2**30 else f"{size / 2**30:.1f}"


def table():
    lines = [
        "| model | LoRA | policy | reference | reward | optimizer | gradients | activations | cache | peak on 1 | on 8 | on 64 | file |",
        f"|{'---|' * 13}",
    ]
    for name, size in LLAMAS.items():
        for rank in (0, 16):
            alone = planned(size, rank)
            parts = [alone.size(part) for part in ("policy", "reference", "reward", "optimizer", "gradients")]
            parts += [alone.size("activations") + alone.size("logits"), alone.size("key-value cache"), alone.peak]
            parts += [planned(size, rank, processes=processes, split=True).peak for processes in (8, 64)]
            cells = [name, f"r {rank}" if rank else "no", *map(gib, parts), gib(alone.checkpoint)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def test_the_table_of_the_document_is_what_the_formulas_give():
    text = (Path(__file__).parent.parent / "docs/distributed.md").read_text(encoding="utf-8")
    assert table() in text, f"the table should read\n{table()}"
    (experience,) = re.findall(r"the experience of a rollout is ([\d,]+) bytes", text)
    assert int(experience.replace(",", "")) == planned(LLAMAS["1B"]).host
