"""The cache with room holds what transformers' own holds, through every operation that sampling makes."""

import torch
from transformers import DynamicCache

from p3o_lightning.generation import Sampling, sample_completions
from p3o_lightning.kv_cache import RoomyLayer, roomy_cache
from tests.families import EOS, PAD, causal, config, left_padded


def test_it_holds_what_transformers_own_holds():
    made = config("llama")
    ours, theirs = roomy_cache(made, 9), DynamicCache(config=made)
    generator = torch.Generator().manual_seed(0)

    def both(rows, columns):
        for layer in range(2):
            keys, values = (torch.randn(rows, 2, columns, 8, generator=generator) for _ in range(2))
            for one, other in zip(ours.update(keys, values, layer), theirs.update(keys, values, layer), strict=True):
                assert torch.equal(one, other)
        assert ours.get_seq_length() == theirs.get_seq_length()

    both(2, 4)
    for cache in (ours, theirs):
        cache.batch_repeat_interleave(3)
    both(6, 1)
    for kept in ([0, 2, 3, 5], [1, 2, 3], [0, 2]):
        for cache in (ours, theirs):
            cache.batch_select_indices(torch.tensor(kept))
        both(len(kept), 1)
    assert isinstance(ours.layers[0], RoomyLayer) and type(theirs.layers[0]) is not RoomyLayer


def test_a_step_copies_nothing():
    """The first column stays where it was in memory."""
    cache = roomy_cache(config("llama"), 8)
    where = set()
    for _ in range(8):
        keys, _ = cache.update(torch.zeros(2, 2, 1, 8), torch.zeros(2, 2, 1, 8), 0)
        where.add(keys.data_ptr())
    assert len(where) == 1


def test_layers_with_a_window_keep_their_own_and_recurrent_ones_have_none():
    assert not any(isinstance(layer, RoomyLayer) for layer in roomy_cache(config("mistral"), 8).layers)
    assert roomy_cache(config("jamba"), 8) is None


def test_the_longest_response_fills_it_to_the_last_column():
    model = causal("llama")
    _, tokens, mask = left_padded([3, 5])
    drawn, kept = sample_completions(model, tokens, mask, Sampling(2, 7), eos_token_id=99, pad_token_id=PAD, seed=0)
    assert drawn.shape == (2, 2, 7) and kept.all() and EOS != 99
