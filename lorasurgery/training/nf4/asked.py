"""Whether --qlora is to be had of a method and a base."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from torch import nn

from lorasurgery.checkpoint import read_json
from lorasurgery.codec import CodecOptions
from lorasurgery.dialects import _peft_lora_config as peft
from lorasurgery.errors import UsageError
from lorasurgery.training.nf4.linear import NF4Linear

# methods whose own promise does not hold over NF4, and why
REFUSED = {
    "vera": "its two vectors scale directions that were drawn at random, none of which makes up for W's rounding",
    "lora-drop": "which modules matter is measured on the base itself, and W's rounding chooses others",
    "moral": "its experts are not merged into any base, so that none of NF4's three merges holds",
}


def check_method(name: str) -> None:
    """Raises UsageError with the reason why a method is not trained over NF4."""
    if name in REFUSED:
        raise UsageError(
            f"--qlora: does not go with --method {name}: {REFUSED[name]}. Take one of them away."
        )


def check_base(path: Path, nf4: CodecOptions | None) -> None:
    """Raises UsageError for a base that is packed, where that was not asked for."""
    config = path / "config.json"
    if nf4 is None and config.is_file() and (said := read_json(config).get("quantization_config")):
        raise UsageError(
            f"{path}: is quantized ({said.get('quant_method')}). Pass --qlora to train on it as it is, or run "
            "`lorasurgery dequantize` first."
        )


def check_whole(model: nn.Module, names: Iterable[str]) -> None:
    """Raises UsageError for an NF4 layer that is to be trained whole."""
    for wanted in names:
        for name, module in model.named_modules():
            if isinstance(module, NF4Linear) and peft.saved({"modules_to_save": [wanted]}, name):
                raise UsageError(
                    f"--modules-to-save {wanted}: {name} is NF4, and codes have no gradient. Leave --qlora out, "
                    "or adapt it with --target-modules."
                )
