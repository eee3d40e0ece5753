"""What is asked of a conversion, and what of it does not go together."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from lorasurgery import plugins
from lorasurgery.errors import UsageError
from lorasurgery.operations.activations.calibration import Calibration
from lorasurgery.operations.algebra.adapter_output import AdapterFormat
from lorasurgery.operations.algebra.into import Chosen
from lorasurgery.operations.algebra.mixture import Mixture
from lorasurgery.operations.algebra.nearest import Aim, check_rank
from lorasurgery.operations.algebra.started import Start
from lorasurgery.operations.layouts.layout import Layout


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """`folded`: alpha = rank, the scale in B; `uniform`: one rank for all modules, zeros where it was less.

    `to`: "" keeps each module's variant, where a layout is all that is asked for.
    """

    to: str = "lora"
    layout: Layout = field(default_factory=Layout)
    base: Path | None = None
    aim: Aim = field(default_factory=Aim)
    mixture: Mixture = field(default_factory=Mixture)
    chosen: Chosen = field(default_factory=Chosen)
    start: Start = field(default_factory=Start)
    folded: bool = False
    uniform: bool = False
    allowed_ranks: tuple[int, ...] = ()
    allowed: tuple[str, ...] = ()
    form: AdapterFormat = field(default_factory=AdapterFormat)
    calibration: Calibration | None = None

    def check(self) -> None:
        """Raises UnknownNameError, UsageError or ValueRangeError."""
        if self.to or not self.layout.asked:
            plugins.load("adapters", self.to)
        self.aim.check()
        self.mixture.check()
        self.start.check()
        self.layout.check()
        for rank in self.allowed_ranks:
            check_rank(rank, "--ranks-allowed")
        if self.calibration:
            self._check_calibration(self.calibration)
        if self.padded and self.to != "lora":
            raise UsageError(
                f"--to {self.to or 'VARIANT'}: --uniform-rank and --ranks-allowed are of LoRA. "
                + ("Take them away." if self.to else "Pass --to lora.")
            )

    def _check_calibration(self, calibration: Calibration) -> None:
        calibration.check(self.base)
        if self.layout.asked:
            raise UsageError(
                "--calibrate: runs modules as they are. Convert once more for --projections and --experts."
            )
        if self.start.residual:
            raise UsageError("--calibrate: does not run a residual. Convert once more with it.")
        if not self.cut and not self.mixture.fixed:
            raise UsageError(
                "--calibrate: weighs what is cut off, and nothing is. Pass --rank or --energy."
            )

    @property
    def cut(self) -> bool:
        return self.capped.rank is not None or self.capped.energy is not None

    @property
    def padded(self) -> bool:
        return self.uniform or bool(self.allowed_ranks)

    @property
    def capped(self) -> Aim:
        """No rank above those allowed."""
        if not self.allowed_ranks:
            return self.aim
        most = max(self.allowed_ranks)
        return replace(self.aim, rank=min(self.aim.rank or most, most))

    @property
    def settings(self) -> dict[str, object]:
        return {
            "to": self.to, **self.aim.settings, "bake_scale": self.folded, "uniform_rank": self.uniform,
            "ranks_allowed": list(self.allowed_ranks), "dtype": self.form.dtype, **self.layout.settings,
            **(self.calibration.settings if self.calibration else {}),
        }  # fmt: skip
