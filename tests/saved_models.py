"""Models of a few thousand weights as they lie on disk: folders, and checkpoints as Lightning writes them; and how a refusal reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from p3o_lightning.errors import InputError
from p3o_lightning.models import load_policy, load_reward_backbone
from p3o_lightning.tokenizers import byte_tokenizer

TINY = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
BYTES = byte_tokenizer()
IDS = torch.arange(10, 22).view(2, 6)


def one_line(caught) -> str:
    text = str(caught.value)
    assert "\n" not in text and len(text) < 700, text
    return text


def refuses(call, *words: str) -> None:
    with pytest.raises(InputError) as caught:
        call()
    text = one_line(caught)
    assert all(word in text for word in words), text


def saved(folder: Path, model, tokenizer=BYTES) -> Path:
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def policy_folder(tmp_path_factory):
    torch.manual_seed(0)
    return saved(tmp_path_factory.mktemp("policy"), load_policy(TINY, BYTES))


@pytest.fixture(scope="module")
def reward_folder(tmp_path_factory):
    torch.manual_seed(1)
    return saved(tmp_path_factory.mktemp("reward"), load_reward_backbone(TINY, BYTES))


def checkpoint(stage, path: Path) -> Path:
    """What Lightning would write, as far as loading reads it."""
    content = {"state_dict": stage.state_dict(), "hyper_parameters": dict(stage.hparams)}
    stage.on_save_checkpoint(content)
    torch.save(content, path)
    return path


def disturb(stage):
    """As if trained: adapters start at zero, which would hide that they are not loaded."""
    generator = torch.Generator().manual_seed(3)
    for parameter in stage.model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return stage
