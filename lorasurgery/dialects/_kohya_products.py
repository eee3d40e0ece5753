"""LyCORIS' LoHa and LoKr in kohya's files: `.hada_*` and `.lokr_*`.

Beside a core (`hada_t1`, `lokr_t2`) B lies on its side: [r, out]. alpha / r scales both once, as LyCORIS'
forward does; a LoKr whose parts are both whole is not scaled at all (its file repeats the rank as alpha).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from lorasurgery.adapter import AdapterConfig, Site
from lorasurgery.checkpoint import Checkpoint
from lorasurgery.problems import Problem
from lorasurgery.tensors import TensorInfo

if TYPE_CHECKING:
    from lorasurgery.arrays import Array

# a key's end -> the factor of the variant
FACTORS = {
    "loha": {
        "hada_w1_a": "B1", "hada_w1_b": "A1", "hada_w2_a": "B2", "hada_w2_b": "A2",
        "hada_t1": "T1", "hada_t2": "T2",
    },
    "lokr": {
        "lokr_w1": "W1", "lokr_w1_a": "W1A", "lokr_w1_b": "W1B", "lokr_w2": "W2",
        "lokr_w2_a": "W2A", "lokr_w2_b": "W2B", "lokr_t2": "T2",
    },
}  # fmt: skip

# a factor -> the core beside which it lies on its side
_SIDEWAYS = {"loha": {"B1": "T1", "B2": "T2"}, "lokr": {"W2A": "T2"}}


def site(
    source: Checkpoint,
    module: str,
    variant: str,
    roles: Mapping[str, str],
    alpha: Callable[[int], float],
) -> Site | Problem:
    """One adapted module, or why it is none. roles: factor -> key; alpha: of a rank."""
    some = next(iter(roles.values()))
    missing = [name for name in _wanted(variant, roles) if name not in roles]
    if missing:
        ends = {factor: end for end, factor in FACTORS[variant].items()}
        return Problem(some, f"{some} stands alone: {ends[missing[0]]} of {module} is missing")
    infos = {name: source.info(key) for name, key in roles.items()}
    shapes = {
        name: info.shape[::-1] if sideways(variant, name, roles) else info.shape
        for name, info in infos.items()
    }
    rank = _rank(variant, shapes)
    if rank is None:
        said = ", ".join(f"{i.name.rpartition('.')[2]} {list(i.shape)}" for i in infos.values())
        return Problem(some, f"{module}: {said} are no factors of one {variant}")
    sides, kernel = _size(variant, shapes)
    extra = {"kernel": kernel} if variant == "loha" and kernel else {}
    config = AdapterConfig(variant, rank, alpha(rank), extra=extra)
    if unscaled(variant, roles):
        config = AdapterConfig(variant, rank, float(rank))
    facts = {name: TensorInfo(roles[name], "F32", shape) for name, shape in shapes.items()}

    def load() -> dict[str, Array]:
        import numpy as np

        found = {name: source.read(key).astype(np.float32) for name, key in roles.items()}
        return {n: f.T.copy() if sideways(variant, n, roles) else f for n, f in found.items()}

    return Site(module, "weight", "linear", config, facts, load, kernel, sides=sides)


def decomposed(source: Checkpoint, plain: Site, key: str) -> Site | Problem:
    """The same change under DoRA's gain, by the magnitudes in `key`: [out, 1, ...] or [1, channels, ...]."""
    info, (out, in_) = source.info(key), plain.sides
    rows = info.shape == (out, *(1 for _ in info.shape[1:]))
    # a convolution's flat factors do not tell its kernel
    channels = in_ if len(info.shape) == 2 else info.numel
    columns = info.shape[:2] == (1, channels) and not (in_ or 0) % max(1, info.numel)
    if len(info.shape) < 2 or not (rows or columns):
        return Problem(
            key,
            f"{plain.module}: magnitudes {list(info.shape)} are neither of the rows nor of the columns of "
            f"[{out}, {in_}]",
        )
    shape = (info.numel, 1) if rows else (1, info.numel)

    def load() -> dict[str, Array]:
        import numpy as np

        return {**plain.load(), "m": source.read(key).astype(np.float32).reshape(shape)}

    extra = {**plain.config.extra, "of": plain.config.variant, "dimensions": len(info.shape)}
    config = replace(plain.config, variant="decomposed", extra=extra)
    facts = {**plain.factors, "m": TensorInfo(key, "F32", shape)}
    return replace(plain, config=config, factors=facts, load=load)


def sideways(variant: str, name: str, names: Mapping[str, object]) -> bool:
    """Whether a factor lies on its side in the file."""
    return _SIDEWAYS[variant].get(name) in names


def unscaled(variant: str, names: Mapping[str, object]) -> bool:
    """Whether nobody scales these factors."""
    return variant == "lokr" and "W1" in names and "W2" in names


def _wanted(variant: str, roles: Mapping[str, object]) -> list[str]:
    if variant == "loha":
        cores = ["T1", "T2"] if {"T1", "T2"} & roles.keys() else []
        return ["B1", "A1", "B2", "A2", *cores]
    return [n for w in ("W1", "W2") for n in ((w,) if w in roles else (f"{w}A", f"{w}B"))]


def _rank(variant: str, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """The rank on which all factors agree; 1 where there is none; None if they do not fit together."""
    pairs = {"loha": (("B1", "A1"), ("B2", "A2")), "lokr": (("W1A", "W1B"), ("W2A", "W2B"))}
    flat = [shape for name, shape in shapes.items() if name not in ("T1", "T2", "W2")]
    if any(len(shape) != 2 for shape in flat):
        return None
    if "W2" in shapes and len(shapes["W2"]) < 2:
        return None
    found = {n for b, a in pairs[variant] if b in shapes for n in (shapes[b][1], shapes[a][0])}
    found |= {n for name, s in shapes.items() if name in ("T1", "T2") for n in s[:2]}
    if variant == "loha" and [shapes[n] for n in ("B1", "A1")] != [shapes[n] for n in ("B2", "A2")]:
        return None
    return None if len(found) > 1 or 0 in found else next(iter(found), 1)


def _size(
    variant: str, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[tuple[int, int], tuple[int, ...]]:
    """W's out and in, a convolution's flat, and its kernel as far as the factors tell."""
    kernel = next((shapes[t][2:] for t in ("T1", "T2") if t in shapes), ())
    if variant == "loha":
        return (shapes["B1"][0], shapes["A1"][1] * math.prod(kernel)), kernel
    kernel = shapes["W2"][2:] if "W2" in shapes else kernel
    out, in_ = 1, math.prod(kernel)
    for w in ("W1", "W2"):
        rows, columns = (w, w) if w in shapes else (f"{w}A", f"{w}B")
        out, in_ = out * shapes[rows][0], in_ * shapes[columns][1]
    return (out, in_), kernel
