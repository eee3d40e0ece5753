"""int4 or int8 in blocks along a row: w ≈ (q - z) s, q of 0..2^bits - 1, as MatMulNBits multiplies by it.

Symmetric: z = h = 2^(bits - 1) and s = w_m / -h for the element w_m of largest magnitude, so that it is met
exactly. With zero points: s = (max - min) / (2h - 1) over the block and 0, z = round(-min / s). Low nibble first.
"""

from __future__ import annotations

import numpy as np

from lorasurgery.arrays import Array


def quantize(w: Array, block: int, bits: int, *, symmetric: bool) -> tuple[Array, Array, Array]:
    """w float32 [rows, k] -> codes uint8 [rows, blocks, block], scales [rows, blocks], zeros uint8."""
    rows, k = w.shape
    blocks, half = -(-k // block), 1 << (bits - 1)
    padded = np.zeros((rows, blocks * block), np.float32)
    padded[:, :k] = w
    padded = padded.reshape(rows, blocks, block)
    low, high = padded.min(axis=2), padded.max(axis=2)
    if symmetric:
        scales = np.where(-low > high, low, high) / np.float32(-half)
        zeros = np.full((rows, blocks), half, np.uint8)
    else:
        low, high = np.minimum(low, 0), np.maximum(high, 0)
        scales = (high - low) / np.float32(2 * half - 1)
        safe = np.where(scales == 0, np.float32(1), scales)
        zeros = np.clip(np.rint(-low / safe), 0, 2 * half - 1).astype(np.uint8)
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales != 0)
    codes = np.rint(padded * inverse[..., None]) + zeros[..., None]
    return np.clip(codes, 0, 2 * half - 1).astype(np.uint8), scales, zeros


def dequantize(codes: Array, scales: Array, zeros: Array, k: int) -> Array:
    """What the codes stand for, float32 [rows, k]."""
    wide = (codes.astype(np.float32) - zeros[..., None]) * scales[..., None].astype(np.float32)
    values: Array = wide.reshape(len(codes), -1)[:, :k]
    return values


def packed(codes: Array, bits: int) -> Array:
    """Two codes of 4 bits a byte along the last axis, the first in the low nibble; an odd one has 0 beside it."""
    if bits == 8:
        return codes
    if codes.shape[-1] % 2:
        codes = np.concatenate([codes, np.zeros((*codes.shape[:-1], 1), np.uint8)], axis=-1)
    both: Array = codes[..., 0::2] | codes[..., 1::2] << 4
    return both
