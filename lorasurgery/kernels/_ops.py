"""The kernels that are trained through, as operators of torch: for autograd and torch.compile.

Imported by `run` of those kernels when it is given tensors; each operator has a form without data, and a
gradient that is an operator itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lorasurgery.errors import UsageError
from lorasurgery.kernels import _nf4_linear_host as host
from lorasurgery.kernels import grouped_lora as grouped
from lorasurgery.kernels import lora_linear as lora
from lorasurgery.kernels import nf4_linear as linear
from lorasurgery.kernels._packed import FEW_CPU, Packed
from lorasurgery.kernels._tensors import dispatch

PACKED = "Tensor codes, Tensor absmax, int block, int rows, Tensor table"
TAIL = "Tensor? bias, Tensor? nested, Tensor? offset"


def _nf4_linear(x: Tensor, *args: Any) -> Tensor:
    if not x.is_cuda and len(x) > FEW_CPU:
        codes, absmax, block, rows, table, bias, nested, offset = args
        return host.forward(x, Packed(codes, absmax, block, rows, table, nested, offset), bias)
    y: Tensor = dispatch(linear.cpu, linear.launch, x, *args)
    return y


nf4_linear = torch.library.custom_op(
    "lorasurgery::nf4_linear", _nf4_linear, mutates_args=(),
    schema=f"(Tensor x, {PACKED}, {TAIL}) -> Tensor",
)  # fmt: skip


def _nf4_linear_backward(g: Tensor, k: int, *packed: Any) -> Tensor:
    return linear.gradient(g, k, Packed(*packed))


nf4_linear_backward = torch.library.custom_op(
    "lorasurgery::nf4_linear_backward", _nf4_linear_backward, mutates_args=(),
    schema=f"(Tensor g, int k, {PACKED}, Tensor? nested, Tensor? offset) -> Tensor",
)  # fmt: skip


@nf4_linear.register_fake
def _(x: Tensor, codes: Tensor, absmax: Tensor, block: int, rows: int, *_: Any) -> Tensor:  # noqa: ARG001
    return x.new_empty(x.shape[0], rows)


@nf4_linear_backward.register_fake
def _(g: Tensor, k: int, *_: Any) -> Tensor:
    return g.new_empty(g.shape[0], k)


def _keep_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    x, codes, absmax, ctx.block, ctx.rows, table, _, nested, offset = inputs
    ctx.k = x.shape[1]
    ctx.save_for_backward(codes, absmax, table, nested, offset)


def _linear_gradients(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    codes, absmax, table, nested, offset = ctx.saved_tensors
    packed = codes, absmax, ctx.block, ctx.rows, table, nested, offset
    gx = nf4_linear_backward(g, ctx.k, *packed) if ctx.needs_input_grad[0] else None
    bias = g.sum(0) if ctx.needs_input_grad[6] else None
    return gx, None, None, None, None, None, bias, None, None


nf4_linear.register_autograd(_linear_gradients, setup_context=_keep_linear)


def _lora_linear(x: Tensor, *args: Any) -> Tensor:
    y: Tensor = dispatch(lora.cpu, lora.launch, x, *args)
    return y


FACTORS = "Tensor a, Tensor b, float scale"
lora_linear = torch.library.custom_op(
    "lorasurgery::lora_linear", _lora_linear, mutates_args=(),
    schema=f"(Tensor x, {PACKED}, {FACTORS}, {TAIL}) -> Tensor",
)  # fmt: skip


def _lora_linear_backward(
    g: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float, *packed: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return lora.gradients(g, x, Packed(*packed), a, b, scale)


lora_linear_backward = torch.library.custom_op(
    "lorasurgery::lora_linear_backward", _lora_linear_backward, mutates_args=(),
    schema=f"(Tensor g, Tensor x, {FACTORS}, {PACKED}, Tensor? nested, Tensor? offset) "
    "-> (Tensor, Tensor, Tensor)",
)  # fmt: skip


@lora_linear.register_fake
def _(x: Tensor, codes: Tensor, absmax: Tensor, block: int, rows: int, *_: Any) -> Tensor:  # noqa: ARG001
    return x.new_empty(x.shape[0], rows)


@lora_linear_backward.register_fake
def _(g: Tensor, x: Tensor, a: Tensor, b: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ARG001
    return x.new_empty(x.shape), a.new_empty(a.shape), b.new_empty(b.shape)


def _keep_lora(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    x, codes, absmax, ctx.block, ctx.rows, table, a, b, ctx.scale, _, nested, offset = inputs
    ctx.save_for_backward(x, codes, absmax, table, a, b, nested, offset)


def _lora_gradients(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    x, codes, absmax, table, a, b, nested, offset = ctx.saved_tensors
    packed = codes, absmax, ctx.block, ctx.rows, table, nested, offset
    gx, ga, gb = lora_linear_backward(g, x, a, b, ctx.scale, *packed)
    bias = g.sum(0) if ctx.needs_input_grad[9] else None
    return gx, None, None, None, None, None, ga, gb, None, bias, None, None


lora_linear.register_autograd(_lora_gradients, setup_context=_keep_lora)


def _grouped_lora(x: Tensor, *args: Any) -> Tensor:
    y: Tensor = dispatch(grouped.cpu, grouped.launch, x, *args)
    return y


grouped_lora = torch.library.custom_op(
    "lorasurgery::grouped_lora", _grouped_lora, mutates_args=(),
    schema="(Tensor x, Tensor adapter, Tensor pool, Tensor starts, Tensor scales, Tensor a_pages, "
    "Tensor b_pages, int rank, int out, Tensor? base) -> Tensor",
)  # fmt: skip


@grouped_lora.register_fake
def _(x: Tensor, *args: Any) -> Tensor:
    return x.new_empty(x.shape[0], args[7])


def _keep_grouped(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    x, *index, ctx.rank, _, _ = inputs
    ctx.k = x.shape[1]
    if ctx.needs_input_grad[2]:
        raise UsageError(
            "grouped_lora: the pool asks for a gradient, but only x and base have one. "
            "Detach it, and train an adapter by lora_linear."
        )
    ctx.save_for_backward(*index)


def _grouped_gradients(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    # the same sums with the factors' parts exchanged: u = s · g B, and then u A
    adapter, pool, starts, scales, a_pages, b_pages = ctx.saved_tensors
    gx = None
    if ctx.needs_input_grad[0]:
        pages = adapter, pool, starts, scales, b_pages, a_pages
        gx = grouped_lora(g, *pages, ctx.rank, ctx.k, None)
    base = g.clone() if ctx.needs_input_grad[9] else None
    return gx, *(None,) * 8, base


grouped_lora.register_autograd(_grouped_gradients, setup_context=_keep_grouped)
