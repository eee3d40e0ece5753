"""Adapters of PEFT's other types, as PEFT makes, saves and merges them; and a network of convolutions."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import Base
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """An adapter on a kind of model, and some modules whose weights must be seen to change."""

    name: str
    kind: str
    config: PeftConfig
    changes: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.kind}, {self.name}"


class Convolutions(nn.Module):
    """1 x 1, 3 x 3, in groups, and a Linear at the end; in != out throughout."""

    def __init__(self) -> None:
        super().__init__()
        self.point = nn.Conv2d(4, 12, 1)
        self.square = nn.Conv2d(12, 20, 3, padding=1)
        self.grouped = nn.Conv2d(20, 10, (3, 3), groups=2, bias=False)
        self.line = nn.Conv1d(10, 14, 3)
        self.head = nn.Linear(14, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(self.square(self.point(x).relu()).relu()).relu()
        return self.head(self.line(x.flatten(2)).mean(-1))


class ConvolutionsBase(Base):
    """As Base, for what transformers does not know."""

    def load(self, path: Path | None = None) -> Any:
        model = Convolutions()
        model.load_state_dict(load_file((path or self.path) / "model.safetensors"))
        return model.eval()


def convolutions(path: Path) -> Base:
    torch.manual_seed(0)
    path.mkdir()
    save_file(Convolutions().state_dict(), path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps({"model_type": "convolutions"}))
    return ConvolutionsBase(path, None, torch.float32)


PIXELS = torch.linspace(-1, 1, 2 * 4 * 7 * 7).reshape(2, 4, 7, 7)


def make(base: Base, path: Path, config: PeftConfig, *, size: float = 0.2, seed: int = 1) -> Path:
    """Let PEFT make an adapter, move all that it would train by chance, and save it."""
    torch.manual_seed(seed)
    adapted: Any = get_peft_model(base.load(), config)
    for p in adapted.parameters():
        if p.requires_grad:
            p.data += size * torch.randn_like(p)
    adapted.save_pretrained(path)
    return path


def merged_by_peft(base: Base, adapter: Path) -> Any:
    return PeftModel.from_pretrained(base.load(), adapter).merge_and_unload().eval()


def same_parameters(found: Any, wanted: Any, tolerance: float = 1e-6) -> None:
    """The same, but for the order in which float32 sums."""
    theirs, ours = dict(wanted.named_parameters()), dict(found.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, w in theirs.items():
        torch.testing.assert_close(ours[name], w, rtol=tolerance, atol=tolerance, msg=name)
