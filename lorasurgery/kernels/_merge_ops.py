"""Merges as operators of torch, three sums as one float64 [3]; imported by `run` when it is given tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lorasurgery.kernels import dora_merge as with_magnitudes
from lorasurgery.kernels import lora_delta as changes
from lorasurgery.kernels import lora_merge as dense
from lorasurgery.kernels import nf4_decode_merge as out_of_nf4
from lorasurgery.kernels import nf4_encode_merge as into_nf4
from lorasurgery.kernels import nf4_merge as within_nf4
from lorasurgery.kernels import nf4_moments as moments
from lorasurgery.kernels._operator import constant, measured

CHANCE = "SymInt? seed, SymInt offset"
DENSE, PACKED = "(Tensor, Tensor)", "(Tensor, Tensor, Tensor)"


def _change(a: Tensor, b: Tensor) -> Tensor:
    return b.new_empty(b.shape[0], a.shape[1])


lora_delta = constant(changes, "(Tensor a, Tensor b) -> Tensor", _change)


def _sums(like: Tensor) -> Tensor:
    return like.new_empty(3, dtype=torch.float64)


def _merged(w: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype, *_: Any) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    return w.new_empty(w.shape, dtype=dtype), _sums(w)


lora_merge = measured(
    dense, f"(Tensor w, Tensor a, Tensor b, ScalarType dtype, {CHANCE}) -> {DENSE}", _merged
)


def _scaled(
    w: Tensor, a: Tensor, b: Tensor, m: Tensor, dtype: torch.dtype, *_: Any  # noqa: ARG001
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return w.new_empty(w.shape, dtype=dtype), _sums(w)


dora_merge = measured(
    with_magnitudes,
    f"(Tensor w, Tensor a, Tensor b, Tensor m, ScalarType dtype, {CHANCE}) -> {DENSE}",
    _scaled,
)


def _moments(absmax: Tensor) -> Tensor:
    return absmax.new_empty(absmax.shape[0], moments.COUNT, dtype=torch.float64)


def _held(codes: Tensor, absmax: Tensor, *_: Any) -> Tensor:  # noqa: ARG001
    return _moments(absmax)


nf4_moments = constant(
    moments,
    "(Tensor codes, Tensor absmax, int block, Tensor v, Tensor d, Tensor table) -> Tensor",
    _held,
)


def _within(codes: Tensor, absmax: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return codes.new_empty(codes.shape), absmax.new_empty(absmax.shape), _moments(absmax)


nf4_merge = constant(
    within_nf4,
    "(Tensor codes, Tensor absmax, int block, Tensor a, Tensor b, ScalarType dtype, bool keep, "
    f"{CHANCE}) -> {PACKED}",
    _within,
)


def _decoded(
    codes: Tensor, absmax: Tensor, block: int, a: Tensor, b: Tensor, decoded: torch.dtype,  # noqa: ARG001
    dtype: torch.dtype, *_: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return codes.new_empty(b.shape[0], a.shape[1], dtype=dtype), _sums(codes)


nf4_decode_merge = measured(
    out_of_nf4,
    "(Tensor codes, Tensor absmax, int block, Tensor a, Tensor b, ScalarType decoded, "
    f"ScalarType dtype, {CHANCE}) -> {DENSE}",
    _decoded,
)


def _encoded(w: Tensor, block: int, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    n = w.numel()
    codes = w.new_empty(-(-n // 2), dtype=torch.uint8)
    scales = w.new_empty(-(-n // block), dtype=torch.float32)
    return codes, scales, _moments(scales)


nf4_encode_merge = constant(
    into_nf4,
    f"(Tensor w, int block, Tensor a, Tensor b, Tensor? absmax, {CHANCE}, Tensor? base=None) -> {PACKED}",
    _encoded,
)
