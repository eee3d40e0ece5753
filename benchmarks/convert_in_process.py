"""One square layer's adapter as a LoRA: ours from its files, and PEFT's, which has it in memory.

vera: convert_to_lora, which takes a whole SVD. adalora, which it refuses: the delta that PEFT's layer gives, and
that SVD. The changes are compared first. Each side has all cores. Prints JSON.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, PeftModel, VeraConfig, convert_to_lora, get_peft_model
from safetensors.torch import load_file, save_file

from lorasurgery.operations.algebra.convert_options import ConvertOptions
from lorasurgery.operations.convert import convert
from lorasurgery.surgery import RunOptions

RANK = 64
SAME = 1e-4  # of a whole SVD in float32

Pair = tuple[torch.Tensor, torch.Tensor]


class Net(torch.nn.Module):
    """A model of one layer."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.proj = torch.nn.Linear(size, size, bias=False)


def adapted(kind: str, size: int) -> PeftModel:
    """With an adapter that changes something."""
    torch.manual_seed(0)
    configs = {
        "vera": VeraConfig(r=RANK, target_modules=["proj"]),
        "adalora": AdaLoraConfig(
            init_r=RANK, target_r=RANK, total_step=10, target_modules=["proj"]
        ),
    }
    model: Any = get_peft_model(Net(size), configs[kind])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "vera_lambda" in name or "lora_" in name:
                parameter.normal_()
    return model  # type: ignore[no-any-return]


def stored(model: PeftModel, folder: Path) -> tuple[Path, Path]:
    """The base and the adapter, as files."""
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir(parents=True)
    net: Any = model.get_base_model()
    save_file({"proj.weight": net.proj.base_layer.weight.data}, base / "model.safetensors")
    (base / "config.json").write_text("{}")
    model.save_pretrained(str(adapter))
    return base, adapter


def theirs(kind: str, model: PeftModel) -> Pair:
    if kind == "vera":
        _, found = convert_to_lora(model, rank=RANK)
        a, b = (found[f"base_model.model.proj.lora_{end}.weight"] for end in "AB")
        return a, b
    net: Any = model.get_base_model()
    u, s, vt = torch.linalg.svd(net.proj.get_delta_weight("default").detach(), full_matrices=False)
    return vt[:RANK].contiguous(), (u[:, :RANK] * s[:RANK]).contiguous()


def ours(base: Path, adapter: Path, output: Path | None) -> None:
    convert(adapter, output, ConvertOptions(base=base), RunOptions())


def check(wanted: Pair, output: Path) -> None:
    """Both are the same change."""
    found = load_file(output / "adapter_model.safetensors")
    a, b = (found[f"base_model.model.proj.lora_{end}.weight"] for end in "AB")
    config = json.loads((output / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"]
    change = wanted[1] @ wanted[0]
    assert torch.linalg.norm(scale * b @ a - change) <= SAME * torch.linalg.norm(change)


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    kind, repeats, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    times: dict[str, list[float]] = {"ours": [], "peer": []}
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        model = adapted(kind, size)
        base, adapter = stored(model, folder)
        ours(base, adapter, folder / "lora")
        check(theirs(kind, model), folder / "lora")
        for i in range(repeats):
            times["ours"].append(seconds(partial(ours, base, adapter, folder / f"lora{i}")))
            times["peer"].append(seconds(partial(theirs, kind, model)))
    print(json.dumps(times))


if __name__ == "__main__":
    main()
