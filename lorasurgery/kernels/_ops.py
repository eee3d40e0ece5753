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


def _lora_linear(
    x: Tensor, codes: Tensor, absmax: Tensor, block: int, rows: int, table: Tensor, a: Tensor,
    b: Tensor, scale: float, *tail: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    bias, nested, offset = tail
    w, b_ = Packed(codes, absmax, block, rows, table, nested, offset), b.to(x.dtype)
    h = lora.scaled(scale, x, a.to(x.dtype).T)
    if x.is_cuda:
        from lorasurgery.kernels._nf4_linear_launch import forward

        return forward(x, w, bias, (h, b_.contiguous())), h
    if len(x) > FEW_CPU:
        return host.forward(x, w, bias).addmm_(h, b_.T), h
    few = x, codes, absmax, block, rows, table, a, b, scale, *tail
    return dispatch(lora.cpu, lora.launch, *few), h


FACTORS = "Tensor a, Tensor b, float scale"
# and h, for the gradients
lora_linear = torch.library.custom_op(
    "lorasurgery::lora_linear", _lora_linear, mutates_args=(),
    schema=f"(Tensor x, {PACKED}, {FACTORS}, {TAIL}) -> (Tensor, Tensor)",
)  # fmt: skip


def _lora_linear_backward(
    g: Tensor, x: Tensor | None, h: Tensor, a: Tensor, b: Tensor, scale: float, wanted: list[bool],
    *packed: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return lora.gradients(g, (x, h), Packed(*packed), a, b, scale, wanted)


lora_linear_backward = torch.library.custom_op(
    "lorasurgery::lora_linear_backward", _lora_linear_backward, mutates_args=(),
    schema=f"(Tensor g, Tensor? x, Tensor h, {FACTORS}, bool[] wanted, {PACKED}, Tensor? nested, "
    "Tensor? offset) -> (Tensor, Tensor, Tensor)",
)  # fmt: skip


@lora_linear.register_fake
def _(
    x: Tensor, codes: Tensor, absmax: Tensor, block: int, rows: int, table: Tensor, a: Tensor, *_: Any  # noqa: ARG001
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return x.new_empty(x.shape[0], rows), x.new_empty(x.shape[0], a.shape[0])


@lora_linear_backward.register_fake
def _(
    g: Tensor, x: Tensor | None, h: Tensor, a: Tensor, b: Tensor, scale: float, wanted: list[bool], *_: Any  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        g.new_empty(g.shape[0], a.shape[1]) if wanted[0] else g.new_empty(0),
        g.new_empty(0) if x is None or not wanted[1] else a.new_empty(a.shape),
        b.new_empty(b.shape[::-1]).T if wanted[2] else g.new_empty(0),
    )


def _keep_lora(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, codes, absmax, ctx.block, ctx.rows, table, a, b, ctx.scale, _, nested, offset = inputs
    ctx.set_materialize_grads(False)
    if not ctx.needs_input_grad[0]:
        codes, absmax = codes.new_empty(0), absmax.new_empty(0)
    x = x if ctx.needs_input_grad[_A] else None
    ctx.save_for_backward(x, output[1], codes, absmax, table, a, b, nested, offset)


def _lora_gradients(ctx: Any, g: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    x, h, codes, absmax, table, a, b, nested, offset = ctx.saved_tensors
    packed = codes, absmax, ctx.block, ctx.rows, table, nested, offset
    wanted = [ctx.needs_input_grad[place] for place in (0, _A, _A + 1)]
    found = lora_linear_backward(g, x, h, a, b, ctx.scale, wanted, *packed)
    gx, ga, gb = (
        each if is_wanted else None for each, is_wanted in zip(found, wanted, strict=True)
    )
    bias = g.sum(0) if ctx.needs_input_grad[9] else None
    return gx, None, None, None, None, None, ga, gb, None, bias, None, None


_A = 6  # where A stands among what the operator takes
lora_linear.register_autograd(_lora_gradients, setup_context=_keep_lora)


def lora_linear_alone(*args: Any) -> Tensor:
    """Y without h."""
    y: Tensor = lora_linear(*args)[0]
    return y


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
