"""Which level a number is nearest to: how many bounds lie below it, by one look-up and one comparison.

[-1, 1) in 32 cells, each narrower than two neighbouring bounds are apart: a cell has the count of the bounds
below it and at most one bound inside. The cells are two permutations of AVX-512; other processors compare with
all fifteen bounds. Both give the same for every number, nan and inf too.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from lorasurgery.kernels._nf4_lookup import WIDE, data, declared
from lorasurgery.kernels._numba import inner

CELLS = 32
_LANES = 16
# the nearest that 3 + x can be to the end of a cell on the wrong side, and more
_ROUNDED = np.float32(2.0**-20)
_LAST = np.float32(1 - 2.0**-20)

f4, u4, i1 = np.float32, np.uint32, np.uint8

_FLOATS, _INTS = ir.VectorType(ir.FloatType(), _LANES), ir.VectorType(ir.IntType(32), _LANES)
_NARROW = ir.VectorType(ir.IntType(8), _LANES)


@inner
def cells(bounds: Any) -> Any:
    """Of each cell how many bounds lie below it (int32), and its own (float32, inf if none); empty if a cell has two.

    Args:
        bounds: float32 [15], rising.

    """
    size = CELLS if WIDE else 0
    counts, own = np.zeros(size, np.int32), np.full(size, np.inf, f4)
    for k in range(size):
        low, high = f4(k - 16) / f4(16), f4(k - 15) / f4(16)
        for b in bounds:
            if k > 0 and b < low:
                counts[k] += 1
            elif k == CELLS - 1 or b < high:
                # so near to the end, numbers above it might be taken for the next cell's
                if own[k] < np.inf or (k < CELLS - 1 and b > high - _ROUNDED):
                    return counts[:0], own[:0]
                own[k] = b
    return counts, own


@inner
def count_below(x: Any, bounds: Any, cells: Any, nibbles: Any) -> Any:
    """nibbles[j] = how many bounds lie below x[j]; a multiple of 16 of them."""
    if len(cells[0]):
        for at in range(0, len(x), _LANES):
            _look(x, cells[0], cells[1], nibbles, at)
        return
    b0, b1, b2, b3, b4 = bounds[0], bounds[1], bounds[2], bounds[3], bounds[4]
    b5, b6, b7, b8, b9 = bounds[5], bounds[6], bounds[7], bounds[8], bounds[9]
    b10, b11, b12, b13, b14 = bounds[10], bounds[11], bounds[12], bounds[13], bounds[14]
    for j in range(len(x)):
        v = x[j]
        c = u4(v > b0) + u4(v > b1) + u4(v > b2) + u4(v > b3) + u4(v > b4)
        c += u4(v > b5) + u4(v > b6) + u4(v > b7) + u4(v > b8) + u4(v > b9)
        c += u4(v > b10) + u4(v > b11) + u4(v > b12) + u4(v > b13) + u4(v > b14)
        nibbles[j] = i1(c)


def _typed(_: Any, x: Any, counts: Any, own: Any, nibbles: Any, at: Any) -> Any:
    """The 16 numbers from `at` on."""
    return types.void(x, counts, own, nibbles, at), _build


_look: Any = intrinsic(_typed)


def _build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    x, counts, own, nibbles = (
        data(context, builder, kind, arg)
        for kind, arg in zip(signature.args[:4], args[:4], strict=True)
    )
    v = _load(builder, builder.gep(x, [args[4]]), _FLOATS)
    # nan becomes -1, whose cell has no bound below it
    low, high, three = (_all(number) for number in (-1.0, float(_LAST), 3.0))
    kept = builder.select(builder.fcmp_ordered(">", v, low), v, low)
    kept = builder.select(builder.fcmp_ordered("<", kept, high), kept, high)
    # of 3 + x, from 2 to 4, the first five bits of the fraction
    bits = builder.bitcast(builder.fadd(kept, three), _INTS)
    cell = builder.and_(builder.lshr(bits, _all_ints(18)), _all_ints(CELLS - 1))
    below = _chosen(builder, "d", (counts, _INTS), cell)
    bound = _chosen(builder, "ps", (own, _FLOATS), cell)
    above = builder.zext(builder.fcmp_ordered(">", v, bound), _INTS)
    found = builder.trunc(builder.add(below, above), _NARROW)
    target = builder.bitcast(builder.gep(nibbles, [args[4]]), _NARROW.as_pointer())
    builder.store(found, target, align=1)
    return context.get_dummy_value()


def _chosen(builder: Any, kind: str, table: tuple[Any, Any], index: Any) -> Any:
    """For each lane one of the table's 32 numbers."""
    pointer, vector = table
    second = builder.gep(pointer, [ir.Constant(ir.IntType(64), _LANES)])
    low, high = (_load(builder, half, vector) for half in (pointer, second))
    name = f"llvm.x86.avx512.vpermi2var.{kind}.512"
    typed = ir.FunctionType(vector, [vector, _INTS, vector])
    return builder.call(declared(builder, name, typed), [low, index, high])


def _load(builder: Any, pointer: Any, kind: Any) -> Any:
    return builder.load(builder.bitcast(pointer, kind.as_pointer()), align=4)


def _all(number: float) -> Any:
    return ir.Constant(_FLOATS, [number] * _LANES)


def _all_ints(number: int) -> Any:
    return ir.Constant(_INTS, [number] * _LANES)
