"""One NF4 layer in the forms that a GPU's benchmark takes, and what a row of its table is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lorasurgery import plugins

BLOCK, RANK, SCALE = 64, 16, 2.0

# by who is called; the last is the plainest
Sides = dict[str, Callable[[], Tensor]]


@dataclass(frozen=True, slots=True)
class Layer:
    """One weight in all its forms; `state` is bitsandbytes' own."""

    dense: Tensor  # bfloat16 [out, in], what the codes stand for
    codes: Tensor
    absmax: Tensor
    table: Tensor
    state: Any
    a: Tensor  # bfloat16 [r, in]
    b: Tensor  # bfloat16 [out, r]

    @property
    def packed(self) -> tuple[Tensor, Tensor, int, int, Tensor]:
        return self.codes, self.absmax, BLOCK, len(self.dense), self.table

    @property
    def theirs(self) -> Tensor:
        """As bitsandbytes' functions take it."""
        return self.codes.view(-1, 1)

    def drawn(self, *shape: int) -> Tensor:
        """Gaussian bfloat16 on the weight's device."""
        return torch.randn(shape, device=self.dense.device, dtype=torch.bfloat16)


def layer(size: int, device: str) -> Layer:
    """Gaussian weights, quantized by bitsandbytes without a second level."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    torch.manual_seed(0)
    draw = partial(torch.randn, device=device, dtype=torch.bfloat16)
    packed, state = quantize_4bit(0.02 * draw(size, size), blocksize=BLOCK, quant_type="nf4")
    a, b = draw(RANK, size) / size**0.5, 0.02 * draw(size, RANK)
    codes, table = packed.flatten().view(torch.uint8), state.code.float()
    return Layer(dequantize_4bit(packed, state), codes, state.absmax, table, state, a, b)


def kernel(name: str) -> Callable[..., Any]:
    run: Callable[..., Any] = plugins.load("kernels", name).run
    return run
