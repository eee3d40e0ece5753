"""Pictures of numbers by layer and module: heat maps, and spectra. Drawn by matplotlib (extra `plot`)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from lorasurgery.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_KINDS = 10  # colours
_LAYER = re.compile(r"\.(\d+)\.")
SUFFIXES = (".png", ".svg", ".pdf")


@dataclass(frozen=True, slots=True)
class Scale:
    """What the colours mean: a title, and the values at both ends."""

    title: str
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Grid:
    """Values by layer (down) and by module (across); nan where there is none."""

    layers: Sequence[str]
    modules: Sequence[str]
    values: Sequence[Sequence[float]]


def check_file(path: Path) -> None:
    """Raises UsageError unless a picture may be drawn there, before any work is done."""
    if path.suffix not in SUFFIXES:
        raise UsageError(f"{path}: a picture ends with {', '.join(SUFFIXES)}. Rename it.")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"{path}: its directory does not exist. Make it first.")
    if find_spec("matplotlib") is None:
        raise UsageError(
            "--plot: matplotlib draws it, and is not installed. Run `pip install lorasurgery[plot]`."
        )


def grid(values: Mapping[str, float]) -> Grid:
    """Tensor names sorted into layers and modules: the first number of a name is its layer."""
    cells: dict[tuple[str, str], float] = {}
    layers: dict[str, int] = {}
    modules: dict[str, None] = {}
    for name, value in values.items():
        match = _LAYER.search(name)
        layer = match[1] if match else ""
        module = (name[match.end() :] if match else name).removesuffix(".weight")
        layers[layer] = int(layer) if layer else -1
        modules[module] = None
        cells[layer, module] = value
    ordered = sorted(layers, key=lambda layer: layers[layer])
    rows = [[cells.get((layer, m), float("nan")) for m in modules] for layer in ordered]
    return Grid(ordered, list(modules), rows)


def heat_map(path: Path, values: Mapping[str, float], scale: Scale) -> None:
    """One cell for each tensor, layer x module, into a .png, .svg or .pdf."""
    shown = grid(values)
    figure = figure_of(1.6 + 0.45 * len(shown.modules), 1.8 + 0.2 * len(shown.layers))
    axes = figure.subplots()
    _cells(axes, shown, scale)
    save(figure, path)


def spectra_picture(
    path: Path, values: Mapping[str, Sequence[float]], heat: Mapping[str, float]
) -> None:
    """Singular values of each module on the left; on the right a number of each, layer x module."""
    shown = grid(heat)
    figure = figure_of(7.5 + 0.45 * len(shown.modules), max(4.5, 1.8 + 0.2 * len(shown.layers)))
    left, right = figure.subplots(1, 2)
    _lines(left, values)
    known = [v for v in heat.values() if not math.isnan(v)] or [1.0]
    # alike but for a rounding, they are of one colour
    low = min(known) if min(known) < 0.99 * max(known) else 0.0
    _cells(right, shown, Scale("effective rank", low, max(known)))
    save(figure, path)


def _lines(axes: Axes, values: Mapping[str, Sequence[float]]) -> None:
    """A line for each module, a colour for each kind of module."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    kinds = list(dict.fromkeys(map(_kind, values)))
    for name, singular in values.items():
        colour = f"C{kinds.index(_kind(name)) % 10}"
        axes.semilogy(
            range(1, len(singular) + 1), singular, color=colour, alpha=0.35, linewidth=1,
            marker="." if len(singular) == 1 else "",
        )  # fmt: skip
    if len(kinds) <= _KINDS:
        for i, kind in enumerate(kinds):
            axes.plot([], [], color=f"C{i}", label=kind)
        axes.legend(fontsize="small")
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_major_formatter(plain)
    axes.yaxis.set_minor_formatter(plain)
    axes.yaxis.set_tick_params(which="minor", labelsize="small")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("index")
    axes.set_ylabel("singular value of the change")
    axes.set_title("1 module" if len(values) == 1 else f"{len(values)} modules")


def _kind(name: str) -> str:
    """q_proj of a tensor's name."""
    return name.removesuffix(".weight").rpartition(".")[2]


def figure_of(width: float, height: float) -> Figure:
    """An empty one, in inches."""
    from matplotlib.figure import Figure

    # without pyplot no display is looked for, and nothing outlives the figure
    return Figure(figsize=(max(4.0, width), max(3.0, height)), layout="constrained")


def _cells(axes: Axes, shown: Grid, scale: Scale) -> None:
    image = axes.imshow(
        shown.values, aspect="auto", cmap="viridis", vmin=scale.low, vmax=scale.high
    )
    axes.set_xticks(
        range(len(shown.modules)), shown.modules, rotation=60, ha="right", rotation_mode="anchor"
    )
    axes.set_yticks(range(len(shown.layers)), shown.layers)
    axes.set_ylabel("layer")
    axes.set_title(scale.title)
    axes.figure.colorbar(image, ax=axes)


def save(figure: Figure, path: Path) -> None:
    """By the path's suffix; complete or not at all."""
    part = path.with_name(f".{path.name}.part")
    try:
        figure.savefig(part, format=path.suffix[1:], dpi=120)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
