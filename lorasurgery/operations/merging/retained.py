"""Retained signal: of an intended change D, how much is in W' - W, and how much else is.

retained = <W' - W, D> / ||D||², noise = ||W' - W - D|| / ||D||.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lorasurgery.edit import Metrics
from lorasurgery.report import Result


@dataclass(slots=True)
class Sums:
    """Over the tiles of a tensor, or over tensors."""

    signal: float = 0.0  # <W' - W, D>
    power: float = 0.0  # ||D||²
    noise2: float = 0.0  # ||W' - W - D||²

    def add(self, signal: float, power: float, noise2: float) -> None:
        self.signal += signal
        self.power += power
        self.noise2 += noise2

    @property
    def retained(self) -> float:
        """1 where nothing was to be changed."""
        return self.signal / self.power if self.power else 1.0

    @property
    def noise(self) -> float:
        return math.sqrt(self.noise2 / self.power) if self.power else 0.0

    @property
    def finite(self) -> bool:
        return math.isfinite(self.signal + self.power + self.noise2)

    def metrics(self) -> dict[str, float]:
        return {
            "retained": self.retained, "noise": self.noise,
            "signal": self.signal, "power": self.power, "noise2": self.noise2,
        }  # fmt: skip


def total(results: Iterable[Result]) -> Sums:
    """Over all tensors, each weighed by the size of its change."""
    sums = Sums()
    for result in results:
        sums.add(*_of(result.metrics))
    return sums


def _of(metrics: Metrics | Mapping[str, float]) -> tuple[float, float, float]:
    return metrics.get("signal", 0.0), metrics.get("power", 0.0), metrics.get("noise2", 0.0)
