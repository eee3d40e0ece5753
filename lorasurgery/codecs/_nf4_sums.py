"""Weights encoded with what is added to them, in one pass, and moments of what their codes hold of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorasurgery.codec import Coded, Packed, Rule, Stored
from lorasurgery.errors import ValueRangeError

if TYPE_CHECKING:
    from lorasurgery.arrays import Array
    from lorasurgery.codec import Low


def recode(stored: Stored, change: Low, packed: Packed, rule: Rule) -> Coded:
    """Rows of codes and `packed`'s block size to others; scales that are kept are `stored`'s."""
    from lorasurgery.arrays import NUMPY
    from lorasurgery.kernels import nf4_dequantize, nf4_merge

    (a, b), block, dtype = change, int(packed.state["blocksize"]), NUMPY[packed.info.dtype]
    codes, absmax, table = stored.codes, stored.absmax, stored.table
    if not _own(table):
        shape = len(b), a.shape[1]
        flat = packed.device.run(
            nf4_dequantize, codes, absmax, block, shape[0] * shape[1], dtype, table
        )
        w = flat.reshape(shape)
        return encode_sum(w, w, change, packed, rule)
    keep = rule.absmax is not None
    coded = packed.device.run(
        nf4_merge, codes, absmax, block, a, b, dtype, keep, rule.seed, rule.offset
    )
    check_finite(coded[1], packed, rule)
    return Coded(*coded)


def encode_sum(w: Array, base: Array, change: Low | Array, packed: Packed, rule: Rule) -> Coded:
    """W and `base` bfloat16, float16 or float32 [rows, columns]; D float32 of that shape, or factors."""
    from lorasurgery.kernels import lora_delta, nf4_encode_merge

    block = int(packed.state["blocksize"])
    if isinstance(change, tuple) and (rule.table is None or _own(rule.table)):
        (a, b), seen = change, None if base is w else base
        coded = packed.device.run(
            nf4_encode_merge, w, block, a, b, rule.absmax, rule.seed, rule.offset, seen
        )
    else:
        d = lora_delta.run(*change) if isinstance(change, tuple) else change
        coded = _one_after_another(w, base, d, block, rule)
    check_finite(coded[1], packed, rule)
    return Coded(*coded)


def _one_after_another(
    w: Array, base: Array, d: Array, block: int, rule: Rule
) -> tuple[Array, Array, Array]:
    """The same for a change that no small factors make, or for scales of another table."""
    import numpy as np

    from lorasurgery.kernels import nf4_dequantize, nf4_moments, nf4_quantize

    table = nf4_dequantize.NF4 if rule.table is None else rule.table
    flat = (w.astype(np.float32, copy=False) + d).reshape(-1)
    codes, absmax = nf4_quantize.run(flat, block, rule.absmax, rule.seed, rule.offset)
    moments = nf4_moments.run(codes, absmax, block, base.reshape(-1), d.reshape(-1), table)
    return codes, absmax, moments


def _own(table: Array) -> bool:
    """Whether it is the one that the merging kernels know: FSDP may have rounded a file's."""
    import numpy as np

    from lorasurgery.kernels import nf4_dequantize

    return bool(np.array_equal(table, nf4_dequantize.NF4))


def check_finite(absmax: Array, packed: Packed, rule: Rule) -> None:
    """Raises ValueRangeError where a block's scale says that its values are not."""
    import numpy as np

    finite = np.isfinite(absmax)
    if not finite.all():
        first, block = int(np.flatnonzero(~finite)[0]), int(packed.state["blocksize"])
        raise ValueRangeError(
            f"{packed.info.name}: nan or inf among elements {rule.offset + first * block} to "
            f"{rule.offset + (first + 1) * block - 1}. Mend the weight, or leave it out with "
            f"--exclude '{packed.info.name}'."
        )
