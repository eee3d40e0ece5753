"""A row of NF4 times a bfloat16 x where AVX512-BF16 is: 32 weights in a permutation, 32 products in an instruction.

A product of two bfloat16 is exact in float32, so the instruction is two sums, each rounded, one after the other: what
`_matvec_pairs_cpu` computes without it, bit for bit, but that numbers below 2^-126 count as 0 here.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from llvmlite.binding import get_host_cpu_features, llvm_version_info
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from lorasurgery.kernels._nf4_lookup import WIDE, declared
from lorasurgery.kernels._nf4_wide import _load, _number, _spread, _times, pointers

# LLVM's bfloat16 is a type of its own since 17
PAIRED = bool(
    WIDE and get_host_cpu_features().get("avx512bf16") and get_host_cpu_features().get("avx512bw")
    and llvm_version_info[0] >= 17
)  # fmt: skip
STEP = 64  # weights


class _Brain(ir.types._BaseFloatType):  # type: ignore[misc, unused-ignore]  # noqa: SLF001 - llvmlite has none
    null, intrinsic_name = "0.0", "bf16"

    def __str__(self) -> str:
        return "bfloat"


_Brain._create_instance()  # noqa: SLF001 - as llvmlite makes its own
_FLOATS, _INTS = ir.VectorType(ir.FloatType(), 16), ir.VectorType(ir.IntType(32), 16)
_BYTES, _WORDS = (ir.VectorType(ir.IntType(bits), 32) for bits in (8, 16))
_HALF_BRAINS, _BRAINS = (ir.VectorType(_Brain(), size) for size in (16, 32))


def _typed(_: Any, codes: Any, scales: Any, x: Any, size: Any, out: Any) -> Any:
    """Sums over a row: of even and odd steps, there of even and odd weights, there of each four.

    Args:
        codes: uint8 [n / 2], n a multiple of 64.
        scales: (absmax float32 [n / block], table float32 [16]).
        x: uint16 [n], bfloat16: of every 64 the even ones, then the odd ones.
        size: (n / 64, the binary logarithm of block / 64).
        out: float32 [64].

    """
    return types.void(codes, scales, x, size, out), _build


row: Any = intrinsic(_typed)


def _build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    codes, x, out, absmax, plain = pointers(context, builder, signature.args, args)
    steps, shift = (builder.extract_value(args[3], i) for i in (0, 1))
    levels = _load(builder, plain, _FLOATS, _number(steps, 0))
    zero = ir.Constant(_FLOATS, [0.0] * 16)
    sums = [cgutils.alloca_once_value(builder, zero) for _ in range(4)]

    def take(step: Any, own: list[Any]) -> None:
        scale = builder.load(builder.gep(absmax, [builder.lshr(step, shift)]))
        table = _narrow(builder, builder.fmul(levels, _spread(builder, scale)))
        wide = builder.zext(_at(builder, codes, _BYTES, _times(builder, step, 32)), _WORDS)
        high, low = builder.lshr(wide, _all(4)), builder.and_(wide, _all(15))
        for side, index in enumerate((high, low)):
            place = builder.add(_times(builder, step, STEP), _number(step, 32 * side))
            v, w = _at(builder, x, _WORDS, place), _permuted(builder, table, index)
            builder.store(_two_sums(builder, builder.load(own[side]), w, v), own[side])

    two = _number(steps, 2)
    with cgutils.for_range(builder, builder.lshr(steps, _number(steps, 1))) as loop:
        for parity in (0, 1):
            step = builder.add(builder.mul(loop.index, two), _number(steps, parity))
            take(step, sums[2 * parity : 2 * parity + 2])
    with builder.if_then(builder.trunc(steps, ir.IntType(1))):
        take(builder.sub(steps, _number(steps, 1)), sums[:2])
    for i, total in enumerate(sums):
        target = builder.bitcast(builder.gep(out, [_number(steps, 16 * i)]), _FLOATS.as_pointer())
        builder.store(builder.load(total), target, align=4)
    return context.get_dummy_value()


def _narrow(builder: Any, levels: Any) -> Any:
    """Sixteen float32 to bfloat16, and the same again: a permutation takes 32."""
    kind = ir.FunctionType(_HALF_BRAINS, [_FLOATS])
    short = builder.call(declared(builder, "llvm.x86.avx512bf16.cvtneps2bf16.512", kind), [levels])
    twice = ir.Constant(ir.VectorType(ir.IntType(32), 32), [*range(16)] * 2)
    return builder.bitcast(builder.shuffle_vector(short, short, twice), _WORDS)


def _permuted(builder: Any, table: Any, index: Any) -> Any:
    kind = ir.FunctionType(_WORDS, [_WORDS, _WORDS])
    return builder.call(declared(builder, "llvm.x86.avx512.permvar.hi.512", kind), [table, index])


def _two_sums(builder: Any, total: Any, w: Any, x: Any) -> Any:
    """The later of two neighbours' products is added first."""
    kind = ir.FunctionType(_FLOATS, [_FLOATS, _BRAINS, _BRAINS])
    both = [builder.bitcast(v, _BRAINS) for v in (w, x)]
    return builder.call(declared(builder, "llvm.x86.avx512bf16.dpbf16ps.512", kind), [total, *both])


def _at(builder: Any, data: Any, kind: Any, place: Any) -> Any:
    pointer = builder.bitcast(builder.gep(data, [place]), kind.as_pointer())
    return builder.load(pointer, align=1 if kind is _BYTES else 2)


def _all(value: int) -> Any:
    return ir.Constant(_WORDS, [value] * 32)
