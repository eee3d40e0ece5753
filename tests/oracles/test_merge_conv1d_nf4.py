"""Merging into an NF4 base whose Conv1D weights are packed turned: the same as into its dequantized form."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from merging import done, make_adapter, merged_by_peft, same_weights, surgery
from tiny import Base

Bases = Callable[..., Base]


@pytest.fixture
def packed(bases: Bases, tmp_path: Path) -> tuple[Base, Path, Path]:
    """A GPT-2, its NF4 form, and an adapter for it."""
    base = bases("gpt2", torch.float32)
    done("quantize", base.path, "-o", tmp_path / "nf4")
    targets = ["c_attn", "c_proj", "c_fc"]
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=targets, fan_in_fan_out=True)
    return base, tmp_path / "nf4", adapter


def test_a_packed_gpt2_is_merged_as_its_dequantized_form_is_by_peft(
    packed: tuple[Base, Path, Path], tmp_path: Path
) -> None:
    base, nf4, adapter = packed
    done("dequantize", nf4, "-o", tmp_path / "plain")
    done("merge", nf4, adapter, "-o", tmp_path / "merged")
    theirs = merged_by_peft(Base(tmp_path / "plain", base.auto, base.dtype), (adapter, 1.0))
    same_weights(base.load(tmp_path / "merged"), theirs)


@pytest.mark.parametrize("flags", [("--requantize", "rtn"), ("--undo",)])
def test_what_would_need_turned_codes_is_refused(
    packed: tuple[Base, Path, Path], tmp_path: Path, flags: tuple[str, ...]
) -> None:
    _, nf4, adapter = packed
    typed = flags if len(flags) == 2 else (*flags, str(tmp_path / "undo"))
    result = surgery("merge", nf4, adapter, "-o", tmp_path / "merged", *typed)
    assert result.exit_code == 2
    assert result.stderr == (
        f"error: {' '.join(flags)}: {nf4} packs Conv1D weights as [out, in]. Merge into 16 bits "
        "without it, or into the 16-bit original.\n"
    )
