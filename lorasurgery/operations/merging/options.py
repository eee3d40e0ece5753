"""How to merge: what is added to what, in which dtype, rounded how, and what may not be lost."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from lorasurgery.errors import UsageError
from lorasurgery.model import Model
from lorasurgery.operations.merging.edits import Rounding
from lorasurgery.operations.merging.requantize import POLICIES

MIN_RETAINED = 0.9
VIEWS = ("dequantized", "original")


@dataclass(frozen=True, slots=True)
class MergeOptions:
    """The options of `merge`.

    Attributes:
        dtype: of the output's float tensors, a key of BITS; None for each tensor's own.
        tied: what becomes of an output head that is stored as the embedding (`tied.POLICIES`).
        allowed: globs over adapter keys and config fields that may be left out.
        view: of a quantized base, 'dequantized' (what a QLoRA adapter saw) or 'original'.
        original: the 16-bit model that the quantized base was made of.
        policy: how to quantize again (`POLICIES`); None writes 16 bits.
        rank: of the residual adapter.
        rounding: of the output; its seed is also that of policy 'stochastic'.
        min_retained: below it the command stops; None asks for 0.9 of quantized outputs alone.
        undo: the file that will bring the base back byte for byte.

    """

    dtype: str | None = None
    tied: str = "auto"
    allowed: tuple[str, ...] = ()
    view: str = "dequantized"
    original: Path | None = None
    policy: str | None = None
    rank: int = 16
    rounding: Rounding = field(default_factory=Rounding)
    min_retained: float | None = None
    undo: Path | None = None

    @property
    def wanted(self) -> float:
        return MIN_RETAINED if self.min_retained is None else self.min_retained

    @property
    def threshold(self) -> float | None:
        """What stops the command, rather than being warned of; 0 asks for nothing."""
        asked = self.min_retained is not None or self.policy is not None
        return self.wanted if asked and self.wanted > 0 else None

    @property
    def settings(self) -> dict[str, object]:
        """For surgery.json, and for the plan's identity."""
        return {
            "dtype": self.dtype, "tied": self.tied, "allow_unmatched": list(self.allowed),
            "base_view": self.view, "requantize": self.policy,
            "rank": self.rank if self.policy == "residual" else None,
            "seed": self.rounding.seed, "undo": str(self.undo) if self.undo else None,
        }  # fmt: skip

    def check(self, model: Model) -> None:
        """Raises UsageError for options that do not go together, or not with this base."""
        policy, packed = self.policy, model.weights.packed
        if policy is not None and policy not in POLICIES:
            raise UsageError(f"--requantize {policy}: unknown. Known: {', '.join(POLICIES)}.")
        if self.view not in VIEWS:
            raise UsageError(f"--base-view {self.view}: unknown. Known: {', '.join(VIEWS)}.")
        if (policy or self.view == "original") and not packed:
            flag = f"--requantize {policy}" if policy else "--base-view original"
            raise UsageError(f"{flag}: {model.path} is not quantized. Leave it out.")
        needs = policy == "from-original" or self.view == "original"
        if needs and self.original is None:
            flag = "--requantize from-original" if policy else "--base-view original"
            raise UsageError(f"{flag}: names no original. Pass --original DIR.")
        if self.original and not needs:
            raise UsageError(
                "--original: nothing reads it. Add --base-view original or --requantize "
                "from-original."
            )
        if policy and self.view == "original":
            raise UsageError(
                f"--base-view original with --requantize {policy}: say --requantize from-original."
            )
        if policy and self.dtype:
            raise UsageError("--dtype with --requantize: the output is quantized. Choose one.")
        if policy == "stochastic" and self.rounding.seed is None:
            raise UsageError("--requantize stochastic: needs --seed N, so that it can be repeated.")
        if policy == "residual" and self.rank < 1:
            raise UsageError(f"--rank {self.rank}: is not positive. Take 16, say.")
        _refuse_fp4(model, policy)
        _refuse_turned(model, policy, self.undo)


def _refuse_fp4(model: Model, policy: str | None) -> None:
    first = next((p for p in model.weights.packed.values() if p.state["quant_type"] != "nf4"), None)
    if policy and first:
        raise UsageError(
            f"--requantize {policy}: {first.info.name} is {first.state['quant_type']}, which is read "
            "but not written. Merge into 16 bits."
        )


def _refuse_turned(model: Model, policy: str | None, undo: Path | None) -> None:
    """Codes of [out, in] cannot be tiled by rows of [in, out]."""
    if model.weights.turned and (policy or undo):
        flag = f"--requantize {policy}" if policy else "--undo"
        raise UsageError(
            f"{flag}: {model.path} packs Conv1D weights as [out, in]. Merge into 16 bits without "
            "it, or into the 16-bit original."
        )
