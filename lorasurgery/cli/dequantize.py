"""lorasurgery dequantize: packed weights back to 16 or 32 bits."""

from __future__ import annotations

from lorasurgery.cli._options import Base, DeviceName, Dtype, Printing, Writing
from lorasurgery.cli._report import carry_out
from lorasurgery.tensors import DTYPE_NAMES


def command(
    base: Base,
    dtype: Dtype = "auto",
    device: DeviceName = "cpu",
    *,
    writing: Writing,
    printing: Printing,
) -> None:
    """Write an NF4 or FP4 model as a plain one.

    Example:

        lorasurgery dequantize model-nf4 -o model-bf16 --dtype bfloat16
    """
    from lorasurgery.device import opened
    from lorasurgery.model import resolve
    from lorasurgery.operations.dequantize import dequantize

    where = opened(device)  # before anything is downloaded
    source, code = resolve(base), DTYPE_NAMES.get(dtype)
    carry_out(
        lambda output, how: dequantize(source, output, code, how), writing, printing, device=where
    )
