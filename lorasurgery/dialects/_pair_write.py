"""Factors on their way into a file: a convolution's with the kernel's dimensions, in the dtype that is asked for."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from lorasurgery.adapter import Site
from lorasurgery.tensors import TensorInfo

if TYPE_CHECKING:
    from lorasurgery.arrays import Array


def spread(site: Site, factor: str) -> tuple[int, ...]:
    """A [r, in, *kernel], and B and magnitudes with a 1 for each of the kernel's dimensions."""
    rows, columns = site.factors[factor].shape
    if factor == "A" and site.kernel:
        return rows, columns // math.prod(site.kernel), *site.kernel
    return rows, columns, *(1 for _ in site.kernel)


def loader(
    site: Site, factor: str, info: TensorInfo, *, scale: float = 1.0, turned: bool = False
) -> Callable[[], Array]:
    """What loads a factor as `info` announces it; turned: it lies there on its side."""

    def load() -> Array:
        import numpy as np

        from lorasurgery.arrays import NUMPY

        found = site.load()[factor]
        found = found if scale == 1.0 else found * np.float32(scale)
        found = np.ascontiguousarray(found.T if turned else found)
        return found.reshape(info.shape).astype(NUMPY[info.dtype], copy=False)

    return load
