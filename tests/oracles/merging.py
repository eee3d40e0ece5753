"""Adapters as PEFT saves them, PEFT's own merge, and what a merged weight is measured by.

Sizes hide nothing: alpha != rank, factors random.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from tiny import Base, tensors
from torch import Tensor
from transformers import PreTrainedModel
from typer.testing import CliRunner, Result

RANK, ALPHA = 3, 5.0
SCALE = ALPHA / RANK


def surgery(*arguments: object) -> Result:
    """The command line in this process."""
    from lorasurgery.cli.app import app

    return CliRunner().invoke(app, [str(a) for a in arguments])


def done(*arguments: object) -> Result:
    """The command line, which must succeed."""
    result = surgery(*arguments)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.stderr
    return result


def make_adapter(
    base: Base, path: Path, *, seed: int = 1, auto: Any = None, binary: bool = False, **config: Any
) -> Path:
    """Let PEFT make an adapter for the base, fill what it would train with numbers, and save it."""
    settings = LoraConfig(**{"r": RANK, "lora_alpha": ALPHA} | config)
    model = (auto or base.auto).from_pretrained(base.path, dtype=base.dtype)
    adapted = get_peft_model(model, settings)
    torch.manual_seed(seed)
    for name, p in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p, std=0.2)
        elif p.requires_grad:
            p.data += 0.1 * torch.randn_like(p)
    adapted.save_pretrained(path, safe_serialization=not binary)
    return path


def unmerged_by_peft(base: Base, adapter: Path) -> PeftModel:
    """The model as it is trained: base and adapter side by side."""
    return PeftModel.from_pretrained(base.load(), adapter).eval()


def merged_by_peft(base: Base, *adapters: tuple[Path, float]) -> PreTrainedModel:
    """PEFT's merge_and_unload, the adapters one after the other, each scaled."""
    model: Any = base.load()
    for i, (path, weight) in enumerate(adapters):
        if i == 0:
            model = PeftModel.from_pretrained(model, path, adapter_name="0")
        else:
            model.load_adapter(path, adapter_name=str(i))
        for module in model.modules():
            if hasattr(module, "set_scale"):
                module.set_scale(str(i), weight)
    merged: PreTrainedModel = model.merge_and_unload(
        adapter_names=[str(i) for i in range(len(adapters))]
    )
    return merged.eval()


def factors(adapter: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B by module path, read from the adapter's file."""
    stored = tensors(adapter)
    return {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): (
            a, stored[name.replace("lora_A", "lora_B")],
        )
        for name, a in stored.items() if name.endswith(".lora_A.weight")
    }  # fmt: skip


def same_weights(ours: PreTrainedModel, theirs: PreTrainedModel) -> None:
    """The same parameters, but for the order in which float32 sums."""
    wanted = dict(theirs.named_parameters())
    found = dict(ours.named_parameters())
    assert found.keys() == wanted.keys()
    for name, w in wanted.items():
        torch.testing.assert_close(found[name], w, rtol=1e-6, atol=1e-6, msg=name)


def changes(adapter: Path, scale: float = SCALE) -> dict[str, Tensor]:
    """s · B A in float64 by the weight's name: exact, as far as float32 sums are concerned."""
    return {
        f"{module}.weight": scale * b.double() @ a.double()
        for module, (a, b) in factors(adapter).items()
    }


def rounded_once(found: Tensor, w: Tensor, delta: Tensor) -> None:
    """No farther from the exact sum than the nearest value, but for the error of float32 products."""
    exact = w.double() + delta
    nearest = exact.to(found.dtype).double()
    # RANK products and as many sums, each off by at most 2^-24 of the largest term
    slack = 2.0**-21 * (w.double().abs() + delta.abs() + delta.abs().max())
    too_far = (found.double() - exact).abs() > (nearest - exact).abs() + slack
    assert not too_far.any(), f"{int(too_far.sum())} of {found.numel()}"


def shrink(adapter: Path, base: Base, part: float) -> Path:
    """Scale B so that each change has this part of its weight's norm."""
    stored, weights = tensors(adapter), tensors(base.path)
    for name, delta in changes(adapter).items():
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_B.weight"
        stored[key] = stored[key] * (part * weights[name].double().norm() / delta.norm())
    save_file(
        {name: t.float() for name, t in stored.items()},
        adapter / "adapter_model.safetensors",
        {"format": "pt"},
    )
    return adapter


def retained(
    before: dict[str, Tensor], after: dict[str, Tensor], delta: dict[str, Tensor]
) -> float:
    """<W' - W, D> / <D, D> over all weights."""
    got = sum(
        ((after[name].double() - before[name].double()) * d).sum() for name, d in delta.items()
    )
    return float(got / sum((d * d).sum() for d in delta.values()))
