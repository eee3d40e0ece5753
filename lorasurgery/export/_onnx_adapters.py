"""LoRA factors as optional inputs of a graph: y = x W + x A B, A [in, r] and B [r, out], of any rank at each run.

An input that is an initializer as well may be left out: its zeros of rank 1 then change nothing. Names and
shapes are those of onnxruntime's AdapterFormat (dialects/ort_adapter.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorasurgery.adapter import Adapter, AdapterConfig, Site
from lorasurgery.arrays import NUMPY
from lorasurgery.change import LowRank
from lorasurgery.errors import MatchError
from lorasurgery.export._onnx_edit import Edited
from lorasurgery.export._onnx_linear import Linear
from lorasurgery.export._onnx_modules import open_modules
from lorasurgery.export._target import free_name
from lorasurgery.operations._adapters import open_adapters
from lorasurgery.operations._onnx_laid import lay_factors, plain
from lorasurgery.operations.algebra.made import variant_of
from lorasurgery.target import Target
from lorasurgery.tensors import TensorInfo

if TYPE_CHECKING:
    from collections.abc import Callable

    from lorasurgery.arrays import Array


@dataclass(frozen=True, slots=True)
class Input:
    """Two optional inputs: the factors of one module."""

    linear: Linear
    dtype: str

    @property
    def shapes(self) -> dict[str, list[int | str]]:
        out, in_ = self.linear.shape
        rank = f"{self.linear.module}.rank"
        return {
            f"{self.linear.module}.lora_A.weight": [in_, rank],
            f"{self.linear.module}.lora_B.weight": [rank, out],
        }


@dataclass(frozen=True, slots=True)
class Placed:
    """Adapters by the names that they will be switched by, what they need of the graph, and what was left out."""

    adapters: Mapping[str, Adapter]
    inputs: Sequence[Input]
    notes: Sequence[str]


def check_factors(adapters: Sequence[str]) -> None:
    """Raise MatchError for a variant that is no product of two factors, before a graph is made."""
    for adapter, _ in open_adapters(adapters):
        for site in {site.config.variant: site for site in reversed(adapter.sites)}.values():
            if variant_of(site).low_rank(site.load(), site.config) is None:
                raise _no_factors(adapter, site, site.module)


def place(edited: Edited, adapters: Sequence[str], allowed: Sequence[str]) -> Placed:
    """Lay each adapter upon the graph by itself. Raises MatchError for what x A B cannot say."""
    made: dict[str, Adapter] = {}
    needed: dict[str, Input] = {}
    notes: list[str] = []
    for text in adapters:
        model, view = open_modules(edited.file, {})
        ((opened, weight),) = open_adapters([text])
        laid = lay_factors(model, view, (plain(opened), weight), allowed)
        notes += laid.notes
        sites = []
        for name, target in laid.resolved.targets.items():
            linear = view.linears.get(name)
            if linear is None:
                raise MatchError(
                    f"{opened.path}: {name} is looked up in and not multiplied by, so that its factors "
                    "can be no inputs. Merge it, or leave it out."
                )
            dtype = edited.file.info(linear.initializer).dtype
            needed.setdefault(linear.module, Input(linear, dtype))
            sites.append(_site(opened, linear, target, dtype))
        made[free_name(opened.path, made)] = _as_lora(opened, sites)
    return Placed(made, tuple(needed.values()), notes)


def add_inputs(edited: Edited, inputs: Sequence[Input]) -> None:
    """Give each product its second way around."""
    import onnx_ir as ir

    for one in inputs:
        dtype = NUMPY[one.dtype]
        values = []
        for name, shape in one.shapes.items():
            sizes = tuple(1 if isinstance(size, str) else size for size in shape)
            value = edited.add(name, ir.DataType.from_numpy(dtype), sizes, _zeros(sizes, dtype))
            assert value.name == name, "no graph has a name like this"
            value.shape = ir.Shape(shape)
            edited.graph.inputs.append(value)
            values.append(value)
        for index in one.linear.nodes:
            _around(edited, edited.nodes[index], values)


def _around(edited: Edited, node: Any, factors: list[Any]) -> None:
    import onnx_ir as ir

    old = node.outputs[0]
    uses, is_output = list(old.uses()), old.is_graph_output()
    inner = ir.node("MatMul", [node.inputs[0], factors[0]], name=f"{node.name}.lora_A")
    outer = ir.node("MatMul", [inner.outputs[0], factors[1]], name=f"{node.name}.lora_B")
    total = ir.node("Add", [old, outer.outputs[0]], name=f"{node.name}.lora")
    name, last = old.name, total.outputs[0]
    for made in (inner, outer):
        made.outputs[0].name = f"{made.name}/output_0"
    last.type, last.shape = old.type, old.shape
    edited.graph.insert_after(node, [inner, outer, total])
    for user, at in uses:
        user.replace_input_with(at, last)
    if is_output:
        edited.graph.outputs[edited.graph.outputs.index(old)] = last
        old.name, last.name = f"{node.name}.plain", name
    else:
        last.name = f"{name}.adapted"


def _site(adapter: Adapter, linear: Linear, target: Target, dtype: str) -> Site:
    change = target.change()
    if not isinstance(change, LowRank) or not change.rank:
        raise _no_factors(adapter, target.shares[0].site, linear.module)
    rank = change.rank

    def load() -> dict[str, Array]:
        again = target.change()
        assert isinstance(again, LowRank)
        return {"A": again.a[0], "B": again.b[0]}

    out, in_ = linear.shape
    facts = {"A": TensorInfo("A", dtype, (rank, in_)), "B": TensorInfo("B", dtype, (out, rank))}
    config = AdapterConfig("lora", rank, float(rank))
    return Site(linear.module, "weight", "linear", config, facts, load)


def _no_factors(adapter: Adapter, site: Site, module: str) -> MatchError:
    return MatchError(
        f"{adapter.path}: what its {site.config.variant} adds to {module} is no product of two factors, "
        "which could be inputs. Convert it with `convert --to lora`, or merge it."
    )


def _as_lora(adapter: Adapter, sites: list[Site]) -> Adapter:
    def nothing(name: str) -> Array:
        raise KeyError(name)

    return Adapter(
        adapter.path, "ort_adapter", adapter.base, tuple(sites), {}, {}, nothing, nothing
    )


def _zeros(shape: tuple[int, ...], dtype: Any) -> Callable[[], Array]:
    import numpy as np

    return lambda: np.zeros(shape, dtype)
