"""AdaLoRA's importance and budget, and AdamW's step, as operators of torch; imported when tensors come."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lorasurgery.kernels import adalora_budget as budgets
from lorasurgery.kernels import adalora_importance as scores
from lorasurgery.kernels import lora_adamw as steps
from lorasurgery.kernels._operator import constant
from lorasurgery.kernels._tensors import dispatch
from lorasurgery.kernels.lora_adamw import Rates


def _smoothed(
    w: Tensor, grad: Tensor, sensitivity: Tensor, uncertainty: Tensor, axis: int, *_: Any  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return w.new_empty(w.shape), w.new_empty(w.shape), w.new_empty(w.shape[1 - axis])


adalora_importance = constant(
    scores,
    "(Tensor w, Tensor grad, Tensor sensitivity, Tensor uncertainty, int axis, float beta1, "
    "float beta2) -> (Tensor, Tensor, Tensor)",
    _smoothed,
)


def _masked(e: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return e.new_empty(e.shape), e.new_empty(e.shape, dtype=torch.bool)


adalora_budget = constant(
    budgets,
    "(Tensor e, Tensor of_e, Tensor of_a, Tensor of_b, SymInt budget) -> (Tensor, Tensor)",
    _masked,
)

# six rates, in the order of `Rates`
STEP = "SymInt split, SymInt step, float[] rates"


def _lora_adamw(w: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *given, rates = args
    new: tuple[Tensor, Tensor, Tensor] = dispatch(steps.cpu, steps.launch, w, *given, Rates(*rates))
    return new


lora_adamw = torch.library.custom_op(
    "lorasurgery::lora_adamw", _lora_adamw, mutates_args=(),
    schema=f"(Tensor w, Tensor grad, Tensor m, Tensor v, {STEP}) -> (Tensor, Tensor, Tensor)",
)  # fmt: skip


@lora_adamw.register_fake
def _(w: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return w.new_empty(w.shape), w.new_empty(w.shape), w.new_empty(w.shape)


def _lora_adamw_update(w: Tensor, *args: Any) -> None:
    *given, rates = args
    dispatch(steps.cpu_inplace, steps.launch_inplace, w, *given, Rates(*rates))


lora_adamw_update = torch.library.custom_op(
    "lorasurgery::lora_adamw_update", _lora_adamw_update, mutates_args=("w", "m", "v"),
    schema=f"(Tensor(a!) w, Tensor grad, Tensor(b!) m, Tensor(c!) v, {STEP}) -> ()",
)  # fmt: skip


@lora_adamw_update.register_fake
def _(*_: Any) -> None: ...


def stepped(w: Tensor, grad: Tensor, m: Tensor, v: Tensor, *more: Any) -> Any:
    """The operator, as `run` is called."""
    split, step, rates = more
    return lora_adamw(w.detach(), grad.detach(), m.detach(), v.detach(), split, step, rates.listed)


def step_in_place(w: Tensor, grad: Tensor, m: Tensor, v: Tensor, *more: Any) -> None:
    """The operator that changes w, m and v, as `update` is called."""
    split, step, rates = more
    lora_adamw_update(w.detach(), grad, m.detach(), v.detach(), split, step, rates.listed)
