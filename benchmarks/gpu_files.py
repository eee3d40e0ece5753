"""Rows of a GPU's benchmark that go from file to file: whole processes, with --device cuda beside the processor.

Nothing of these was measured yet where a GPU is: what reading, copying and starting torch cost there, they tell.
"""

from __future__ import annotations

from filecmp import cmp
from pathlib import Path

from benchmarks.racing import OURS, Contender, Row, alternate
from benchmarks.run import made, warm

MODEL = "llama-1b"


def rows(scratch: Path, repeats: int, device: str = "cuda", model: str = MODEL) -> list[Row]:
    """Each operation on the device, and beside it on the processor; both write the same bytes."""
    base = made(scratch, model, "benchmarks.make_model", model)
    lora = made(scratch, f"{model}-lora", "benchmarks.make_adapter", model)
    dora = made(scratch, f"{model}-dora", "benchmarks.make_adapter", model, "--kind", "dora")
    warm(base / "model.safetensors")
    nf4 = scratch / "runs" / "quantized" / "cpu"
    return [
        _row("quantize to NF4", ("quantize", base), nf4.parent, device, repeats),
        _row("dequantize", ("dequantize", nf4), scratch / "runs" / "dense", device, repeats),
        _row("merge a LoRA", ("merge", base, lora), scratch / "runs" / "merged", device, repeats),
        _row("merge a DoRA", ("merge", base, dora), scratch / "runs" / "dora", device, repeats),
        _row(
            "merge a LoRA into NF4", ("merge", nf4, lora, "--requantize", "rtn", "--min-retained", "0"),
            scratch / "runs" / "within", device, repeats,
        ),
    ]  # fmt: skip


def _row(
    what: str, command: tuple[str | Path, ...], folder: Path, device: str, repeats: int
) -> Row:
    """The first round compiles and measures configurations; it is not counted."""
    folder.mkdir(parents=True, exist_ok=True)
    here, beside = folder / "device", folder / "cpu"
    contenders = (
        Contender(f"--device {device}", (*OURS, *command, "-o", here, "--device", device), here),
        Contender("the processor", (*OURS, *command, "-o", beside), beside),
    )
    alternate(what, contenders, 1)
    ours, theirs = (folder / "model.safetensors" for folder in (here, beside))
    assert cmp(ours, theirs, shallow=False), f"{ours} and {theirs} differ"
    return alternate(f"{what}, file to file", contenders, repeats)
