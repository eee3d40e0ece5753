"""A text that stands for what a model is used for: which tokens of it, and in which windows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lorasurgery.errors import FormatError, UsageError, ValueRangeError

if TYPE_CHECKING:
    from torch import Tensor

    from lorasurgery.operations._language_model import LanguageModel


@dataclass(frozen=True, slots=True)
class Calibration:
    """The first `tokens` of a text, read in windows without overlap, as `evaluate` reads one."""

    text: Path
    window: int = 512
    tokens: int = 8192

    def check(self, base: Path | None) -> None:
        """Raises UsageError without a base to run, ValueRangeError for windows of nothing."""
        if base is None:
            raise UsageError("--calibrate: runs the base on the text. Pass --base DIR.")
        if self.window < 2:
            raise ValueRangeError(f"--window {self.window}: is too short. Pass 2 or more.")
        if self.tokens < 2:
            raise ValueRangeError(f"--tokens {self.tokens}: is too few. Pass 2 or more.")

    def read(self, model: LanguageModel) -> Tensor:
        """Tokens int64 [n]. Raises FormatError for a text of less than two, or of bytes that are none."""
        try:
            text = self.text.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise FormatError(
                f"{self.text}: byte {error.start} is not UTF-8. Pass --calibrate a text."
            ) from None
        found = model.encode(text)[: self.tokens]
        if len(found) < 2:
            raise FormatError(
                f"{self.text}: is {len(found)} tokens long, too short to calibrate with. Give more."
            )
        return found

    @property
    def settings(self) -> dict[str, object]:
        return {"calibrate": str(self.text), "window": self.window, "tokens": self.tokens}


def inputs_of(adapter: Path, base: Path | None, calibration: Calibration | None) -> dict[str, Path]:
    """What an operation on an adapter reads, by its role."""
    found = {"adapter": adapter, "base": base, "text": calibration.text if calibration else None}
    return {role: path for role, path in found.items() if path}
