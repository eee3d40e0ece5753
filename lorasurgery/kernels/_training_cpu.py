"""What training does to factors element by element, in numba: AdamW, and AdaLoRA's importance."""

from __future__ import annotations

from typing import Any

import numpy as np

from lorasurgery.kernels._numba import inner, jit

LANES = 64  # running sums

f4, f8 = np.float32, np.float64


@jit
def adamw(w: Any, grad: Any, m: Any, v: Any, numbers: Any, out: Any) -> Any:
    """One step; `out` are (w, m, v), which may be the inputs; all float32 [n].

    numbers: float32 (decay, 1 - β1, β2, 1 - β2, √(1 - β2ᵗ), ε, lr / (1 - β1ᵗ)).
    """
    decay, first, second, rest, root, eps, rate = numbers
    new_w, new_m, new_v = out
    for i in range(len(w)):
        g = grad[i]
        m1 = m[i] + first * (g - m[i])
        v1 = v[i] * second + rest * g * g
        new_m[i], new_v[i] = m1, v1
        new_w[i] = w[i] * decay - rate * m1 / (np.sqrt(v1) / root + eps)


@jit
def importance(w: Any, grad: Any, state: Any, betas: Any, axis: Any, out: Any) -> Any:
    """AdaLoRA's smoothing of two float32 arrays shaped as w, and float64 sums of the scores over an axis.

    Args:
        w: float32 [rows, columns].
        grad: float32 [rows, columns].
        state: (sensitivity, uncertainty).
        betas: (β1, 1 - β1, β2, 1 - β2), float32.
        axis: which one the sums run along.
        out: (sensitivity, uncertainty, sums).

    """
    rows, columns = w.shape
    total, lanes, score = out[2], np.empty(LANES, f8), np.empty(columns, f4)
    for j in range(len(total)):
        total[j] = f8(0)
    for i in range(rows):
        _smooth(w[i], grad[i], (state[0][i], state[1][i]), betas, (out[0][i], out[1][i], score))
        if axis == 0:
            for j in range(columns):
                total[j] += f8(score[j])
        else:
            total[i] = _sum(score, lanes)


@inner
def _smooth(w: Any, grad: Any, state: Any, betas: Any, out: Any) -> Any:
    (old, spread), (b1, c1, b2, c2), (new_old, new_spread, score) = state, betas, out
    for j in range(len(w)):
        now = abs(w[j] * grad[j])
        smooth = old[j] * b1 + c1 * now
        wide = spread[j] * b2 + c2 * abs(now - smooth)
        new_old[j], new_spread[j], score[j] = smooth, wide, smooth * wide


@inner
def _sum(x: Any, lanes: Any) -> Any:
    for k in range(LANES):
        lanes[k] = f8(0)
    for at in range(0, len(x), LANES):
        part = x[at : at + LANES]
        for k in range(len(part)):
            lanes[k] += f8(part[k])
    total = f8(0)
    for k in range(LANES):
        total += lanes[k]
    return total
