"""One tensor of the merged model held against what it should be."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from lorasurgery.change import Change, LowRank
from lorasurgery.layouts import EMBEDDINGS, HEADS
from lorasurgery.operations.verifying.causes import Diagnosis, diagnose
from lorasurgery.operations.verifying.compare import differing, differing_parts, differing_whole
from lorasurgery.operations.verifying.expected import Expected
from lorasurgery.operations.verifying.measure import DELTA_ERROR, Measure, measure
from lorasurgery.operations.verifying.pairs import Pair
from lorasurgery.operations.verifying.verdict import (
    Facts,
    Judged,
    cause_of,
    judge_codes,
    judge_floats,
)
from lorasurgery.target import Target
from lorasurgery.tensors import FLOATS


@dataclass(frozen=True, slots=True)
class Finding:
    """What became of one tensor. Numbers are relative to ||D||, None where no change was intended.

    role: adapted, added (a bias), replaced, requantized, untouched, tied (left out), missing or extra.
    """

    tensor: str
    role: str
    holds: bool
    cause: str = ""  # why it does not hold
    rho: float | None = None
    noise: float | None = None
    expected: float | None = None  # the noise that rounding explains
    inside: float | None = None  # of W' - W - rho D
    outside: float | None = None
    rounding: str = ""
    signal: float = 0.0  # sums from which totals are made
    power: float = 0.0
    noise2: float = 0.0


def check(expected: Expected, name: str, least: float) -> Finding:
    """Compare one tensor, named as in the merged model; `least` must be kept of a change in codes."""
    if name not in expected.merged.weights:
        twin = _is_twin(expected, name)
        cause = "" if twin else "missing: the base has it"
        return Finding(name, "tied" if twin else "missing", holds=twin, cause=cause)
    source = expected.source(name)
    if name in expected.replaced:
        return _replaced(expected, name, source)
    if source is None:
        return Finding(name, "extra", holds=False, cause="extra: the base has no such tensor")
    shapes = [
        list(expected.base.weights.info(source).shape),
        list(expected.merged.weights.info(name).shape),
    ]
    if shapes[0] != shapes[1]:
        cause = f"is {shapes[1]}, but {shapes[0]} in the base"
        return Finding(name, _role(expected, name), holds=False, cause=cause)
    finding = _changed(expected, name, source, least)
    if finding.holds and name in expected.origin and _tied_by_config(expected):
        cause = "config.json ties it to the embedding, so that it is never read"
        return replace(finding, holds=False, cause=f"{cause}: tie_word_embeddings must be false")
    return finding


def _is_twin(expected: Expected, name: str) -> bool:
    """Whether a head may be left out: the base stores its embedding twice, and the config ties them."""
    base = expected.base.weights
    embedding = next((n for n in base if n.endswith(EMBEDDINGS)), None)
    if not name.endswith(HEADS) or embedding is None or not _tied_by_config(expected):
        return False
    same = replace(base.info(name), name=embedding) == base.info(embedding)
    return name not in expected.changed and same and not differing(base, name, base, embedding)


def _role(expected: Expected, name: str) -> str:
    if name in expected.added:
        return "added"
    return "adapted" if name in expected.changed else "untouched"


def _tied_by_config(expected: Expected) -> bool:
    config = expected.merged.config
    return bool(config) and config.get("tie_word_embeddings") is not False


def _replaced(expected: Expected, name: str, source: str | None) -> Finding:
    """modules_to_save and biases: the adapter's own tensor."""
    whole, info = expected.replaced[name], expected.merged.weights.info(name)
    if info.shape != whole.info.shape:
        cause = f"is {list(info.shape)}, but {list(whole.info.shape)} in the adapter"
        return Finding(name, "replaced", holds=False, cause=cause)
    base, merged = expected.base.weights, expected.merged.weights
    count = differing_whole(whole, merged, name)
    if not count:
        return Finding(name, "replaced", holds=True)
    cause = f"{count} of {info.numel} elements are not the adapter's"
    if source is not None and base.info(source).shape == info.shape:
        same = not differing(base, source, merged, name)
        cause = "missing: it is the base's, not the adapter's" if same else cause
    return Finding(name, "replaced", holds=False, cause=cause)


def _changed(expected: Expected, name: str, source: str, least: float) -> Finding:
    """A tensor with an intended change, or none."""
    base, merged = expected.base.weights, expected.merged.weights
    role, change = _role(expected, name), expected.change(name)
    if change is None:
        count = _differing(expected, name, source)
        if count == 0:
            return Finding(name, role, holds=True)
        if count is not None:
            numel = merged.info(name).numel
            cause = f"changed in {count} of {numel} elements, though no adapter touches it"
            return Finding(name, role, holds=False, cause=cause)
        role, change = "requantized", LowRank.nothing(merged.info(name))
    for dtype in (base.info(source).dtype, merged.info(name).dtype):
        if dtype not in FLOATS:
            cause = f"is {dtype}, in which no change is understood"
            return Finding(name, role, holds=False, cause=cause)
    pair = Pair(base, source, merged, name, expected.scale(name))
    residual = expected.residual.get(name)
    beside = residual.change() if residual else None
    assert beside is None or isinstance(beside, LowRank)
    found = measure(pair, change, beside)
    if pair.packed:
        judged = judge_codes(found, least)
    else:
        judged = judge_floats(found, DELTA_ERROR[merged.info(name).dtype])
    cause = "" if judged.holds else _cause(expected, pair, change, found, judged)
    return _finding(name, role, cause, found, judged)


def _differing(expected: Expected, name: str, source: str) -> int | None:
    """In how many elements an untouched tensor differs; None if only its quantization can be judged."""
    base, merged = expected.base.weights, expected.merged.weights
    if name not in merged.packed:
        return differing(base, source, merged, name)
    return differing_parts(base, merged, name) if name in base.packed else None


def _cause(expected: Expected, pair: Pair, change: Change, found: Measure, judged: Judged) -> str:
    target = expected.changed.get(pair.new, Target(pair.new, ()))
    owners = [expected.owner(share) for share in target.shares]

    def mistakes() -> Diagnosis:
        # of a change that no small factors make, layouts and coefficients are not tried
        return diagnose(pair, target, change, found) if isinstance(change, LowRank) else Diagnosis()

    facts = Facts(target, owners, expected.settings, mistakes)
    return cause_of(found, judged, facts)


def _finding(name: str, role: str, cause: str, found: Measure, judged: Judged) -> Finding:
    finding = Finding(
        name, role, judged.holds, cause, rounding=judged.rounding,
        signal=found.signal, power=found.power, noise2=found.noise2,
    )  # fmt: skip
    if not found.power:
        return finding
    inside2, outside2 = found.left()
    noise, expected, inside, outside = (
        math.sqrt(x / found.power) for x in (found.noise2, judged.expected2, inside2, outside2)
    )
    return replace(
        finding, rho=found.rho, noise=noise, expected=expected, inside=inside, outside=outside
    )
