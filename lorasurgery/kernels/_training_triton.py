"""The operations of `_training_cpu` on the GPU, each rounded by itself (no fused multiply-add)."""

from __future__ import annotations

import triton
import triton.language as tl

from lorasurgery.kernels._tuning import Config

ADAMW = (
    Config(SIZE=1024, num_warps=4),
    Config(SIZE=512, num_warps=4),
    Config(SIZE=2048, num_warps=8),
)
# for triplets along the first axis, whose items lie side by side, and along the second
IMPORTANCE = (
    Config(TRIPLETS=1, ITEMS=1024, num_warps=4),
    Config(TRIPLETS=1, ITEMS=2048, num_warps=8),
    Config(TRIPLETS=2, ITEMS=512, num_warps=4),
)
IMPORTANCE_ACROSS = (
    Config(TRIPLETS=16, ITEMS=64, num_warps=4),
    Config(TRIPLETS=32, ITEMS=32, num_warps=4),
    Config(TRIPLETS=16, ITEMS=128, num_warps=8),
)
ALL, TOP = tl.constexpr(0xFFFFFFFF), tl.constexpr(0x80000000)

BUDGET = (Config(SIZE=1024, num_warps=8), Config(SIZE=4096, num_warps=16))


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def adamw(  # type: ignore[no-untyped-def]
    w, grad, m, v, numbers, new_w, new_m, new_v, n, split, SIZE: tl.constexpr
):
    """SIZE elements a program; from index `split` on, the second row of the numbers counts."""
    index = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)  # [SIZE]
    mask = index < n
    row = tl.where(index >= split, 7, 0)
    decay, rate = tl.load(numbers + row), tl.load(numbers + row + 6)
    first, second, rest = tl.load(numbers + 1), tl.load(numbers + 2), tl.load(numbers + 3)
    root, eps = tl.load(numbers + 4), tl.load(numbers + 5)
    g = tl.load(grad + index, mask=mask, other=0.0)
    m0 = tl.load(m + index, mask=mask, other=0.0)
    m1 = m0 + first * (g - m0)
    v1 = tl.load(v + index, mask=mask, other=0.0) * second + rest * g * g
    tl.store(new_m + index, m1, mask=mask)
    tl.store(new_v + index, v1, mask=mask)
    below = tl.div_rn(tl.sqrt_rn(v1), root + tl.zeros_like(v1)) + eps
    moved = tl.load(w + index, mask=mask, other=0.0) * decay - tl.div_rn(rate * m1, below)
    tl.store(new_w + index, moved, mask=mask)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def importance(  # type: ignore[no-untyped-def]
    w, grad, old, spread, betas, new_old, new_spread, partial, triplets, items,
    TRIPLETS_FIRST: tl.constexpr, TRIPLETS: tl.constexpr, ITEMS: tl.constexpr,
):  # fmt: skip
    """TRIPLETS x ITEMS elements a program, whose sums of scores go to partial[program of items]."""
    part = tl.program_id(1).to(tl.int64)
    triplet = tl.program_id(0).to(tl.int64) * TRIPLETS + tl.arange(0, TRIPLETS)  # [TRIPLETS]
    item = part * ITEMS + tl.arange(0, ITEMS)  # [ITEMS]
    if TRIPLETS_FIRST:
        at = triplet[:, None] * items + item[None, :]
    else:
        at = triplet[:, None] + item[None, :] * triplets
    mask = (triplet < triplets)[:, None] & (item < items)[None, :]
    b1, c1, b2, c2 = tl.load(betas), tl.load(betas + 1), tl.load(betas + 2), tl.load(betas + 3)
    x = tl.load(w + at, mask=mask, other=0.0)
    now = tl.abs(x * tl.load(grad + at, mask=mask, other=0.0))
    smooth = tl.load(old + at, mask=mask, other=0.0) * b1 + c1 * now
    wide = tl.load(spread + at, mask=mask, other=0.0) * b2 + c2 * tl.abs(now - smooth)
    tl.store(new_old + at, smooth, mask=mask)
    tl.store(new_spread + at, wide, mask=mask)
    score = tl.where(mask, smooth * wide, 0.0).to(tl.float64)
    tl.store(partial + part * triplets + triplet, tl.sum(score, axis=1), mask=triplet < triplets)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def choose(  # type: ignore[no-untyped-def]
    e, of_e, of_a, of_b, scores, out, keep, n, pruned, SIZE: tl.constexpr
):
    """One program: scores, their pruned-th smallest by a search from the highest bit, and who is above it."""
    for start in range(0, n, SIZE):
        index = start + tl.arange(0, SIZE)  # [SIZE]
        mask = index < n
        x = tl.load(of_e + index, mask=mask, other=0.0) + tl.load(
            of_b + index, mask=mask, other=0.0
        )
        x += tl.load(of_a + index, mask=mask, other=0.0)
        tl.store(scores + index, x, mask=mask)
    # the other threads' scores are read below
    tl.debug_barrier()
    prefix, left = tl.full((), 0, tl.uint32), pruned
    for step in range(32):
        bit = 31 - step
        below = 0
        for start in range(0, n, SIZE):
            index = start + tl.arange(0, SIZE)
            key = _ordered(tl.load(scores + index, mask=index < n, other=0.0))
            same = ((key >> bit) == (prefix >> bit)) & (index < n)
            below += tl.sum(same.to(tl.int32), axis=0)
        if below < left:
            left -= below
            prefix |= tl.full((), 1, tl.uint32) << bit
    for start in range(0, n, SIZE):
        index = start + tl.arange(0, SIZE)
        mask = index < n
        x = tl.load(scores + index, mask=mask, other=0.0)
        # keys tell -0 from 0, numbers do not
        above = (_ordered(x) > prefix) & (x != _number(prefix)) | (pruned <= 0)
        above = above & (x == x)  # noqa: PLR0124 - nan alone differs from itself
        tl.store(keep + index, above.to(tl.uint8), mask=mask)
        tl.store(
            out + index, tl.where(above, tl.load(e + index, mask=mask, other=0.0), 0.0), mask=mask
        )


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _ordered(x):  # type: ignore[no-untyped-def]
    """A uint32 that is ordered as the float32 are; nan is the largest."""
    bits = x.to(tl.uint32, bitcast=True)
    key = tl.where(bits >> 31 == 1, bits ^ ALL, bits | TOP)
    return tl.where(x == x, key, ALL)  # noqa: PLR0124


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _number(key):  # type: ignore[no-untyped-def]
    """The float32 of `_ordered`'s key."""
    return tl.where(key >> 31 == 1, key ^ TOP, key ^ ALL).to(tl.float32, bitcast=True)
