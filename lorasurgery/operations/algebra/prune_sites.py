"""The sites of a prune: what each rank of a change is worth, the change at fewer ranks, and what that loses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from lorasurgery.adapter import Adapter, Site
from lorasurgery.arrays import Array
from lorasurgery.edit import tile_rows
from lorasurgery.model import Model
from lorasurgery.operations.activations.probe import Moment
from lorasurgery.operations.activations.weighed import Product
from lorasurgery.operations.algebra.made import kept, lora_site, low_rank, name_of, remembering
from lorasurgery.operations.algebra.nearest import loss
from lorasurgery.operations.algebra.ranks import Spectrum, spectrum_of
from lorasurgery.operations.algebra.site_weights import site_weights
from lorasurgery.operations.algebra.svd import of_product, padded, singular_values
from lorasurgery.report import Result
from lorasurgery.surgery import TILE_BYTES
from lorasurgery.tensors import BITS


@dataclass(frozen=True, slots=True)
class Pruning:
    """The adapter, the moment of each site's inputs where they count, and the dtype that is written."""

    adapter: Adapter
    moments: Mapping[str, Moment] | None
    dtype: str

    def spectrum(self, site: Site) -> Spectrum:
        """The energy of each rank: of the change, or of what it does to outputs."""
        a, b = low_rank(self.adapter, site)
        if self.moments is None:
            energy = spectrum_of(singular_values(a, b))
        else:
            energy = Product(a, b, self.moments[name_of(site)]).energy
        experts = a.shape[0] if a.ndim == 3 else 1
        # PEFT has a bias only beside a LoRA
        least = int(f"{site.module}.bias" in self.adapter.added)
        cost = experts * (a.shape[-1] + b.shape[-2])
        return Spectrum(name_of(site), energy, cost, (a.shape, b.shape), least=least)

    def cut(self, site: Site, spectrum: Spectrum, rank: int) -> tuple[Site, Result]:
        """The site at this rank, and what it has lost."""
        metrics = {"rank_before": float(len(spectrum.energy)), "rank": float(rank)}
        if self.moments is None:
            made = self._nearest(site, spectrum, rank)
            cut, whole = float(spectrum.energy[rank:].sum()), float(spectrum.energy.sum())
            metrics |= loss(cut, whole)
        else:
            product = Product(*low_rank(self.adapter, site), self.moments[spectrum.name])
            found = product.cut(rank)
            made = kept(site, *padded(found.a, found.b, max(1, rank)))
            metrics |= found.metrics
        metrics["bytes"] = rank * spectrum.cost * BITS[self.dtype] / 8
        return made, Result(spectrum.name, metrics, {}, {})

    def _nearest(self, site: Site, spectrum: Spectrum, rank: int) -> Site:
        """Its factors are made when they are written."""
        a, b = spectrum.shapes

        def load() -> tuple[Array, Array]:
            return of_product(*low_rank(self.adapter, site)).factors(rank)

        shapes = ((*a[:-2], max(1, rank), a[-1]), (*b[:-1], max(1, rank)))
        return lora_site(site, shapes, remembering(load))


def relative(spectra: Sequence[Spectrum], model: Model, adapter: Adapter) -> list[Spectrum]:
    """Each module counts by the part of its weight that its change is."""
    norms = _norms(model, adapter)
    return [replace(s, weight=1 / norms[s.name] if norms[s.name] else 0.0) for s in spectra]


def _norms(model: Model, adapter: Adapter) -> dict[str, float]:
    """||W||² of all tensors that hold a module's weight."""
    found = site_weights(model, adapter).shares
    return {n: sum(_square(model, s.part.tensor) for s in of) for n, of in found.items()}


def _square(model: Model, name: str) -> float:
    info, read = model.weights.info(name), model.weights.read
    step, rows = tile_rows(info, 1, TILE_BYTES), info.shape[0]
    found = sum(_energy(read, name, start, start + step) for start in range(0, rows, step))
    model.weights.release(name)
    return found


def _energy(read: Callable[[str, int, int], Array], name: str, start: int, stop: int) -> float:
    import numpy as np

    wide = read(name, start, stop).astype(np.float32).reshape(-1)
    return float(np.dot(wide, wide))
