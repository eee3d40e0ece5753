"""Whether a tensor's change is W + D, rounded once; and if not, why."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorasurgery.operations.verifying.causes import Diagnosis
from lorasurgery.operations.verifying.measure import Measure
from lorasurgery.operations.verifying.scales import scale_cause
from lorasurgery.target import Target

NEAREST, CHANCE, CODES = "to the nearest", "by chance", "to codes"
# scales that were quantized once more move a few codes of a rounding to the nearest: half a percent,
# as measured; by chance a change of a hundredth of W moves three
_SAME_CODES = 0.98
# 1/12 of a squared gap by rounding to the nearest, at most 1/4 by chance, and 1/12 more where the
# base was quantized itself and its original was merged into
_ROUNDINGS = 4.0


@dataclass(frozen=True, slots=True)
class Judged:
    """`rounding` says what explains the noise, if it is explained."""

    rounding: str
    expected2: float  # ||E||² that this rounding makes

    @property
    def holds(self) -> bool:
        return bool(self.rounding)


@dataclass(frozen=True, slots=True)
class Facts:
    """What may explain a wrong change: whose it should be, and the second look at it."""

    target: Target
    owners: Sequence[str]  # the adapter of each share
    settings: Sequence[Mapping[str, Any]]
    diagnosis: Callable[[], Diagnosis]


def judge_floats(found: Measure, delta_error: float) -> Judged:
    """16 or 32 bits. `delta_error`: the relative error that D itself may have before rounding."""
    chance = found.chance
    # of so many doubtful elements each may fall on either side; without a change there is no doubt
    allowed = found.excused + 6 * math.sqrt(found.excused) + (2 if found.power else 0)
    if not math.isfinite(found.noise2) or found.far:
        return Judged("", found.nearest2)
    if found.differing <= allowed:
        return Judged(NEAREST, found.nearest2)
    if chance and chance.explains(delta_error**2 * found.power):
        off = abs(found.signal - found.power)
        if off <= 6 * math.sqrt(chance.signal_variance) + 2e-3 * found.power:
            return Judged(CHANCE, chance.expected2)
    return Judged("", found.nearest2)


def judge_codes(found: Measure, least: float) -> Judged:
    """A quantized weight: rounded to the nearest codes, or else `least` of the change is in it."""
    expected2 = found.nearest2
    if not math.isfinite(found.noise2):
        return Judged("", expected2)
    nearest = found.differing <= (1 - _SAME_CODES) * found.numel
    rho, slack = found.rho, 4 * found.sigma
    if rho is not None and rho > 2 - least + slack:
        return Judged("", expected2)
    if nearest or (
        found.noise2 <= _ROUNDINGS * expected2 and (rho is None or rho >= least - slack)
    ):
        return Judged(CODES, expected2)
    return Judged("", expected2)


def cause_of(found: Measure, judged: Judged, facts: Facts) -> str:
    """What is wrong with a change that does not hold, in a line."""
    if not math.isfinite(found.noise2):
        return "nan or inf in it"
    rho = found.rho
    if rho is None:
        return f"changed in {found.differing} elements, though the adapter's change is 0"
    diagnosis = facts.diagnosis()
    trial = diagnosis.best(sum(found.left()), found.change2)
    if trial:
        return trial.cause
    shares = _shares(found, facts, diagnosis)
    outside = _outside(found, judged, diagnosis)
    # adapters that are missing, and any other, leave something inside as well
    inside = "" if shares or outside else _inside(found, judged)
    said = [shares or _amount(found, facts), outside, inside]
    return "; ".join(filter(None, said)) or (
        f"{found.differing} of {found.numel} elements are not W + D rounded once"
    )


def _shares(found: Measure, facts: Facts, diagnosis: Diagnosis) -> str:
    """Which of several adapters are not in it once, if they are not all wrong in the same way."""
    times = diagnosis.coefficients
    wrong = [
        f"{owner} is missing" if abs(x) < 0.05 else f"{owner} is in it {x:.3g} times"
        for owner, x in zip(facts.owners, times, strict=False)
        if abs(x - 1) > 0.05 + 4 * found.sigma
    ]
    return ", ".join(wrong) if times and max(times) - min(times) > 0.05 + 8 * found.sigma else ""


def _amount(found: Measure, facts: Facts) -> str:
    """How much of the change is there, if it is not once."""
    rho = found.rho or 0.0
    if abs(rho - 1) <= max(0.02, 4 * found.sigma):
        return ""
    named = scale_cause(facts.target, facts.settings, rho, found.sigma)
    return named or f"rho {rho:.3g} is of no usual mistake"


def _outside(found: Measure, judged: Judged, diagnosis: Diagnosis) -> str:
    """What else is in it, beyond rounding, in directions that the adapter does not have."""
    _, outside2 = found.left()
    if outside2 <= _explained2(found, judged):
        return ""
    share, rank = math.sqrt(outside2 / found.power), diagnosis.effective_rank
    what = f", of a rank about {rank:.0f}" if rank else ""
    return (
        f"a foreign change {share:.3g} times as large lies outside the adapter's subspace{what}: "
        "another adapter, or another base"
    )


def _inside(found: Measure, judged: Judged) -> str:
    inside2, _ = found.left()
    if inside2 <= _explained2(found, judged):
        return ""
    share = math.sqrt(inside2 / found.power)
    return f"a foreign change {share:.3g} times as large lies in the adapter's own subspace"


def _explained2(found: Measure, judged: Judged) -> float:
    """Twice what rounding makes, and what float32 sums cannot tell from nothing."""
    return 2 * judged.expected2 + 1e-5 * max(found.power, found.change2)
