"""DoRA's norm and output as operators of torch; imported by `run` when it is given tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lorasurgery.kernels import dora_norm as norms
from lorasurgery.kernels import dora_output as outputs
from lorasurgery.kernels._tensors import dispatch


def _dora_norm(w: Tensor, a: Tensor, b: Tensor, axis: int) -> Tensor:
    norm: Tensor = dispatch(norms.cpu, norms.launch, w, a, b, axis)
    return norm


dora_norm = torch.library.custom_op(
    "lorasurgery::dora_norm", _dora_norm, mutates_args=(),
    schema="(Tensor w, Tensor a, Tensor b, int axis) -> Tensor",
)  # fmt: skip


def _dora_norm_backward(
    g: Tensor, w: Tensor, a: Tensor, b: Tensor, norm: Tensor, axis: int
) -> tuple[Tensor, Tensor]:
    return norms.gradients(g, w, a, b, norm, axis)


dora_norm_backward = torch.library.custom_op(
    "lorasurgery::dora_norm_backward", _dora_norm_backward, mutates_args=(),
    schema="(Tensor g, Tensor w, Tensor a, Tensor b, Tensor norm, int axis) -> (Tensor, Tensor)",
)  # fmt: skip


@dora_norm.register_fake
def _(w: Tensor, a: Tensor, b: Tensor, axis: int) -> Tensor:  # noqa: ARG001
    return a.new_empty(w.shape[1 - axis])


@dora_norm_backward.register_fake
def _(g: Tensor, w: Tensor, a: Tensor, b: Tensor, *_: Any) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    return torch.empty_like(a), torch.empty_like(b)


def _keep_norm(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    w, a, b, ctx.axis = inputs
    ctx.save_for_backward(w, a, b, output)


def _norm_gradients(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    ga, gb = dora_norm_backward(g, *ctx.saved_tensors, ctx.axis)
    return None, ga, gb, None


dora_norm.register_autograd(_norm_gradients, setup_context=_keep_norm)


def _dora_output(base: Tensor, lora: Tensor | None, magnitude: Tensor, norm: Tensor) -> Tensor:
    y: Tensor = dispatch(outputs.cpu, outputs.launch, base, lora, magnitude, norm)
    return y


dora_output = torch.library.custom_op(
    "lorasurgery::dora_output", _dora_output, mutates_args=(),
    schema="(Tensor base, Tensor? lora, Tensor magnitude, Tensor norm) -> Tensor",
)  # fmt: skip


def _dora_output_backward(g: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return outputs.gradients(g, *args)


dora_output_backward = torch.library.custom_op(
    "lorasurgery::dora_output_backward", _dora_output_backward, mutates_args=(),
    schema="(Tensor g, Tensor base, Tensor? lora, Tensor magnitude, Tensor norm) "
    "-> (Tensor, Tensor, Tensor)",
)  # fmt: skip


@dora_output.register_fake
def _(base: Tensor, *_: Any) -> Tensor:
    return base.new_empty(base.shape)


@dora_output_backward.register_fake
def _(g: Tensor, base: Tensor, lora: Any, magnitude: Tensor, norm: Tensor) -> tuple[Tensor, ...]:  # noqa: ARG001
    return base.new_empty(base.shape), magnitude.new_empty(magnitude.shape), norm.new_empty(norm.shape)  # fmt: skip


def _keep_output(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs)


def _output_gradients(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    gy, gm, gn = dora_output_backward(g, *ctx.saved_tensors)
    lora = gy.clone() if ctx.needs_input_grad[1] else None
    return (
        gy,
        lora,
        gm if ctx.needs_input_grad[2] else None,
        gn if ctx.needs_input_grad[3] else None,
    )


dora_output.register_autograd(_output_gradients, setup_context=_keep_output)
