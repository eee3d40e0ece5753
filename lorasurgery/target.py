"""What adapters do to one tensor: the shares of their sites in it, and the change that comes of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from lorasurgery import plugins
from lorasurgery.adapter import Site, Variant
from lorasurgery.naming import Part
from lorasurgery.tensors import TensorInfo

if TYPE_CHECKING:
    from lorasurgery.arrays import Array
    from lorasurgery.change import Change, Fused, Merged, Rows
    from lorasurgery.device import Device


@dataclass(frozen=True, slots=True)
class Share:
    """What one site does to one tensor: its factors times `weight`, turned if W is stored [in, out]."""

    site: Site
    part: Part
    info: TensorInfo  # of the tensor
    turned: bool
    weight: float = 1.0

    @property
    def variant(self) -> Variant:
        return cast(Variant, plugins.load("adapters", self.site.config.variant))

    def factors(self) -> tuple[Array, Array] | None:
        """A float32 [n, k, columns] and B [n, rows, k] with the tensor's change B A, or None.

        n is the number of experts, or 1; None where the variant has no such form.
        """
        form = self.variant.low_rank(self.site.load(), self.site.config)
        if form is None:
            return None
        a, b = form
        if a.ndim == 2:
            a, b = a[None], b[None]
        if self.part.expert is not None:
            a, b = a[self.part.expert : self.part.expert + 1], b[[self.part.expert]]
        if self.turned:
            a, b = b.transpose(0, 2, 1), a.transpose(0, 2, 1)
        if self.part.rows is not None:
            b = b[:, slice(*self.part.rows)]
        if self.weight != 1.0:
            b = b * b.dtype.type(self.weight)
        return a, b

    def dense(self, w: Array) -> Array:
        """The change of a weight float32 [n, rows, columns] that other shares may have changed already."""
        seen = w.transpose(0, 2, 1) if self.turned else w
        one = seen[0] if len(seen) == 1 else seen
        delta = self.variant.delta(one, self.site.load(), self.site.config).reshape(seen.shape)
        weighed: Array = delta * delta.dtype.type(self.weight)
        return weighed.transpose(0, 2, 1) if self.turned else weighed

    @property
    def by_rows(self) -> bool:
        """Whether each row of the change is made of the same row of the tensor."""
        names = getattr(self.variant, "ROWS", ())
        whole = self.part.expert is None and self.site.layout != "experts" and not self.turned
        factors, rows = self.site.factors, self.info.shape[0] if self.info.shape else 1
        return whole and bool(names) and all(factors[name].shape[0] == rows for name in names)

    def fused(self) -> Fused | None:
        """What merges a few rows in one pass, if the variant can and nothing weighs it."""
        variant, config, factors = self.variant, self.site.config, dict(self.site.load())
        merged_by, names = getattr(variant, "merged_by", None), getattr(variant, "ROWS", ())
        if merged_by is None or self.weight != 1.0:
            return None

        def run(
            w: Array, start: int, dtype: Any, chance: tuple[int | None, int], device: Device
        ) -> Merged:
            of = {n: f[start : start + len(w)] if n in names else f for n, f in factors.items()}
            kernel, arguments = merged_by(of, config)
            merged: Merged = device.run(kernel, w, *arguments, dtype, *chance)
            return merged

        return run

    def some(self) -> Callable[[Array, int], Array]:
        """What makes the change of a few rows, from them and the number of their first."""
        variant, config, factors = self.variant, self.site.config, dict(self.site.load())
        names = getattr(variant, "ROWS", ())

        def make(w: Array, start: int) -> Array:
            of = {n: f[start : start + len(w)] if n in names else f for n, f in factors.items()}
            delta = variant.delta(w, of, config)
            return delta if self.weight == 1.0 else delta * delta.dtype.type(self.weight)

        return make


@dataclass(frozen=True, slots=True)
class Target:
    """All that adapters do to one tensor."""

    tensor: str
    shares: tuple[Share, ...]

    def change(self, weight: Rows | None = None, *, own: bool = False) -> Change:
        """What is added to the weight that `weight` reads.

        Low-rank shares lie side by side: a sum of products is a product of rank r1 + r2. A change that
        is no such product is made of the weight, one share after another, row by row if it can be;
        where `weight` is None, it cannot be known, and is nothing. `own`: it is added to that weight.
        """
        import numpy as np

        from lorasurgery.change import ByRows, Dense, LowRank, widened

        forms = [share.factors() for share in self.shares]
        pairs = [form for form in forms if form is not None]
        if len(pairs) == len(forms):
            a = np.concatenate([a for a, _ in pairs], axis=1)
            b = np.concatenate([b for _, b in pairs], axis=2)
            return LowRank(np.ascontiguousarray(a), np.ascontiguousarray(b))
        if weight is None:
            return LowRank.nothing(self.shares[0].info)
        info = self.shares[0].info
        rows = info.shape[0] if info.shape else 1
        if all(share.by_rows for share in self.shares):
            fused = self.shares[0].fused() if own and len(self.shares) == 1 else None
            return ByRows(self._by_rows(weight), rows, info.numel // max(1, rows), fused)
        w = widened(weight(0, rows))
        total = w.copy()
        for share in self.shares:
            total += share.dense(total)
        return Dense(total - w)

    def _by_rows(self, weight: Rows) -> Rows:
        first, *others = [share.some() for share in self.shares]

        def make(start: int, stop: int) -> Array:
            read = weight(start, stop)
            w = read.astype("f4", copy=False).reshape(len(read) if read.ndim else 1, -1)
            delta = first(w, start)
            for other in others:
                delta = delta + other(w + delta, start)
            return delta

        return make
