"""What `export` may write: each target is a file of this folder, and this is what it offers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from lorasurgery.model import Model
from lorasurgery.operations.quantize_onnx import OnnxQuantizeOptions
from lorasurgery.report import Report
from lorasurgery.surgery import RunOptions

Weights = Literal["fp32", "fp16", "nf4", "int4", "int8"]
Provider = Literal["cpu", "cuda", "dml", "webgpu"]


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """`quantize` says how, for nf4 and integers; adapters are merged before, or are inputs of the graph."""

    weights: Weights = "fp32"
    adapters: tuple[str, ...] = ()
    allowed: tuple[str, ...] = ()
    quantize: OnnxQuantizeOptions | None = None
    to: str = "onnx"
    provider: Provider = "cpu"
    as_inputs: bool = False

    @property
    def settings(self) -> dict[str, object]:
        how = self.quantize.settings if self.quantize else {}
        return {
            **how, "to": self.to, "weights": self.weights, "adapters": list(self.adapters),
            "provider": self.provider, "adapters_as_inputs": self.as_inputs,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Made:
    """What was done, and the side files that travel along, by name; what the target wrote itself wins."""

    report: Report
    files: Mapping[str, Path]


class Target(Protocol):
    """One kind of output."""

    def check(self, model: Model, options: ExportOptions) -> None:
        """Raise before anything is made, if it cannot be."""

    def make(
        self, model: Model, scratch: Path, target: Path, options: ExportOptions, how: RunOptions
    ) -> Made:
        """Write into `target` what the output is to hold; `scratch` is thrown away."""
        ...
