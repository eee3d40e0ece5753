"""What training does to factors element by element, in numba: AdamW, and AdaLoRA's importance."""

from __future__ import annotations

from typing import Any

import numpy as np

from lorasurgery.kernels._numba import inner, jit

LANES = 64  # running sums
SPAN = 1024  # elements that stay in the first-level cache from loop to loop

f4, f8 = np.float32, np.float64


@jit
def adamw(w: Any, grad: Any, m: Any, v: Any, numbers: Any, out: Any) -> Any:
    """One step; `out` are (w, m, v), which may be the inputs; all float32 [n].

    numbers: float32 (decay, 1 - β1, β2, 1 - β2, √(1 - β2ᵗ), ε, lr / (1 - β1ᵗ)).
    """
    x, first, second = np.empty(SPAN, f4), np.empty(SPAN, f4), np.empty(SPAN, f4)
    for at in range(0, len(w), SPAN):
        here = slice(at, min(at + SPAN, len(w)))
        _moments(grad[here], m[here], v[here], numbers, (first, second))
        _move(w[here], first, second, numbers, x)
        for target, source in zip(out, (x, first, second)):  # noqa: B905 - numba knows no strict
            part = target[here]
            for j in range(len(part)):
                part[j] = source[j]


@inner
def _moments(grad: Any, m: Any, v: Any, numbers: Any, out: Any) -> Any:
    """Few arrays a loop, and those that are written fresh ones: LLVM makes vector code of no other."""
    (first, second), (_, c1, b2, c2, _, _, _) = out, numbers
    for j in range(len(grad)):
        first[j] = m[j] + c1 * (grad[j] - m[j])
    for j in range(len(grad)):
        second[j] = v[j] * b2 + c2 * grad[j] * grad[j]


@inner
def _move(w: Any, first: Any, second: Any, numbers: Any, x: Any) -> Any:
    decay, _, _, _, root, eps, rate = numbers
    for j in range(len(w)):
        x[j] = w[j] * decay - rate * first[j] / (np.sqrt(second[j]) / root + eps)


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
