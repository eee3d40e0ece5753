"""What `inspect --spectrum` prints and draws."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasurgery.cli._options import Printing
from lorasurgery.cli._print import emit, table
from lorasurgery.operations.inspecting.folding import Fold, fold

if TYPE_CHECKING:
    from lorasurgery.operations.spectrum import Spectrum

_SHOWN = 6  # singular values of a row: the largest


def show_spectrum(path: str, base: str | None, plot: Path | None, printing: Printing) -> None:
    """A row for each layer pattern (with -v each matrix); a picture if one is asked for."""
    from lorasurgery.model import resolve
    from lorasurgery.operations.inspecting.picture import check_file, spectra_picture
    from lorasurgery.operations.spectrum import spectra

    if plot:
        check_file(plot)
    found = spectra(resolve(path), resolve(base) if base else None)
    facts = {"adapter": path, "base": base, "matrices": [_facts(one) for one in found]}
    emit(facts, lambda: _text(found, printing), printing)
    if plot:
        values = {one.name: one.values for one in found}
        spectra_picture(plot, values, {one.name: one.effective_rank for one in found})


def _facts(one: Spectrum) -> dict[str, Any]:
    return {
        "name": one.name, "rank": one.rank, "effective_rank": one.effective_rank, "norm": one.norm,
        "relative": one.relative, "singular_values": one.values,
    }  # fmt: skip


def _text(found: Sequence[Spectrum], printing: Printing) -> str:
    folds = (
        [Fold(one.name, (one,)) for one in found]
        if printing.verbose
        else fold(found, lambda one: one.name, lambda one: one.rank)
    )
    head = ("matrix", "", "rank", "effective", "norm", "of W", "largest singular values")
    return "\n".join(table([head, *(_row(folded) for folded in folds)]))


def _row(folded: Fold[Spectrum]) -> tuple[str, ...]:
    """Means over the fold; of the singular values, those of the mean spectrum."""
    members = folded.members
    count = len(members)
    sizes = [one.relative for one in members if one.relative is not None]
    largest = [
        sum(one.values[i] for one in members) / count
        for i in range(min(_SHOWN, *(len(one.values) for one in members)))
    ]
    return (
        folded.name,
        f"x{count}" if count > 1 else "",
        str(members[0].rank),
        f"{sum(one.effective_rank for one in members) / count:.2f}",
        f"{sum(one.norm for one in members) / count:.4g}",
        f"{100 * sum(sizes) / len(sizes):.3g} %" if sizes else "",
        " ".join(f"{value:.3g}" for value in largest),
    )
