"""A product of small factors cut to a rank: by its own singular values, or by what inputs make of it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from lorasurgery.arrays import Array
from lorasurgery.operations.activations.probe import Moment
from lorasurgery.operations.activations.weighed import Cut, Product
from lorasurgery.operations.algebra.interference import inner
from lorasurgery.operations.algebra.nearest import Aim
from lorasurgery.operations.algebra.svd import of_product, rank_for


@dataclass(frozen=True, slots=True)
class AsLora:
    """Factors for a change, and what they lack of it."""

    a: Array
    b: Array
    error2: float
    norm2: float
    exact: bool
    weight2: float | None  # ||W + ΔW||², where W is known
    weighed: dict[str, float] = field(default_factory=dict)  # errors of outputs


def cut(form: tuple[Array, Array], aim: Aim, weight2: float | None) -> AsLora:
    """The factors as they are, or the first singular triplets of their product."""
    a, b = form
    if aim.energy is None and (aim.rank is None or a.shape[-2] <= aim.rank):
        return AsLora(a, b, 0.0, inner(form, form), exact=True, weight2=weight2)
    found = of_product(a, b)
    squares = np.square(found.s).reshape(-1, found.s.shape[-1]).sum(axis=0)
    rank = _rank(squares, aim)
    lost = float(squares[rank:].sum())
    whole = float(squares.sum())
    return AsLora(*found.factors(rank), lost, whole, exact=lost == 0, weight2=weight2)


def cut_weighed(
    form: tuple[Array, Array], aim: Aim, moment: Moment, weight2: float | None
) -> AsLora:
    """`cut`, with energy and nearness counted in the module's outputs."""
    product = Product(*form, moment)
    rank = _rank(product.energy, aim)
    made, plain = product.cut(rank), product.plain(rank)
    if rank < min(len(product.energy), form[0].shape[-2]):
        return as_cut(made, plain, weight2)
    whole = cut(form, Aim(), weight2)
    nothing_lost = replace(made, error2=0.0, output_error2=0.0)
    return replace(whole, weighed=nothing_lost.outputs | nothing_lost.unweighted)


def as_cut(made: Cut, plain: Cut, weight2: float | None) -> AsLora:
    """Cut by outputs, beside the plain cut of the same rank."""
    return AsLora(
        made.a, made.b, made.error2, made.norm2, exact=made.error2 == 0, weight2=weight2,
        weighed=made.outputs | plain.unweighted,
    )  # fmt: skip


def _rank(squares: Array, aim: Aim) -> int:
    """How many of the energies by rank [k] are aimed at."""
    rank = len(squares) if aim.energy is None else max(1, rank_for(squares, aim.energy))
    return min(rank, aim.rank or rank)
