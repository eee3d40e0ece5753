"""LoKr: ΔW = s · W₁ ⊗ W₂, a Kronecker product whose parts may be products of small factors in turn.

Yeh et al. 2023 (LyCORIS), arXiv 2309.14859, §3.2; Edalati et al. 2022 (KronA), arXiv 2212.10650.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from lorasurgery.adapter import AdapterConfig
from lorasurgery.arrays import alike

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Generator, Tensor

    from lorasurgery.arrays import A

LINEAR_IN_W = True

_ROUNDS = 200  # of a power iteration, unless nothing is gained any more


def shapes(out: int, in_: int, config: AdapterConfig) -> dict[str, tuple[int, ...]]:
    """W1 [a, b] or W1A [a, r], W1B [r, b];  W2 [c, d] or W2A [c, r], W2B [r, d];  out = a c, in = b d.

    extra: decompose_factor says how out and in are split (-1: as evenly as can be), decompose_both
    whether W1 may be factored too.
    """
    r, factor = config.rank, config.extra.get("decompose_factor", -1)
    assert isinstance(factor, int)
    (a, c), (b, d) = split(out, factor), split(in_, factor)
    found: dict[str, tuple[int, ...]] = {"W1": (a, b)}
    if config.extra.get("decompose_both") and 2 * r < max(a, b):
        found = {"W1A": (a, r), "W1B": (r, b)}
    if 2 * r < max(c, d):
        return {**found, "W2A": (c, r), "W2B": (r, d)}
    return {**found, "W2": (c, d)}


def split(size: int, factor: int) -> tuple[int, int]:
    """Two numbers whose product is size: factor and the rest, or else the largest divisor up to it."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    most = math.isqrt(size) if factor < 1 else min(factor, math.isqrt(size))
    small = max(n for n in range(1, most + 1) if size % n == 0)
    return small, size // small


def init(w: Tensor, config: AdapterConfig, rng: Generator) -> dict[str, Tensor]:
    """W₁ (or what it is made of first) is 0, so ΔW = 0; the others uniform, by their last dimension."""
    import torch

    made = {}
    for name, shape in shapes(w.shape[0], w[0].numel(), config).items():
        bound = 0.0 if name in ("W1", "W1A") else 1 / math.sqrt(shape[1])
        made[name] = torch.empty(shape).uniform_(-bound, bound, generator=rng)
    return made


def delta(w: A, factors: Mapping[str, A], config: AdapterConfig) -> A:  # noqa: ARG001 - free of W
    """ΔW [out, in], a convolution's flat."""
    w1 = factors["W1"] if "W1" in factors else factors["W1A"] @ factors["W1B"]
    w2 = factors["W2"] if "W2" in factors else factors["W2A"] @ _w2b(factors)
    if config.extra.get("last_dimensions"):
        # a product over the last two of three dimensions, [c, a d, b k]: PEFT's, of a Conv1d
        parts = w1[None, :, None, :, None] * w2[:, None, :, None, :]
        change: A = parts.reshape(len(w1) * len(w2), -1)
    else:
        change = _kron(w1, w2.reshape(len(w2), -1))
    return config.scaling * change


def forward(x: Tensor, w: Tensor, factors: Mapping[str, Tensor], config: AdapterConfig) -> Tensor:
    """X (W + ΔW)ᵀ without forming ΔW: W₁ X W₂ᵀ of each x seen as [b, d];  x [..., in] -> [..., out]."""
    w1 = factors["W1"] if "W1" in factors else factors["W1A"] @ factors["W1B"]
    w2 = factors["W2"] if "W2" in factors else factors["W2A"] @ factors["W2B"]
    folded = x.reshape(*x.shape[:-1], w1.shape[1], w2.shape[1])
    change = (w1 @ (folded @ w2.T)).flatten(-2)
    return x @ w.T + config.scaling * change


def from_lora(w: A, a: A, b: A) -> dict[str, A] | None:  # noqa: ARG001
    """Only with W₁ = [1], which is a LoRA by another name."""
    return None


def from_delta(
    w: A,  # noqa: ARG001
    delta: A,
    lora: tuple[A, A],  # noqa: ARG001
    config: AdapterConfig,
) -> dict[str, A]:
    """The nearest Kronecker product: the nearest of rank 1 to ΔW rearranged, [a b, c d], a part at a time.

    Van Loan and Pitsianis 1993. A part that is to be a product of rank r is cut to it each time.
    """
    sizes = shapes(delta.shape[0], delta.shape[1], config)
    (a, b), (c, d) = (_size(sizes, part) for part in ("W1", "W2"))
    blocks = np.asarray(delta, np.float32).reshape(a, c, b, d).transpose(0, 2, 1, 3)
    turned = np.ascontiguousarray(blocks).reshape(a * b, c * d)
    w2, best = turned[np.argmax(np.square(turned).sum(1))], 0.0
    one, two = np.zeros(a * b, np.float32), w2
    for _ in range(_ROUNDS):
        one = _at_rank(turned @ _unit(two), (a, b), sizes.get("W1A"))
        two = _at_rank(_unit(one) @ turned, (c, d), sizes.get("W2A"))
        held = float(two @ two)
        if held <= best * (1 + 1e-7):
            break
        best = held
    size = float(two @ two) ** 0.25
    parts = {"W1": (_unit(one) * size).reshape(a, b), "W2": (two / (size or 1)).reshape(c, d)}
    made: dict[str, NDArray[np.float32]] = {}
    for name, part in parts.items():
        made.update({name: part} if name in sizes else _factored(name, part, config.rank))
    return {name: alike(delta, np.ascontiguousarray(f, np.float32)) for name, f in made.items()}


def _size(sizes: Mapping[str, tuple[int, ...]], part: str) -> tuple[int, int]:
    rows, columns = sizes[part] if part in sizes else (sizes[f"{part}A"][0], sizes[f"{part}B"][1])
    return rows, columns


def _unit(x: NDArray[np.float32]) -> NDArray[np.float32]:
    return x / (np.float32(np.linalg.norm(x)) or np.float32(1))


def _at_rank(
    x: NDArray[np.float32], size: tuple[int, int], factor: tuple[int, ...] | None
) -> NDArray[np.float32]:
    """The part itself, or the nearest of the rank that its factors will have."""
    if factor is None:
        return x
    u, s, vt = np.linalg.svd(x.reshape(size), full_matrices=False)
    r = factor[1]
    cut: NDArray[np.float32] = ((u[:, :r] * s[:r]) @ vt[:r]).reshape(-1)
    return cut


def _factored(name: str, part: NDArray[np.float32], rank: int) -> dict[str, NDArray[np.float32]]:
    u, s, vt = np.linalg.svd(part, full_matrices=False)
    root = np.sqrt(s[:rank])
    return {f"{name}A": u[:, :rank] * root, f"{name}B": root[:, None] * vt[:rank]}


def low_rank(factors: Mapping[str, A], config: AdapterConfig) -> tuple[A, A] | None:
    """(P ⊗ W2A)(Q ⊗ W2B) with W₁ = P Q, where that is of less than half of W's rank."""
    if "W2A" not in factors:
        return None
    w2a, w2b = factors["W2A"], _w2b(factors)
    if "W1" in factors:
        w1 = factors["W1"]
        p, q = (w1, _eye(w1, w1.shape[1])) if len(w1) > w1.shape[1] else (_eye(w1, len(w1)), w1)
    else:
        p, q = factors["W1A"], factors["W1B"]
    out, in_, rank = len(p) * len(w2a), q.shape[1] * w2b.shape[1], len(q) * len(w2b)
    if 2 * rank >= min(out, in_):
        return None
    return _kron(q, w2b), config.scaling * _kron(p, w2a)


def _kron(one: A, two: A) -> A:
    """[a, b] ⊗ [c, d] = [a c, b d]."""
    product: A = (one[:, None, :, None] * two[None, :, None, :]).reshape(len(one) * len(two), -1)
    return product


def _w2b(factors: Mapping[str, A]) -> A:
    """W2B [r, d]; with a core T2 [r, r, *kernel] Σⱼ T2[:, j, kernel] W2B[j, channel], flat."""
    w2b = factors["W2B"]
    if "T2" not in factors:
        return w2b
    core = factors["T2"]
    core = core.reshape(len(core), len(w2b), -1).swapaxes(1, 2)
    folded: A = (core @ w2b).swapaxes(1, 2).reshape(len(core), -1)
    return folded


def _eye(like: A, n: int) -> A:
    if isinstance(like, np.ndarray):
        return np.eye(n, dtype=like.dtype)
    import torch

    return torch.eye(n, dtype=like.dtype, device=like.device)
