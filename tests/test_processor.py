"""What is slow on which CPU, and that a run in bfloat16 says so."""

import warnings

import pytest
import torch

from p3o_lightning import PreferenceDataModule, stage
from p3o_lightning.processor import bfloat16_is_emulated, half_attention_is_slow
from tests.tiny import policy, preferences, trainer


def test_which_processors_attend_slowly_in_half_precision(monkeypatch):
    def slow(capability, units):
        half_attention_is_slow.cache_clear()
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: units)
        return half_attention_is_slow()

    assert slow("AVX512", False) and slow("AVX2", False)
    assert not slow("AVX512", True) and not slow("SVE256", False) and not slow("DEFAULT", False)
    half_attention_is_slow.cache_clear()


@pytest.mark.skipif(not torch.backends.cpu.get_cpu_capability().startswith("AVX"), reason="the flags below are those of x86")
def test_bfloat16_needs_avx512():
    assert bfloat16_is_emulated() == (torch.backends.cpu.get_cpu_capability() != "AVX512")


@pytest.mark.parametrize(
    ("emulated", "precision", "dtype", "told"),
    [
        (True, "bf16-mixed", "float32", "trainer.precision is bf16-mixed, weights are torch.float32"),
        (True, "bf16-true", "float32", "trainer.precision is bf16-true, weights are torch.bfloat16"),
        (True, "32-true", "bfloat16", "trainer.precision is 32-true, weights are torch.bfloat16"),
        (True, "32-true", "float32", None),
        (False, "bf16-mixed", "float32", None),
    ],
)
def test_a_run_says_that_bfloat16_is_slow_here(emulated, precision, dtype, told, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "bfloat16_is_emulated", lambda: emulated)
    data = PreferenceDataModule(str(preferences(tmp_path, 24)), batch_size=4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(tmp_path, max_steps=1, precision=precision).fit(policy(dtype=dtype), data)
    found = [str(warning.message) for warning in caught if "no units for bfloat16" in str(warning.message)]
    assert len(found) == (told is not None)
    if told is not None:
        assert found[0].startswith(told) and "Set trainer.precision to 32-true and model.dtype to float32." in found[0]
