"""Which of a report's numbers are shown, under which title and how: the one place that says it.

A metric that is not named here is shown under its own name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lorasurgery.cli._sizes import show_bytes, show_count


@dataclass(frozen=True, slots=True)
class Column:
    """`worst` picks the number that a folded row must not hide; without it the row has the sum."""

    title: str
    show: Callable[[float], str]
    worst: Callable[[list[float]], float] | None = max


def _percent(x: float) -> str:
    return f"{100 * x:.3g} %"


def _number(x: float) -> str:
    return f"{x:.4g}"


def _count(x: float) -> str:
    return f"{x:.0f}"


def _fixed(x: float) -> str:
    return f"{x:.3f}"


def _yes(x: float) -> str:
    return "yes" if x == 1 else "no"


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _farthest_from_one(values: list[float]) -> float:
    return max(values, key=lambda x: abs(x - 1))


COLUMNS = {
    "relative_error": Column("relative error", _percent),
    "max_error": Column("max error", _number),
    "parameters": Column("parameters", show_count, None),
    "decoded": Column("parameters", show_count, None),
    "bits_per_parameter": Column("bits per parameter", _fixed),
    "retained": Column("retained", _fixed, _farthest_from_one),
    "noise": Column("noise", _fixed),
    "retained_signal": Column("retained", _fixed, _farthest_from_one),
    "rank": Column("rank", _number),
    "rank_before": Column("rank before", _number),
    "difference": Column("difference", _percent),
    "share": Column("explained", _percent, min),
    "explained": Column("explained by all", _percent),
    "coefficient": Column("coefficient", _fixed),
    "exact_form": Column("exact", _yes, min),
    "exact_modules": Column("exact", _number),
    "weight_error": Column("error of W'", _percent),
    "output_error": Column("error of outputs", _percent),
    "output_energy": Column("energy of outputs kept", _percent, min),
    "unweighted_error": Column("relative error, unweighted", _percent),
    "unweighted_output_error": Column("error of outputs, unweighted", _percent),
    "importance": Column("importance", _percent, None),
    "kept": Column("kept", _number, None),
    "kept_modules": Column("kept", _number),
    "mixture_error": Column("error, of the mixture", _percent),
    "angle_in": Column("angle in", _fixed, min),
    "angle_out": Column("angle out", _fixed, min),
    "energy": Column("energy kept", _percent, min),
    "replaced": Column("replaced", show_count, None),
    "restored": Column("restored", show_count, None),
    "change_norm": Column("‖ΔW‖", _number, _mean),
    # totals alone
    "trained_parameters": Column("trained parameters", _count, None),
    "base_parameters": Column("base parameters", _count, None),
    "packed_bytes": Column("packed weights", show_bytes, None),
    "saved_bytes": Column("kept for backward", show_bytes, None),
    "saved_bytes_of_base": Column("  by the base alone", show_bytes, None),
    "saved_bytes_of_adapter": Column("  for the adapter", show_bytes, None),
    "saved_bytes_as_lora": Column("  with A and B trained", show_bytes, None),
    "saved_bytes_of_lora_adapter": Column("  for that adapter", show_bytes, None),
    "saved_share": Column("kept, of what LoRA keeps", _percent),
    "saved_share_of_adapter": Column("  for the adapter", _percent),
    "tokens": Column("tokens", _count, None),
    "steps": Column("steps", _count, None),
    "best_step": Column("best step", _count, None),
    "others": Column("other tensors", _number, None),
    "exact": Column("tensors with the base's hash", _number, None),
    "expected_error": Column("expected error, of the change", _percent),
    "bits_per_quantized_parameter": Column("bits per quantized parameter", _fixed),
    "quantized_parameters": Column("quantized parameters", show_count, None),
    "bytes": Column("size", show_bytes, None),
    "tensors": Column("tensors", _number, None),
}

# sums from which totals are made; --json has them
HIDDEN = {
    "error2", "norm2", "signal", "power", "noise2", "output2", "output_error2", "output_norm2",
    "unweighted_error2", "unweighted_output_error2",
}  # fmt: skip

# what is said of the whole, before all else
TOTALS_FIRST = ("tensors", "modules", "retained", "noise", "relative_error", "max_error")


def column(metric: str) -> Column:
    """How this metric is shown."""
    return COLUMNS.get(metric) or Column(metric.replace("_", " "), _number)
