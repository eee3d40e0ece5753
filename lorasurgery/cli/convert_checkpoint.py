"""lorasurgery convert-checkpoint: GGUF, .bin or safetensors to safetensors."""

from __future__ import annotations

from lorasurgery.cli._options import Base, Dtype, Printing, Writing
from lorasurgery.cli._report import carry_out
from lorasurgery.tensors import DTYPE_NAMES


def command(base: Base, dtype: Dtype = "auto", *, writing: Writing, printing: Printing) -> None:
    """Rewrite GGUF, .bin or safetensors as safetensors.

    Example:

        lorasurgery convert-checkpoint model.gguf -o model --dtype bfloat16
    """
    from lorasurgery.model import resolve
    from lorasurgery.operations.convert_checkpoint import convert_checkpoint

    source, code = resolve(base), DTYPE_NAMES.get(dtype)
    carry_out(lambda output, how: convert_checkpoint(source, output, code, how), writing, printing)
