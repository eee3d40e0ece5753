"""A row of NF4 times x where AVX-512 is: the levels, scaled for a block, are a register that codes permute.

64 running sums are four registers; what they hold is what `_matvec_cpu` computes without this, bit for bit.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from lorasurgery.kernels._nf4_lookup import data, declared
from lorasurgery.kernels._numba import inner

STEP = 64  # weights, 32 bytes of codes

_FLOATS, _INTS = ir.VectorType(ir.FloatType(), 16), ir.VectorType(ir.IntType(32), 16)
_BYTES = ir.VectorType(ir.IntType(8), 16)
_WORD = ir.IntType(32)


def _typed(_: Any, codes: Any, scales: Any, x: Any, size: Any, out: Any) -> Any:
    """Sums over a row, in the order of `spread`.

    Args:
        codes: uint8 [n / 2], n a multiple of 64.
        scales: (absmax float32 [n / block], table float32 [16], any array of the dtype that
            weights are rounded to).
        x: float32 [n], as `spread` makes it.
        size: (n / block, block / 64).
        out: float32 [64].

    """
    return types.void(codes, scales, x, size, out), _build


row: Any = intrinsic(_typed)


@inner
def spread(x: Any, out: Any) -> Any:
    """Even and odd elements of every 32 apart, as the high and low halves of codes are."""
    for at in range(0, len(x), 32):
        for k in range(16):
            out[at + k], out[at + 16 + k] = x[at + 2 * k], x[at + 2 * k + 1]


@inner
def gather(x: Any, out: Any) -> Any:
    """The inverse of `spread`."""
    for at in range(0, len(x), 32):
        for k in range(16):
            out[at + 2 * k], out[at + 2 * k + 1] = x[at + k], x[at + 16 + k]


def _build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    kinds = signature.args
    codes, x, out, absmax, plain = pointers(context, builder, kinds, args)
    like = kinds[1][2].dtype
    blocks, each = (builder.extract_value(args[3], i) for i in (0, 1))
    name, kind = "llvm.x86.avx512.permvar.sf.512", ir.FunctionType(_FLOATS, [_FLOATS, _INTS])
    permute = declared(builder, name, kind)
    zero = ir.Constant(_FLOATS, [0.0] * 16)
    levels = _load(builder, plain, _FLOATS, _number(each, 0))
    sums = [cgutils.alloca_once_value(builder, zero) for _ in range(4)]
    with cgutils.for_range(builder, blocks) as outer:
        scale = _spread(builder, builder.load(builder.gep(absmax, [outer.index])))
        table = _rounded(builder, builder.fmul(levels, scale), like)
        begin = builder.mul(outer.index, each)
        with cgutils.for_range(builder, each) as loop:
            step = builder.add(begin, loop.index)
            for half in (0, 1):
                at = builder.add(_times(builder, step, 32), _number(each, 16 * half))
                wide = builder.zext(_load(builder, codes, _BYTES, at), _INTS)
                high = builder.lshr(wide, _all(4))
                low = builder.and_(wide, _all(15))
                for side, index in enumerate((high, low)):
                    place = builder.add(_times(builder, at, 2), _number(each, 16 * side))
                    v = _load(builder, x, _FLOATS, place)
                    w, total = builder.call(permute, [table, index]), sums[2 * half + side]
                    builder.store(builder.fadd(builder.load(total), builder.fmul(w, v)), total)
    for i, total in enumerate(sums):
        target = builder.gep(out, [_number(each, 16 * i)])
        builder.store(builder.load(total), _as(builder, target, _FLOATS), align=4)
    return context.get_dummy_value()


def pointers(context: Any, builder: Any, kinds: Any, args: Any) -> list[Any]:
    """Where the codes, x, the sums, absmax and the table lie, of what a row takes."""
    given = [(kinds[i], args[i]) for i in (0, 2, 4)]
    given += [(kinds[1][i], builder.extract_value(args[1], i)) for i in (0, 1)]
    return [data(context, builder, kind, array) for kind, array in given]


def _spread(builder: Any, value: Any) -> Any:
    """A scalar in all elements of a vector."""
    first = builder.insert_element(ir.Constant(_FLOATS, ir.Undefined), value, _WORD(0))
    return builder.shuffle_vector(first, first, ir.Constant(_INTS, [0] * 16))


def _rounded(builder: Any, v: Any, like: Any) -> Any:
    """float32 by way of another dtype, named by the type that stands for it: `_floats.nearest`."""
    if like == types.int16:
        half = builder.fptrunc(v, ir.VectorType(ir.HalfType(), 16))
        return builder.fpext(half, _FLOATS)
    if like == types.uint16:
        bits = builder.bitcast(v, _INTS)
        odd = builder.and_(builder.lshr(bits, _all(16)), _all(1))
        up = builder.and_(builder.add(builder.add(bits, _all(0x7FFF)), odd), _all(0xFFFF0000))
        nan = builder.fcmp_unordered("uno", v, v)
        return builder.bitcast(builder.select(nan, _all(0x7FC00000), up), _FLOATS)
    return v


def _all(value: int) -> Any:
    return ir.Constant(_INTS, [value] * 16)


def _number(like: Any, value: int) -> Any:
    return ir.Constant(like.type, value)


def _times(builder: Any, value: Any, factor: int) -> Any:
    return builder.mul(value, _number(value, factor))


def _as(builder: Any, pointer: Any, kind: Any) -> Any:
    return builder.bitcast(pointer, kind.as_pointer())


def _load(builder: Any, data: Any, kind: Any, at: Any) -> Any:
    align = 1 if kind is _BYTES else 4
    return builder.load(_as(builder, builder.gep(data, [at]), kind), align=align)
