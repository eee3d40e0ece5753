"""Codes to levels: a byte's two weights as one 64-bit word, or 32 weights in two permutations.

Sixteen float32 levels fill one register of AVX-512, where a permutation is the whole look-up. LLVM
does not find that by itself; other processors read the words from a table in the first-level cache.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import types
from numba.core import config
from numba.extending import intrinsic

from lorasurgery.kernels._numba import inner

_settings: Any = config
# a processor that was named by NUMBA_CPU_NAME is not the one whose features can be asked for
_NAMED = _settings.CPU_NAME or _settings.CPU_FEATURES
WIDE = bool(get_host_cpu_features().get("avx512f")) and not _NAMED
_BYTES = 16  # of codes, at a time

_FLOATS, _INTS = ir.VectorType(ir.FloatType(), 16), ir.VectorType(ir.IntType(32), 16)


@inner
def look_up(codes: Any, pairs: Any, values: Any) -> Any:
    """values[j] = pairs[codes[j]]: two float32, the earlier weight in the low half.

    Args:
        codes: uint8 [n].
        pairs: uint64 [256], from `nf4_dequantize.pairs`.
        values: uint64, at least n.

    """
    done = 0
    if WIDE:
        while done + _BYTES <= len(codes):
            _permute(codes, pairs, values, done)
            done += _BYTES
    for j in range(done, len(codes)):
        values[j] = pairs[codes[j]]


def _typed(_: Any, codes: Any, pairs: Any, values: Any, at: Any) -> Any:
    """The same for the 16 bytes from `at` on."""
    return types.void(codes, pairs, values, at), _build


_permute: Any = intrinsic(_typed)


def _build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    codes, pairs, values = (
        data(context, builder, kind, arg)
        for kind, arg in zip(signature.args[:3], args[:3], strict=True)
    )
    # the first 16 words are the pairs of level 0 with each level: their high halves are the table
    both = _load(builder, pairs, ir.VectorType(ir.FloatType(), 32), 4)
    odd = ir.Constant(_INTS, [2 * k + 1 for k in range(16)])
    table = builder.shuffle_vector(both, both, odd)
    narrow = _load(builder, builder.gep(codes, [args[3]]), ir.VectorType(ir.IntType(8), 16), 1)
    wide = builder.zext(narrow, _INTS)
    name, kind = "llvm.x86.avx512.permvar.sf.512", ir.FunctionType(_FLOATS, [_FLOATS, _INTS])
    permute = declared(builder, name, kind)
    high = builder.call(permute, [table, builder.lshr(wide, ir.Constant(_INTS, [4] * 16))])
    low = builder.call(permute, [table, builder.and_(wide, ir.Constant(_INTS, [15] * 16))])
    for half in (0, 8):
        order = [k + side for k in range(half, half + 8) for side in (0, 16)]
        mixed = builder.shuffle_vector(high, low, ir.Constant(_INTS, order))
        start = builder.add(args[3], ir.Constant(args[3].type, half))
        target = builder.bitcast(builder.gep(values, [start]), _FLOATS.as_pointer())
        builder.store(mixed, target, align=4)
    return context.get_dummy_value()


def data(context: Any, builder: Any, kind: Any, array: Any) -> Any:
    """Where an array's elements lie."""
    return context.make_array(kind)(context, builder, array).data


def declared(builder: Any, name: str, kind: Any) -> Any:
    """One of LLVM's own functions, declared once a module."""
    return builder.module.globals.get(name) or ir.Function(builder.module, kind, name)


def _load(builder: Any, pointer: Any, kind: Any, align: int) -> Any:
    return builder.load(builder.bitcast(pointer, kind.as_pointer()), align=align)
