"""A frozen linear layer whose weight is NF4, and stays so: y = x · dequant(W)ᵀ + bias.

Dettmers et al. 2023 (QLoRA), arXiv 2305.14314, §3, eq. 5. What backward keeps of W are its codes and scales.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorasurgery.kernels import double_dequantize, lora_linear, nf4_dequantize, nf4_linear
from lorasurgery.kernels._packed import Packed


class NF4Linear(nn.Module):
    """As the kernels hold a weight [out, in]: codes, scales, their scales if they are quantized too, the table.

    Its buffers are no part of a state_dict: they are the base's, which is never saved.
    """

    weight: Tensor  # the codes: some models ask a layer for its weight's dtype
    absmax: Tensor
    table: Tensor
    nested: Tensor | None
    offset: Tensor | None

    def __init__(self, in_features: int, out_features: int, bias: nn.Parameter | None) -> None:
        """Without a weight yet: `hold` gives it."""
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_parameter("bias", bias)
        self.block = 0

    def hold(self, packed: Packed) -> None:
        """Take a weight of these sides; tensors are kept, not copied."""
        assert packed.rows == self.out_features
        self.block = packed.block
        parts = {
            "weight": packed.codes, "absmax": packed.absmax, "table": packed.table,
            "nested": packed.nested, "offset": packed.offset,
        }  # fmt: skip
        for name, tensor in parts.items():
            self.register_buffer(name, tensor, persistent=False)

    def as_parameters(self) -> None:
        """Codes and scales as what FSDP2 deals out; the table and the offset are too small to be."""
        for name in ("weight", "absmax", "nested"):
            held = self._buffers[name]
            if held is not None:
                delattr(self, name)
                self.register_parameter(name, nn.Parameter(held, requires_grad=False))

    @property
    def parts(self) -> list[Tensor]:
        """All tensors that the weight is made of."""
        every = (self.weight, self.absmax, self.table, self.nested, self.offset)
        return [part for part in every if part is not None]

    @property
    def packed_bytes(self) -> int:
        """What the weight takes, in all processes together."""
        return sum(part.numel() * part.element_size() for part in self.parts)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out] in x's dtype, or in autocast's."""
        return self._by(nf4_linear.run, x)

    def with_product(self, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        """The same, and s · (x Aᵀ) Bᵀ, of A [r, in] and B [out, r]."""
        return self._by(lora_linear.run, x, a, b, scale)

    def _by(self, kernel: Callable[..., Tensor], x: Tensor, *more: Any) -> Tensor:
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        own = cast("Tensor | None", self.bias)
        bias = None if own is None else own.to(x.dtype)
        y = kernel(
            x.reshape(-1, self.in_features), self.weight, self.absmax, self.block,
            self.out_features, self.table, *more, bias, self.nested, self.offset,
        )  # fmt: skip
        return y.reshape(*x.shape[:-1], self.out_features)

    def dense(self) -> Tensor:
        """W [out, in] in float32, made anew at each call."""
        scales = _whole(self.absmax)
        if self.nested is not None:
            scales = double_dequantize.run(scales, _whole(self.nested), self.offset)
        n, kind = self.out_features * self.in_features, cast(Any, torch.float32)
        flat = nf4_dequantize.run(_whole(self.weight), scales, self.block, n, kind, self.table)
        return flat.view(self.out_features, self.in_features)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, block={self.block}"
        )


def _whole(part: Tensor) -> Tensor:
    """Of a piece of it: every process asks for the whole at once."""
    return cast(Any, part).full_tensor() if hasattr(part, "full_tensor") else part
