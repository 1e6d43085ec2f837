"""Weights laid out beforehand give the products of the weights themselves: checked against sums in float64, and in bfloat16 to the bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from p3o_lightning import prepacked as module
from p3o_lightning.prepacked import LARGE, prepacked

SAME_UNITS = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
SMALL, WIDE, DEEP = (33, 17), (LARGE // 64 + 1, 64), (192, 1536)  # out, in


def weight_of(shape, dtype):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [SMALL, WIDE, DEEP, (1, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@torch.no_grad()
def test_products_are_those_of_the_weight(dtype, shape, bias):
    """For any number of rows, in any number of axes, contiguous or not; and for a weight that lies the other way round."""
    weight = weight_of(shape, dtype)
    added = weight_of(shape[:1], dtype) if bias else None
    for given in (weight, weight.t().contiguous().t()):
        product = prepacked(given, added)
        for lead in ((1,), (7,), (8, 1), (2, 3, 5)):
            rows = weight_of((*lead, 2 * shape[1]), dtype)[..., ::2]
            found = product(rows)
            before = rows.double() @ weight.double().t()
            exact = before + (added.double() if bias else 0)
            assert found.shape == exact.shape and found.dtype == dtype
            # Where rows are not contiguous, or the CPU has no units for bfloat16, torch rounds before it adds the bias.
            rounding = (1e-2 if dtype == torch.bfloat16 else 1e-5) * (before.abs() + exact.abs())
            assert torch.all((found - exact).abs() <= rounding + 1e-4)
            if dtype == torch.bfloat16 and SAME_UNITS:
                rows = rows.contiguous()
                assert torch.equal(product(rows), nn.functional.linear(rows, weight, added))


@pytest.mark.parametrize(("dtype", "shape"), [(torch.float32, WIDE), (torch.bfloat16, SMALL)])
@torch.no_grad()
def test_without_onednn_products_are_the_same(monkeypatch, dtype, shape):
    weight, rows = weight_of(shape, dtype), weight_of((3, shape[1]), dtype)
    expected = prepacked(weight, None)(rows)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(module, "_in_blocks", None)  # would fail
    torch.testing.assert_close(prepacked(weight, None)(rows), expected)
