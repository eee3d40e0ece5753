"""Rows of a GPU's benchmark in which weights become weights: quantized, decoded, merged."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu_layer import BLOCK, SCALE, Layer, Sides, kernel


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


def merge_out(w: Layer) -> Sides:
    """Out of NF4, into bfloat16."""
    from bitsandbytes.functional import dequantize_4bit

    run, a, b = kernel("nf4_decode_merge"), w.a.float(), SCALE * w.b.float()
    ours = partial(run, w.codes, w.absmax, BLOCK, a, b, torch.bfloat16, torch.bfloat16)

    def bitsandbytes() -> Tensor:
        merged: Tensor = dequantize_4bit(w.theirs, w.state).float() + b @ a
        return merged.to(torch.bfloat16)

    return {"lorasurgery": lambda: ours()[0], "bitsandbytes and torch": bitsandbytes}


def merge_in(w: Layer) -> Sides:
    """Of the weights that NF4 was made of, into NF4: what policy from-original does."""
    from bitsandbytes.functional import quantize_4bit

    run, a, b = kernel("nf4_encode_merge"), w.a.float(), SCALE * w.b.float()

    def bitsandbytes() -> Tensor:
        merged = w.dense.float() + b @ a
        codes: Tensor = quantize_4bit(merged, blocksize=BLOCK, quant_type="nf4")[0]
        return codes.flatten().view(torch.uint8)

    return {
        "lorasurgery": lambda: run(w.dense, BLOCK, a, b)[0],
        "bitsandbytes and torch": bitsandbytes,
    }
