"""What a CPU is slow at in half precision, by the units it has."""

from __future__ import annotations

from functools import cache

import torch


@cache
def half_attention_is_slow() -> bool:
    """Whether it is an x86 processor without units for matrices (AMX): attention then multiplies half precision number by number.

    Attention of one token takes 2 to 5 times as long there as in float32 (with 8 rows or more), the copies that this needs included.
    """
    return torch.backends.cpu.get_cpu_capability().startswith("AVX") and not torch.cpu._is_amx_tile_supported()


def bfloat16_is_emulated() -> bool:
    """Whether torch multiplies all matrices in bfloat16 number by number: on x86 for want of AVX-512.

    A product then takes 4 to 40 times as long as in float32 (512 tokens, weights of 576 by 576, one thread of a Zen 3 EPYC).
    """
    try:
        return not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    except (AttributeError, RuntimeError):  # a build without oneDNN
        return True
