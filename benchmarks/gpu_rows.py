"""The rows of the GPU's table: each side of a comparison as a function of no arguments.

The first side is ours, the last the plainest: all are held to it. bitsandbytes is called as its modules call it;
"unsloth-like" is unsloth's way in torch and bitsandbytes' kernels, since it cannot be imported without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import gpu_weight_rows as weights
from benchmarks.gpu_layer import RANK, SCALE, Layer, Sides, kernel
from lorasurgery import plugins

PAGE = 1024
ROWS = (1, 16, 512, 8192)
ADAPTERS = 64


def linear(w: Layer, m: int) -> Sides:
    from bitsandbytes.autograd._functions import matmul_4bit

    run, x = kernel("nf4_linear"), w.drawn(m, len(w.dense))
    return {
        "lorasurgery": lambda: run(x, *w.packed),
        "bitsandbytes": lambda: matmul_4bit(x, w.theirs.t(), w.state),
        "dense torch": lambda: x @ w.dense.T,
    }


def lora_linear(w: Layer, m: int) -> Sides:
    """Unsloth's `matmul_lora`: W is dequantized into a buffer, y = x Wᵀ, y.addmm_(x Aᵀ, s Bᵀ)."""
    from bitsandbytes.functional import dequantize_4bit

    run, x = kernel("lora_linear"), w.drawn(m, len(w.dense))

    def unsloth_like() -> Tensor:
        y = x @ dequantize_4bit(w.theirs, w.state).T
        return y.addmm_(x @ w.a.T, w.b.T, alpha=SCALE)

    return {
        "lorasurgery": lambda: run(x, *w.packed, w.a, w.b, SCALE),
        "unsloth-like torch": unsloth_like,
        "dense torch": lambda: (x @ w.dense.T).addmm_(x @ w.a.T, w.b.T, alpha=SCALE),
    }


def lora_backward(w: Layer, m: int) -> Sides:
    """The gradient for x, and those of the factors beside it; what is compared is the first."""
    from bitsandbytes.functional import dequantize_4bit

    from lorasurgery.kernels._packed import Packed

    gradients = plugins.load("kernels", "lora_linear").gradients
    x, g = w.drawn(m, len(w.dense)), w.drawn(m, len(w.dense))
    packed, h = Packed(*w.packed, None, None), SCALE * (x @ w.a.T)
    factors = w.a, w.b, SCALE, (True, True, True)

    def by_hand(dense: Callable[[], Tensor]) -> Tensor:
        u = SCALE * (g @ w.b)
        _factors = u.T @ x, g.T @ h
        return (g @ dense()).addmm_(u, w.a)

    return {
        "lorasurgery": lambda: gradients(g, (x, h), packed, *factors)[0],
        "unsloth-like torch": lambda: by_hand(lambda: dequantize_4bit(w.theirs, w.state)),
        "dense torch": lambda: by_hand(lambda: w.dense),
    }


def dora_norm(w: Layer, axis: int) -> Sides:
    run, a, b = kernel("dora_norm"), w.a.float(), SCALE * w.b.float()
    return {
        "lorasurgery": lambda: run(w.dense, a, b, axis),
        "dense torch": lambda: (w.dense.float() + b @ a).norm(dim=axis),
    }


def dora_output(w: Layer) -> Sides:
    run, (base, lora) = kernel("dora_output"), w.drawn(2, *w.dense.shape)
    m, norm = w.drawn(2, len(w.dense)).float().abs() + 1
    return {
        "lorasurgery": lambda: run(base, lora, m, norm),
        "dense torch": lambda: ((base.float() + lora.float()) * (m / norm)).to(torch.bfloat16),
    }


def grouped(w: Layer, m: int) -> Sides:
    """Rows of as many adapters as there are; torch goes through the adapters one by one."""
    run, size = kernel("grouped_lora"), len(w.dense)
    scatter = plugins.load("kernels", "grouped_lora").scatter
    drawn = scatter((RANK,) * ADAPTERS, (size, size, PAGE), torch.bfloat16, torch.Generator())
    pages = [t.to(w.dense.device) if isinstance(t, Tensor) else t for t in drawn]
    adapter = torch.arange(m, device=w.dense.device, dtype=torch.int32) % ADAPTERS
    x, base = w.drawn(m, size), w.drawn(m, size)
    pool, starts, scales, a_pages, b_pages, *_ = pages
    rows = [(adapter == i).nonzero()[:, 0] for i in range(min(m, ADAPTERS))]
    spans = [slice(int(starts[i]), int(starts[i + 1])) for i in range(len(rows))]
    a, b = ([pool[p[s].long()].flatten(1)[:, :size] for s in spans] for p in (a_pages, b_pages))

    def by_adapter() -> Tensor:
        y = base.float()
        for i, at in enumerate(rows):
            h = (scales[i] * (x[at] @ a[i].T).float()).bfloat16()
            y.index_add_(0, at, (h @ b[i]).float())
        return y.bfloat16()

    return {"lorasurgery": lambda: run(x, adapter, *pages, base), "torch by adapter": by_adapter}


def adamw(w: Layer) -> Sides:
    """A step on flat factors, with LoRA+'s two rates, beside torch's fused one with two groups."""
    from lorasurgery.kernels.lora_adamw import Rates, update

    n, half = w.dense.numel() // 4, w.dense.numel() // 8
    start, grad = (w.drawn(n).float() for _ in range(2))
    rates = Rates(1e-3)
    ours, m, v = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    parts = [start[:half].clone().requires_grad_(), start[half:].clone().requires_grad_()]
    for part, of in zip(parts, (grad[:half], grad[half:]), strict=True):
        part.grad = of.clone()
    groups: list[dict[str, Any]] = [
        {"params": [parts[0]]},
        {"params": [parts[1]], "lr": rates.lr * rates.ratio},
    ]
    optimizer = torch.optim.AdamW(groups, lr=rates.lr, fused=True)
    steps = iter(range(1, 1 << 30))

    def step() -> Tensor:
        update(ours, grad, m, v, half, next(steps), rates)
        return ours

    def theirs() -> Tensor:
        optimizer.step()
        return parts[0]

    # both have made one step when they are compared: the part that is A's
    return {"lorasurgery": lambda: step()[:half], "torch, fused": theirs}


def importance(w: Layer) -> Sides:
    """AdaLoRA's scores of triplets, for as many elements as the layer has."""
    kernel_, (x, g, smooth, wide) = kernel("adalora_importance"), w.drawn(4, *w.dense.shape).float()

    def plain() -> Tensor:
        now = (x * g).abs()
        fresh = 0.85 * smooth + 0.15 * now
        spread = 0.85 * wide + 0.15 * (now - fresh).abs()
        scores: Tensor = (fresh * spread).mean(dim=1)
        return scores

    return {"lorasurgery": lambda: kernel_(x, g, smooth, wide, 1)[2], "dense torch": plain}


def benches(size: int, rows: tuple[int, ...] = ROWS) -> dict[str, Callable[[Layer], Sides]]:
    """By the title of the row; rows are those of x."""
    rank = f"LoRA of rank {RANK}"
    return {
        f"NF4 quantize {size} x {size} bf16": weights.quantize,
        f"NF4 + double quantization {size} x {size} bf16": weights.quantize_double,
        f"NF4 dequantize {size} x {size} to bf16": weights.dequantize,
        **{f"NF4 linear, {m} rows": partial(linear, m=m) for m in rows},
        **{f"NF4 linear + {rank}, {m} rows": partial(lora_linear, m=m) for m in rows},
        **{f"its gradients, {m} rows": partial(lora_backward, m=m) for m in rows[2:]},
        f"merge {rank} into bf16": weights.merge,
        f"merge {rank} into NF4": weights.merge_nf4,
        f"merge {rank} from NF4 into bf16": weights.merge_out,
        f"merge {rank} from bf16 into NF4": weights.merge_in,
        f"DoRA norms of rows, rank {RANK}": partial(dora_norm, axis=1),
        f"DoRA norms of columns, rank {RANK}": partial(dora_norm, axis=0),
        "DoRA output": dora_output,
        **{f"{ADAPTERS} adapters, {m} rows": partial(grouped, m=m) for m in (ADAPTERS, rows[2])},
        "AdamW of factors": adamw,
        "AdaLoRA's importance": importance,
    }
