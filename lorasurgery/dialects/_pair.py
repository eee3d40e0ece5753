"""A LoRA's or DoRA's tensors of one module as a site: A and B, a convolution's core, magnitudes.

A lies in the file as [r, in, *kernel], B as [out, r, 1, 1]. With a core [r, r, *kernel] (LyCORIS' Tucker
form) A knows the channels alone, and A'[p, i, k] = Σ_q core[p, q, k] A[q, i].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from lorasurgery.adapter import AdapterConfig, Site
from lorasurgery.checkpoint import Checkpoint
from lorasurgery.problems import Problem
from lorasurgery.tensors import TensorInfo

if TYPE_CHECKING:
    from lorasurgery.arrays import Array

# the role of a tensor -> its key: 'A', 'B', perhaps 'core' and 'm'
Roles = Mapping[str, str]


def site(
    source: Checkpoint, module: str, roles: Roles, config: AdapterConfig, *, by_row: bool
) -> Site | Problem:
    """One adapted module, or why it is none; by_row: magnitudes are of rows, whatever their shape."""
    some = next(iter(roles.values()))
    if not {"A", "B"} <= roles.keys():
        missing = "A (down)" if "A" not in roles else "B (up)"
        return Problem(some, f"{some} stands alone: {missing} of {module} is missing")
    infos = {role: source.info(key) for role, key in roles.items()}
    if not _fit(infos, config.rank):
        said = ", ".join(f"{role} {list(info.shape)}" for role, info in infos.items())
        return Problem(some, f"{module}: {said} are no factors of rank {config.rank}")
    a, b = infos["A"], infos["B"]
    kernel = infos["core"].shape[2:] if "core" in infos else a.shape[2:]
    in_ = a.shape[1]
    for size in kernel:
        in_ *= size
    shapes = {"A": (config.rank, in_), "B": (b.shape[0], config.rank)}
    if "m" in infos:
        m = _magnitudes(infos["m"], b.shape[0], in_, by_row=by_row)
        if m is None:
            return Problem(
                some,
                f"{module}: magnitudes {list(infos['m'].shape)} are neither of the rows nor of the "
                f"columns of [{b.shape[0]}, {in_}]",
            )
        shapes["m"] = m
    facts = {role: TensorInfo(roles[role], "F32", shape) for role, shape in shapes.items()}
    load = _reader(source, roles, shapes)
    return Site(module, "weight", "linear", config, facts, load, kernel)


def _fit(infos: Mapping[str, TensorInfo], rank: int) -> bool:
    a, b = infos["A"].shape, infos["B"].shape
    if rank < 1 or len(a) < 2 or len(b) < 2 or not a[0] == b[1] == rank:
        return False
    if any(n != 1 for n in b[2:]):
        return False
    if "core" not in infos:
        return True
    core = infos["core"].shape
    return len(core) > 2 and core[:2] == (rank, rank) and all(n == 1 for n in a[2:])


def _magnitudes(
    info: TensorInfo, out: int, columns: int, *, by_row: bool
) -> tuple[int, int] | None:
    """[out, 1], or [1, in]: the axis is told by the shape, [out, 1, ...] or [1, in, ...]."""
    if info.numel == out and (by_row or info.shape[:1] == (out,)):
        return out, 1
    if not by_row and info.shape[:2] == (1, columns) and info.numel == columns:
        return 1, columns
    return None


def _reader(
    source: Checkpoint, roles: Roles, shapes: Mapping[str, tuple[int, ...]]
) -> Callable[[], Mapping[str, Array]]:
    def load() -> dict[str, Array]:
        import numpy as np

        found = {role: source.read(key).astype(np.float32) for role, key in roles.items()}
        if "core" in found:
            a, core = found["A"].reshape(len(found["A"]), -1), found.pop("core")
            core = core.reshape(len(core), len(a), -1).swapaxes(1, 2)  # [r, kernel, r]
            found["A"] = (core @ a).swapaxes(1, 2)
        return {role: np.ascontiguousarray(f.reshape(shapes[role])) for role, f in found.items()}

    return load
