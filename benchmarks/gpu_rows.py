"""The rows of the GPU's table: each side of a comparison as a function of no arguments.

The first side is ours, the last the plainest: all are held to it. bitsandbytes is called as its modules call it;
"unsloth-like" is unsloth's way in torch and bitsandbytes' kernels, since it cannot be imported without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lorasurgery import plugins

BLOCK, RANK, SCALE, PAGE = 64, 16, 2.0, 1024
ROWS = (1, 16, 512, 8192)
ADAPTERS = 64

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


def quantize(w: Layer) -> Sides:
    from bitsandbytes.functional import quantize_4bit

    run = kernel("nf4_quantize")

    def bitsandbytes() -> Tensor:
        codes: Tensor = quantize_4bit(w.dense, blocksize=BLOCK, quant_type="nf4")[0]
        return codes.flatten().view(torch.uint8)

    return {"lorasurgery": lambda: run(w.dense.view(-1), BLOCK)[0], "bitsandbytes": bitsandbytes}


def quantize_double(w: Layer) -> Sides:
    """With the scales' own quantization; what is compared is the codes of weights."""
    from bitsandbytes.functional import quantize_4bit

    first, second = kernel("nf4_quantize"), kernel("double_quantize")

    def ours() -> Tensor:
        codes, absmax = first(w.dense.view(-1), BLOCK)
        second(absmax)
        found: Tensor = codes
        return found

    def bitsandbytes() -> Tensor:
        codes: Tensor = quantize_4bit(
            w.dense, blocksize=BLOCK, quant_type="nf4", compress_statistics=True
        )[0]
        return codes.flatten().view(torch.uint8)

    return {"lorasurgery": ours, "bitsandbytes": bitsandbytes}


def dequantize(w: Layer) -> Sides:
    from bitsandbytes.functional import dequantize_4bit

    run, n = kernel("nf4_dequantize"), w.dense.numel()
    ours = partial(run, w.codes, w.absmax, BLOCK, n, torch.bfloat16, w.table)
    return {
        "lorasurgery": lambda: ours().view(w.dense.shape),
        "bitsandbytes": lambda: dequantize_4bit(w.theirs, w.state),
        "copying the result": w.dense.clone,
    }


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
    packed = Packed(*w.packed, None, None)

    def by_hand(dense: Callable[[], Tensor]) -> Tensor:
        u = SCALE * (g @ w.b)
        _factors = u.T @ x, g.T @ (SCALE * (x @ w.a.T))
        return (g @ dense()).addmm_(u, w.a)

    return {
        "lorasurgery": lambda: gradients(g, x, packed, w.a, w.b, SCALE)[0],
        "unsloth-like torch": lambda: by_hand(lambda: dequantize_4bit(w.theirs, w.state)),
        "dense torch": lambda: by_hand(lambda: w.dense),
    }


def merge(w: Layer) -> Sides:
    run, a, b = kernel("lora_merge"), w.a.float(), SCALE * w.b.float()
    return {
        "lorasurgery": lambda: run(w.dense, a, b, torch.bfloat16)[0],
        "dense torch": lambda: (w.dense.float() + b @ a).to(torch.bfloat16),
    }


def merge_nf4(w: Layer) -> Sides:
    """Into NF4 again, scales anew."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    run, a, b = kernel("nf4_merge"), w.a.float(), SCALE * w.b.float()

    def bitsandbytes() -> Tensor:
        merged = dequantize_4bit(w.theirs, w.state).float() + b @ a
        codes: Tensor = quantize_4bit(merged, blocksize=BLOCK, quant_type="nf4")[0]
        return codes.flatten().view(torch.uint8)

    ours = partial(run, w.codes, w.absmax, BLOCK, a, b, torch.bfloat16)
    return {"lorasurgery": lambda: ours()[0], "bitsandbytes and torch": bitsandbytes}


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


def benches(size: int, rows: tuple[int, ...] = ROWS) -> dict[str, Callable[[Layer], Sides]]:
    """By the title of the row; rows are those of x."""
    rank = f"LoRA of rank {RANK}"
    return {
        f"NF4 quantize {size} x {size} bf16": quantize,
        f"NF4 + double quantization {size} x {size} bf16": quantize_double,
        f"NF4 dequantize {size} x {size} to bf16": dequantize,
        **{f"NF4 linear, {m} rows": partial(linear, m=m) for m in rows},
        **{f"NF4 linear + {rank}, {m} rows": partial(lora_linear, m=m) for m in rows},
        **{f"its gradients, {m} rows": partial(lora_backward, m=m) for m in rows[2:]},
        f"merge {rank} into bf16": merge,
        f"merge {rank} into NF4": merge_nf4,
        f"DoRA norms of rows, rank {RANK}": partial(dora_norm, axis=1),
        f"DoRA norms of columns, rank {RANK}": partial(dora_norm, axis=0),
        "DoRA output": dora_output,
        **{f"{ADAPTERS} adapters, {m} rows": partial(grouped, m=m) for m in (ADAPTERS, rows[2])},
        "AdamW of factors": adamw,
    }
