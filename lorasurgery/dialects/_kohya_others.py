"""LyCORIS' other forms in kohya's files: `.oft_blocks`, `.diff`, `.a1.weight` (GLoRA), `.on_input` (IA3), norms.

A whole difference is a LoKr of [1] and itself. A difference of a bias or a norm is added.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from lorasurgery.adapter import AdapterConfig, Site
from lorasurgery.checkpoint import Checkpoint
from lorasurgery.dialects._pair_write import loader
from lorasurgery.errors import MatchError
from lorasurgery.problems import Problem
from lorasurgery.tensors import TensorInfo

if TYPE_CHECKING:
    from lorasurgery.arrays import Array
    from lorasurgery.dialects._peft_lora_write import Stored

# what a key of each form ends with -> the factor of the variant
FORMS: Mapping[str, Mapping[str, str]] = {
    "diag_oft": {"oft_blocks": "Q", "rescale": "l"},
    "glora": {
        "a1.weight": "A1", "a2.weight": "A2", "b1.weight": "B1", "b2.weight": "B2", "bm.weight": "core",
    },
    "ia3": {"weight": "l", "on_input": "side"},
    "lokr": {"diff": "W2"},
}  # fmt: skip
# what is added to a module's parameter
ADDED = {"diff_b": "bias", "b_norm": "bias", "w_norm": "weight"}
_NEEDED = {
    "diag_oft": ("oft_blocks",), "glora": ("a1.weight", "a2.weight", "b1.weight", "b2.weight"),
    "ia3": ("weight", "on_input"), "lokr": ("diff",),
}  # fmt: skip


def site(
    source: Checkpoint, module: str, ends: Mapping[str, str], alpha: Callable[[int], float]
) -> Site | Problem | None:
    """The module that one of these forms adapts, or why it is none; None for other forms' keys."""
    form = next((f for f, of in FORMS.items() if of.keys() & ends.keys()), None)
    if form is None:
        return None
    strange = sorted(ends.keys() - FORMS[form].keys() - {"alpha"})
    some = next(key for end, key in ends.items() if end in FORMS[form])
    if strange:
        raise MatchError(
            f"{ends[strange[0]]}: stands beside {some}, and nobody here knows what the two mean "
            "together. Merge it with LyCORIS."
        )
    missing = [end for end in _NEEDED[form] if end not in ends]
    if missing:
        return Problem(some, f"{some} stands alone: {missing[0]} of {module} is missing")
    infos = {FORMS[form][end]: source.info(key) for end, key in ends.items() if end in FORMS[form]}
    found = _MAKERS[form](source, module, infos, alpha)
    if found is None:
        said = ", ".join(f"{i.name.partition('.')[2]} {list(i.shape)}" for i in infos.values())
        return Problem(some, f"{module}: {said} are no factors of one {form}")
    return found


def stored(site: Site, name: str) -> Iterator[Stored]:
    """A site's tensors as its form has them, for those variants that have no other."""
    variant, config = site.config.variant, site.config
    ends = {factor: end for end, factor in FORMS[variant].items()}
    ones = tuple(1 for _ in site.kernel)
    for factor, info in site.factors.items():
        shape = info.shape
        if variant == "ia3":
            shape = (1, info.numel, *ones) if site.kernel else (info.numel,)
            key = TensorInfo(f"{name}.weight", "F32", shape)
            yield key, _less_one(site, key)
            continue
        if variant == "glora":
            shape = (*shape, *(site.kernel if factor == "B2" else ones))
            shape = (
                (shape[0], shape[1] // math.prod(site.kernel), *shape[2:])
                if factor == "B2"
                else shape
            )
        elif factor == "l":
            shape = (*shape, *ones)
        key = TensorInfo(f"{name}.{ends.get(factor, 'diff')}", info.dtype, shape)
        yield key, loader(site, factor, key)
    if variant == "ia3":
        yield _number(f"{name}.on_input", float(bool(config.extra.get("feedforward"))))
    elif variant == "glora":
        yield _number(f"{name}.alpha", config.scaling * config.rank)
    elif variant == "diag_oft":
        most = float(str(config.extra.get("constraint", 0)))
        shape = site.factors["Q"].shape
        yield _number(f"{name}.alpha", most / (shape[0] * shape[1]))


def whole(site: Site, name: str) -> Iterator[Stored]:
    """`.diff`, of what was read from such a key."""
    info = site.factors["W2"]
    key = TensorInfo(f"{name}.diff", info.dtype, info.shape)
    yield key, loader(site, "W2", key)


def _oft(
    source: Checkpoint, module: str, infos: Mapping[str, TensorInfo], alpha: Callable[[int], float]
) -> Site | None:
    shape = infos["Q"].shape
    if len(shape) == 4:
        raise MatchError(
            f"{infos['Q'].name}: {list(shape)} is a BOFT of LyCORIS, whose blocks are mixed in between. "
            "Merge it with LyCORIS."
        )
    out = shape[0] * shape[-1]
    scale = infos.get("l")
    if len(shape) != 3 or shape[1] != shape[2] or (scale and scale.shape[:1] != (scale.numel,)):
        return None
    if scale and scale.numel != out:
        return None
    # here alpha is what Q is held to, by the number of outputs; 0 where it is not held
    extra = {"constraint": alpha(0) * out, "rescaled": scale is not None}
    kernel = scale.shape[2:] if scale else ()
    facts = {"Q": TensorInfo(infos["Q"].name, "F32", shape)}
    if scale:
        facts["l"] = TensorInfo(scale.name, "F32", (out, 1))
    config = AdapterConfig("diag_oft", shape[1], float(shape[1]), extra=extra)
    load = _reader(source, facts)
    return Site(module, "weight", "linear", config, facts, load, kernel, sides=(out, None))


def _glora(
    source: Checkpoint, module: str, infos: Mapping[str, TensorInfo], alpha: Callable[[int], float]
) -> Site | None:
    if any(len(info.shape) < 2 for info in infos.values()) or "core" in infos:
        return None  # LyCORIS makes a core of kernels of 1 alone, and so never
    a1, a2, b1, b2 = (infos[n].shape for n in ("A1", "A2", "B1", "B2"))
    rank, kernel = a2[0], b2[2:]
    if not (a1[:2] == a2[1::-1] and b1[1] == b2[0] == rank and b2[1] == a2[1] and rank):
        return None
    in_ = b2[1] * math.prod(kernel)
    shapes = {"A1": a1[:2], "A2": a2[:2], "B1": b1[:2], "B2": (rank, in_)}
    facts = {n: TensorInfo(infos[n].name, "F32", shape) for n, shape in shapes.items()}
    config = AdapterConfig("glora", rank, alpha(rank))
    load = _reader(source, facts)
    return Site(module, "weight", "linear", config, facts, load, kernel, sides=(b1[0], in_))


def _ia3(
    source: Checkpoint, module: str, infos: Mapping[str, TensorInfo], _: Callable[[int], float]
) -> Site | None:
    info = infos["l"]
    kernel, size = info.shape[2:], info.numel
    if len(info.shape) > 1 and info.shape[1] != size:
        return None
    side = source.read(infos["side"].name).reshape(-1)
    if side.size != 1 or side[0] not in (0, 1):
        return None
    inner = bool(side[0])
    shape, sides = ((1, size), (None, size)) if inner else ((size, 1), (size, None))

    def load() -> dict[str, Array]:
        import numpy as np

        return {"l": 1 + source.read(info.name).astype(np.float32).reshape(shape)}

    # LyCORIS scales a weight and leaves its bias
    config = AdapterConfig("ia3", 1, 1.0, extra={"feedforward": inner, "bias_kept": True})
    facts = {"l": TensorInfo(info.name, "F32", shape)}
    layout = "channels" if kernel else "linear"
    return Site(module, "weight", layout, config, facts, load, kernel, sides=sides)


def _full(
    source: Checkpoint, module: str, infos: Mapping[str, TensorInfo], _: Callable[[int], float]
) -> Site | None:
    info = infos["W2"]
    if len(info.shape) < 2:
        return None
    facts = {
        "W2": TensorInfo(info.name, "F32", info.shape),
        "W1": TensorInfo(info.name, "F32", (1, 1)),
    }

    def load() -> dict[str, Array]:
        import numpy as np

        return {"W1": np.ones((1, 1), np.float32), "W2": source.read(info.name).astype(np.float32)}

    config = AdapterConfig("lokr", 1, 1.0, extra={"full": True})
    sides = (info.shape[0], info.numel // info.shape[0])
    return Site(module, "weight", "linear", config, facts, load, info.shape[2:], sides=sides)


_MAKERS = {"diag_oft": _oft, "glora": _glora, "ia3": _ia3, "lokr": _full}


def _reader(source: Checkpoint, facts: Mapping[str, TensorInfo]) -> Callable[[], dict[str, Array]]:
    def load() -> dict[str, Array]:
        import numpy as np

        return {
            n: source.read(i.name).astype(np.float32).reshape(i.shape) for n, i in facts.items()
        }

    return load


def _less_one(site: Site, info: TensorInfo) -> Callable[[], Array]:
    def load() -> Array:
        import numpy as np

        less: Array = (site.load()["l"] - 1).astype(np.float32).reshape(info.shape)
        return less

    return load


def _number(key: str, value: float) -> Stored:
    def load() -> Array:
        import numpy as np

        return np.array(value, np.float32)

    return TensorInfo(key, "F32", ()), load
